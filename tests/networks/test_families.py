"""Every family of pictures and video: what LoRA adapts in it, and what a pipeline's folder tells of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.batch import Condition
from fewstep.data.mock import Mock
from fewstep.diffusion import VP, features
from fewstep.methods import DMD2
from fewstep.networks.families.cogvideox import CogVideoXSpec
from fewstep.networks.families.dit import DitSpec
from fewstep.networks.families.flux import FluxSpec
from fewstep.networks.families.qwen_image import QwenImageSpec
from fewstep.networks.families.unet import UnetSpec
from fewstep.networks.families.wan.experts import ExpertsSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.files.pipeline import PipelineFolder
from fewstep.networks.lora import Backbone, Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.weights.addresses import read
from fewstep.parallel import World, place
from fewstep.training.loop import train
from fewstep.training.plan.plan import fake_mode
from fewstep.training.run import Job, Run, Trainer

WAN = WanSpec(
    num_heads=2,
    head_dim=12,
    num_layers=2,
    ffn_dim=32,
    text_dim=12,
    text_tokens=7,
    freq_dim=16,
    latent_channels=4,
    max_positions=16,
)
FAMILIES: dict[str, Any] = {
    "wan": WAN,
    "wan i2v": replace(WAN, image_dim=10),
    "experts": ExpertsSpec(WAN, WAN),
    "cogvideox": CogVideoXSpec(
        latent_channels=4, num_heads=2, head_dim=16, num_layers=2, text_dim=12, text_tokens=7, time_dim=8, sample_size=(8, 8),
        sample_frames=1,
    ),
    "unet": UnetSpec(
        widths=(8, 16), with_attention=(False, True), num_heads=(1, 2), transformer_layers=(1, 1), layers_per_block=1,
        norm_groups=4, text_dim=12, pooled_dim=10, size_dim=8,
    ),
    "flux": FluxSpec(
        latent_channels=4, num_heads=2, head_dim=16, num_layers=1, num_single_layers=1, text_dim=12, pooled_dim=10,
        rotary_dims=(4, 6, 6),
    ),
    "qwen_image": QwenImageSpec(
        latent_channels=4, num_heads=2, head_dim=16, num_layers=2, text_dim=12, rotary_dims=(4, 6, 6)
    ),
    "dit": DitSpec(num_labels=5, num_heads=2, head_dim=8, num_layers=2, sample_size=8),
}  # fmt: skip
T = torch.tensor([0.95, 0.25], dtype=torch.float64)


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told() -> Condition:
    return Condition(
        text=draw(2, 7, 12, seed=2), pooled=draw(2, 10, seed=3), image=draw(2, 5, 10, seed=4), label=torch.tensor([1, 2])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_lie_over_every_named_layer_begin_as_the_teacher_and_learn(name: str) -> None:
    torch.manual_seed(0)
    net = FAMILIES[name].build()
    net.module.eval()
    for parameter in net.module.parameters():
        if not bool(parameter.any()):  # zero-initialised layers would hide the gradients behind them
            torch.nn.init.normal_(parameter, std=0.2)
    x, cond = draw(2, 4, 1, 8, 8), told()
    before = net(x, T, cond).velocity.detach()
    for target in net.traits.lora_targets or ():
        assert any(layer.endswith("." + target) for layer, _ in net.module.named_modules()), target
    net.module.requires_grad_(False)
    backbone = Backbone(net)
    student = backbone.add("student", Lora(rank=2))
    torch.testing.assert_close(student(x, T, cond).velocity, before, rtol=0, atol=1e-6)
    student(x, T, cond).velocity.square().sum().backward()
    missed = [
        weight for weight, parameter in student.module.named_parameters()
        if "lora_B" in weight and (parameter.grad is None or not bool(parameter.grad.any()))
    ]  # fmt: skip
    # What follows the last use of the text inside a network of two streams reaches no answer; nor do keys of one frame alone.
    assert all("transformer_blocks.1." in weight for weight in missed) if name == "qwen_image" else not missed, missed
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.1)
        assert (student(x, T, cond).velocity - before).abs().max() > 1e-3
        torch.testing.assert_close(backbone.itself()(x, T, cond).velocity, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_behind_the_last_tap_do_not_run_where_only_features_are_wanted(name: str) -> None:
    """A head's logits and their gradients, into the weights and into x, are those of a call that runs all blocks."""
    torch.manual_seed(0)
    net = FAMILIES[name].build()
    for parameter in net.module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, cond = draw(2, 4, 1, 8, 8).requires_grad_(), told()
    runs: Counter[str] = Counter()
    layers = {f"{i}.{layer}": part for i, block in enumerate(net.blocks) for layer, part in block.named_modules() if layer}
    for layer, part in layers.items():
        part.register_forward_hook(lambda module, inputs, output, layer=layer: runs.update([layer]))
    num = len(net.high.blocks) if name == "experts" else len(net.blocks)
    for taps in ((0,), (num // 2, 0), (num - 1,)):
        weights = [x, *net.module.parameters()]
        runs.clear()
        whole = net(x, T, cond, taps=taps).features
        in_whole, _ = runs.copy(), runs.clear()
        alone = features(net, x, T, cond, taps)
        assert len(alone) == len(taps) and all(torch.equal(a, b) for a, b in zip(alone, whole, strict=True))
        number = {layer: int(layer.split(".")[0]) % num for layer in layers}
        assert set(runs) == {layer for layer in in_whole if number[layer] <= max(taps)}
        wanted = torch.autograd.grad(sum(f.square().sum() for f in whole), weights, allow_unused=True)
        found = torch.autograd.grad(sum(f.square().sum() for f in alone), weights, allow_unused=True)
        for (weight, _), a, b in zip([("x", x), *net.module.named_parameters()], found, wanted, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), weight
    assert all("forward" not in vars(block) for block in net.blocks)


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_can_be_planned_on_tensors_without_numbers(name: str) -> None:
    with fake_mode():
        net = FAMILIES[name].build()
        cond = replace(told(), text=torch.randn(2, 7, 12), size=None)
        answer = net(torch.randn(2, 4, 1, 8, 8), torch.rand(2, 1, dtype=torch.float64), cond, taps=(0,))
        (answer.x0.sum() + answer.features[0].sum()).backward()
    assert answer.velocity.shape == (2, 4, 1, 8, 8)
    assert sum(parameter.grad is not None for parameter in net.module.parameters()) > 10
    assert float(net.path.coefficients(torch.tensor(0.0))[0]) == 1.0  # and what is kept for later has its numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_network_computes_in_bf16_and_answers_in_float32(name: str) -> None:
    """Its tables stay float32, as `place` leaves them: nothing inside may stumble over the two types."""
    torch.manual_seed(0)
    net = FAMILIES[name].build()
    net.module.eval()
    x, cond = draw(2, 4, 1, 8, 8), told()
    with torch.no_grad():
        exact = net(x, T, cond).velocity
        place(net.module, net.blocks, World(0, 1, torch.device("cpu"), None), mode="ddp", compute=torch.bfloat16, trained=False)
        answer = net(x, T, cond, taps=(0,))
    assert answer.velocity.dtype == torch.float32 and answer.features[0].dtype == torch.bfloat16
    assert float((answer.velocity - exact).norm() / exact.norm()) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_dmd2_moves_the_student_through_the_whole_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    data = Mock((4, 1, 8, 8), (7, 12), pooled=10, image=(5, 10), num_labels=5, fps=None, num=8)
    trainer = Trainer(max_iter=2, batch_size=2, num_threads=1)
    run = Run(DMD2(guidance=3.0), Networks(FAMILIES[name], Full(), Full()), data, job=Job(name="a"), trainer=trainer)
    summary = train(run)
    assert summary["step"] == 2 and 0 < summary["grad_norm/student"] < 1e3 and 0 < summary["grad_norm/critic"] < 1e3
    moved = {part: read(f"{tmp_path}/fewstep/default/a:{part}") for part in ("student", "student.ema")}
    teacher = build(run.networks, ("teacher",), run.trainer.seed)["teacher"].module.state_dict()
    assert moved["student"].keys() >= {weight for weight, _ in FAMILIES[name].build().module.named_parameters()}
    assert any(not torch.equal(moved["student"][weight], teacher[weight]) for weight in teacher)


def scheduler(folder: Path, **told: Any) -> PipelineFolder:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
    return PipelineFolder(str(folder))


def test_the_scheduler_of_a_pipeline_tells_how_the_table_of_cogvideox_is_shifted(tmp_path: Path) -> None:
    FAMILIES["cogvideox"].build().module.save_pretrained(str(tmp_path / "transformer"))
    assert CogVideoXSpec.of(PipelineFolder(str(tmp_path))).snr_shift == 3.0
    net = CogVideoXSpec.of(scheduler(tmp_path, snr_shift_scale=1.0)).build()
    assert net.path == VP("scaled_linear", zero_terminal_snr=True, snr_shift=1.0)


def test_the_scheduler_of_a_pipeline_tells_what_its_unet_predicts(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"addition_embed_type": "text_time"}))
    address = scheduler(tmp_path, prediction_type="v_prediction", rescale_betas_zero_snr=True, beta_schedule="scaled_linear")
    spec = UnetSpec.of(address)
    assert spec.predicts == "v" and spec.path == VP("scaled_linear", zero_terminal_snr=True)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="predicts 'sample' on a table 'scaled_linear'"):
        UnetSpec.of(PipelineFolder(str(tmp_path)))


def test_the_index_of_a_wan_pipeline_tells_of_its_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ExpertsSpec(replace(WAN, text_tokens=512), replace(WAN, text_tokens=512)).build()
    for part in ("transformer", "transformer_2"):
        net.module.get_submodule(part).save_pretrained(str(tmp_path / part))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": 0.875}))
    spec = ExpertsSpec.of(PipelineFolder(str(tmp_path)))
    assert isinstance(spec, ExpertsSpec) and spec.boundary == 0.875
    x, cond = draw(2, 4, 1, 8, 8), told()
    torch.testing.assert_close(spec.build()(x, T, cond).velocity, net(x, T, cond).velocity, rtol=0, atol=1e-6)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": None}))
    assert ExpertsSpec.of(PipelineFolder(str(tmp_path))) == WanSpec(pretrained=str(tmp_path))
