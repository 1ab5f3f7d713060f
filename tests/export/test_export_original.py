"""Through the public commands: original files, `train`, `export --format pt-original`, equal bits; and what goes out instead of
a folder of diffusers where diffusers has no class."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.cli import main
from fewstep.config import to_yaml
from fewstep.data.mock import Mock
from fewstep.inference.model import open_model
from fewstep.methods import Finetune
from fewstep.networks.families.cosmos.control import SHARED, CosmosControlSpec
from fewstep.networks.families.cosmos.keys import Generation, original_names
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.unet import UnetSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.networks.weights.addresses import load_into, read
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

PREDICT2 = CosmosSpec(
    latent_channels=2, num_heads=2, head_dim=12, num_layers=2, mlp_ratio=2, text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8),
)  # fmt: skip
SIZES = {name: getattr(PREDICT2, name) for name in PREDICT2.__dataclass_fields__}
CONTROL = CosmosControlSpec(**SIZES, controls=("edge",), num_control_blocks=2, hint_channels=4)
FIRST: dict[str, Any] = {"family": "edm", "sigma_data": 0.5, "learnable_positions": True}
SPECS: dict[str, tuple[CosmosSpec, Generation]] = {
    "predict1": (replace(PREDICT2, **FIRST), "1"),
    "predict2": (PREDICT2, "2"),
    "predict2.5": (replace(PREDICT2, text_projection_from=12), "2"),
    "transfer1": (replace(CONTROL, **FIRST, style="transfer1"), "1"),
    "transfer2.5": (replace(CONTROL, text_projection_from=12), "2"),
}
SHAPE = (2, 2, 4, 4)


def original(table: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the original code would have saved of random weights, none of them 0."""
    torch.manual_seed(0)
    spec, generation = SPECS[table]
    made: Any = spec.build().module
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    for own, again in SHARED.items() if table == "transfer2.5" else ():
        if getattr(made.base, own, None) is not None:
            getattr(made.branches["edge"], again).load_state_dict(getattr(made.base, own).state_dict())
    state = made.state_dict()
    return {theirs: state[ours].to(dtype) for ours, theirs in original_names(state, generation).items()}


def trained(
    root: Path, networks: Networks, text: int, lr: float, controls: tuple[str, ...] = (), shape: tuple[int, ...] = SHAPE
) -> Path:
    """`fewstep train` of one iteration, and its folder."""
    run = Run(
        job=Job(name="tiny"),
        method=Finetune(),
        networks=networks,
        data=Mock(shape=shape, text=(3, text), controls=controls, num=4, fps=24.0, noise=False),
        optim=Optim(lr=lr, weight_decay=0.0),
        ema=Ema(beta=0.5),
        trainer=Trainer(max_iter=1, batch_size=1, num_threads=1, log_every=1),
        checkpoint=Checkpoint(save_iter=1),
        health=Health(every=None),
    )
    (root / "run.yaml").write_text(to_yaml(run))
    assert main(["train", str(root / "run.yaml")]) == 0
    return run.job.folder()


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "runs"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("table", SPECS)
def test_original_weights_that_were_not_changed_go_out_with_equal_bits(table: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A learning rate of 1e-30 changes no bit: what came in comes out, through reading, training, averaging and writing."""
    file, spec = original(table, dtype), SPECS[table][0]
    torch.save(file, tmp_path / "model.pt")
    controls = getattr(spec, "controls", ())
    networks = Networks(student=Full(spec, init=str(tmp_path / "model.pt")))
    run = trained(tmp_path, networks, spec.text_projection_from or 8, 1e-30, controls)
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", "pt-original"]) == 0
    wanted = {"model.pt": torch.float32, "model_ema_fp32.pt": torch.float32, "model_ema_bf16.pt": torch.bfloat16}
    for name, kind in wanted.items():
        found = torch.load(tmp_path / "out" / name, weights_only=True)
        assert found.keys() == file.keys(), name
        assert all(found[key].dtype == kind and torch.equal(found[key], file[key].to(kind)) for key in file), name


# --- Transfer1, of which diffusers has no class -----------------------------------------------------------------------


def test_transfer1_goes_out_under_its_original_names_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = SPECS["transfer1"][0]
    run = trained(tmp_path, Networks(student=Full(spec, init="random")), 8, 1e-3, ("edge",))
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "note: --format pt-original, because diffusers has no class for the control branch of Cosmos-Transfer1" in told.err
    assert "model_ema_bf16.pt" in told.out
    back = tmp_path / "back.safetensors"  # and what went out is what `generate` would have sampled
    assert main(["convert", str(tmp_path / "out/model_ema_fp32.pt"), str(back)]) == 0
    tensors, wanted = load_file(back), open_model(str(run)).network.module.state_dict()
    assert all(torch.equal(tensors[n.replace("branches.edge.", "branches.control.")], wanted[n]) for n in wanted)

    assert main(["export", str(run), "--out", str(tmp_path / "no"), "--format", "diffusers"]) == 2
    told = capsys.readouterr().err
    assert "--format diffusers: diffusers has no class for the control branch of Cosmos-Transfer1" in told
    assert "Take --format pt-original" in told and not (tmp_path / "no").exists()


# --- Transfer2.5, whose branch repeats parts of its base --------------------------------------------------------------


def test_a_trained_branch_stays_one_with_its_base_and_goes_out_under_original_names(tmp_path: Path) -> None:
    """Weights and average alike: read back, each is what the run holds, in the base and in the branch."""
    nets = Networks(student=Full(SPECS["transfer2.5"][0], init="random"))
    run = trained(tmp_path, nets, 12, 0.1, ("edge",))
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", "pt-original"]) == 0
    for file, role in (("model.pt", "student.weights"), ("model_ema_fp32.pt", "student.ema")):
        wanted = open_model(f"{run}:{role}").network.module.state_dict()
        network: Any = SPECS["transfer2.5"][0].build()
        place = str(tmp_path / "out" / file)
        load_into(network.module, read(place, network.module), place)
        found = network.module.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert torch.equal(wanted["base.patch_embed.proj.weight"], wanted["branches.edge.patch_embed_base.proj.weight"])
    one, other = (torch.load(tmp_path / "out" / name, weights_only=True) for name in ("model.pt", "model_ema_fp32.pt"))
    assert not torch.equal(one["net.x_embedder.proj.1.weight"], other["net.x_embedder.proj.1.weight"])


def test_what_is_one_learns_from_both_of_its_places(tmp_path: Path) -> None:
    """Held against upstream's two classes with weights of their own: the gradient is the sum of theirs."""
    from diffusers import CosmosControlNetModel, CosmosTransformer3DModel

    ours: Any = SPECS["transfer2.5"][0].build().module
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    base: Any = CosmosTransformer3DModel.from_config(ours.base.config)
    branch: Any = CosmosControlNetModel.from_config(ours.branches["edge"].config)
    base.load_state_dict(ours.base.state_dict())
    branch.load_state_dict(ours.branches["edge"].state_dict())
    draw = torch.Generator().manual_seed(3)
    x, hint = torch.randn(1, *SHAPE, generator=draw), torch.randn(1, *SHAPE, generator=draw)
    shared = {"timestep": torch.tensor([0.5]), "encoder_hidden_states": torch.randn(1, 3, 12, generator=draw)}
    shared |= {"condition_mask": torch.zeros(1, 1, *SHAPE[1:]), "padding_mask": torch.zeros(1, 1, *SHAPE[2:])}
    ours(hidden_states=x, controls={"edge": hint}, **shared)[0].square().mean().backward()
    residuals = branch(controls_latents=hint, latents=x, conditioning_scale=1.0, return_dict=False, **shared)[0]
    made = base(hidden_states=x, block_controlnet_hidden_states=residuals, return_dict=False, **shared)[0]
    made.square().mean().backward()
    for own, again in (("patch_embed", "patch_embed_base"), ("time_embed", "time_embed"), ("crossattn_proj",) * 2):
        for name, parameter in getattr(ours.base, own).named_parameters():
            first = getattr(base, own).get_parameter(name).grad
            second = getattr(branch, again).get_parameter(name).grad
            assert second.abs().max() > 0
            torch.testing.assert_close(parameter.grad, first + second, rtol=1e-4, atol=1e-6)


# --- the envelope, when the data are gone -----------------------------------------------------------------------------


def test_what_it_was_trained_on_is_known_without_the_data(tmp_path: Path) -> None:
    run = trained(tmp_path, Networks(student=Full(PREDICT2, init="random")), 8, 1e-3)
    wanted = {"latent_shape": list(SHAPE), "num_frames": None, "height": None, "width": None, "fps": 24.0}
    wanted |= {"guidance_in_teacher": None}
    assert json.loads((run / "student.json").read_text())["envelope"] == wanted
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("kind: mock", "kind: gone"))  # a data set of the user's, not here any more
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", "safetensors"]) == 0
    assert "| latents | 2 x 2 x 4 x 4 |" in (tmp_path / "out/README.md").read_text()
    for address in (tmp_path / "out", run):
        envelope = open_model(address).envelope
        assert (envelope.latent_shape, envelope.fps, envelope.num_inference_steps) == (SHAPE, 24.0, 35)


# --- adapters of a controlled network ---------------------------------------------------------------------------------


def test_adapters_of_a_controlled_network_are_named_as_in_the_classes_of_diffusers(tmp_path: Path) -> None:
    """The very files, loaded into upstream's two classes, answer as our merged student does."""
    from diffusers import CosmosControlNetModel, CosmosTransformer3DModel
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    nets = Networks(teacher=SPECS["transfer2.5"][0], student=Lora(rank=2, scale=2.0))
    run = trained(tmp_path, nets, 12, 0.5, ("edge",))
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", "lora"]) == 0
    base_file = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    branch_file = load_file(tmp_path / "out/controlnet_pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.") for name in base_file)
    assert all(name.startswith("control_blocks.") for name in branch_file)
    kohya = load_file(tmp_path / "out/kohya_lora.safetensors")
    assert all(name.startswith("lora_unet_transformer_blocks_") for name in kohya)
    assert "`controlnet_pytorch_lora_weights.safetensors`" in (tmp_path / "out/README.md").read_text()

    teacher: Any = open_model(f"{run}:teacher").network.module
    base: Any = CosmosTransformer3DModel.from_config(teacher.base.config)
    base.load_state_dict(teacher.base.state_dict())
    base.load_lora_adapter(base_file)
    branch: Any = CosmosControlNetModel.from_config(teacher.branches["edge"].config)
    branch.load_state_dict(teacher.branches["edge"].state_dict())
    targets = sorted({name.removesuffix(".lora_A.weight") for name in branch_file if name.endswith(".lora_A.weight")})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=targets), branch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Any = set_peft_model_state_dict(branch, branch_file)
    assert not found.unexpected_keys

    student: Any = open_model(str(run)).network.module
    draw = torch.Generator().manual_seed(3)
    x, hint = torch.randn(1, *SHAPE, generator=draw), torch.randn(1, *SHAPE, generator=draw)
    text, mask = torch.randn(1, 3, 12, generator=draw), torch.zeros(1, 1, *SHAPE[1:])
    shared = {"timestep": torch.tensor([0.5]), "encoder_hidden_states": text, "condition_mask": mask}
    shared["padding_mask"] = torch.zeros(1, 1, *SHAPE[2:])
    with torch.no_grad():
        wanted = student(hidden_states=x, controls={"edge": hint}, **shared)[0]
        unled = teacher(hidden_states=x, controls={"edge": hint}, **shared)[0]
        residuals = branch(controls_latents=hint, latents=x, conditioning_scale=1.0, return_dict=False, **shared)[0]
        answer = base(hidden_states=x, block_controlnet_hidden_states=residuals, return_dict=False, **shared)[0]
    torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-4)
    assert (wanted - unled).abs().max() > 1e-2  # they do something


def test_adapters_of_a_unet_are_named_as_pipelines_of_sdxl_read_them(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    spec = UnetSpec(
        widths=(8, 16), with_attention=(False, True), layers_per_block=1, transformer_layers=(1, 1), num_heads=(2, 2),
        norm_groups=4, text_dim=12, pooled_dim=None, sample_size=8,
    )  # fmt: skip
    run = trained(tmp_path, Networks(teacher=spec, student=Lora(rank=2)), 12, 0.5, shape=(4, 1, 8, 8))
    assert main(["export", str(run), "--out", str(tmp_path / "out"), "--format", "lora"]) == 0
    file = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") for name in file)
    teacher: Any = open_model(f"{run}:teacher").network.module
    plain: Any = UNet2DConditionModel.from_config(teacher.config)
    plain.load_state_dict(teacher.state_dict())
    plain.load_lora_adapter(file, prefix="unet")
    student: Any = open_model(str(run)).network.module
    draw = torch.Generator().manual_seed(3)
    asked = (torch.randn(1, 4, 8, 8, generator=draw), torch.tensor([500.0]), torch.randn(1, 3, 12, generator=draw))
    with torch.no_grad():
        wanted, before = student(*asked, return_dict=False)[0], teacher(*asked, return_dict=False)[0]
        torch.testing.assert_close(plain(*asked, return_dict=False)[0], wanted, rtol=0, atol=1e-4)
    assert (wanted - before).abs().max() > 1e-2
