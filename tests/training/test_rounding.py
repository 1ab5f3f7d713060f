"""A student of rounded weights: what its step is, what is saved, sampled and exported, and what it is worth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.cli import main
from fewstep.config import ConfigError, check
from fewstep.diffusion import Rng, StudentSampler, TeacherSampler
from fewstep.evaluation import energy_distance
from fewstep.inference.model import open_model
from fewstep.inference.synthetic import MixtureSamples, TeacherPairs
from fewstep.methods import KD
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.grid import Grid, on_grid
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.recipes.analytic import MIXTURE as EIGHT
from fewstep.recipes.analytic import STUDENT
from fewstep.training.ema import Ema
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.plan.plan import plan
from fewstep.training.role import TrainedRole
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer
from tests.export.test_export import NET, trained

MIXTURE = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))
TINY = TinySpec(width=64, depth=2)
GRIDS: tuple[Grid, ...] = ("int8", "int4", "float8")


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))


def run_of(name: str, grid: Grid | None, network: TinySpec = TINY, **trainer: Any) -> Run:
    return Run(
        job=Job(name=name),
        method=KD(),
        networks=Networks(student=Full(network, init="random", rounding=grid)),
        data=TeacherPairs(MIXTURE, num=512, sampler=TeacherSampler("heun", 8, shift=1.0)),
        optim=Optim(lr=1e-2),
        trainer=replace(Trainer(max_iter=6, batch_size=32, num_threads=1, log_every=1), **trainer),
        checkpoint=Checkpoint(save_iter=3, keep_last=9),
    )


def rounded(weights: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
    """Of a network all of whose matrices are weights of Linear layers."""
    return {name: on_grid(tensor, grid) if tensor.dim() == 2 else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_step_is_autograd_s_through_a_rounding_whose_derivative_is_one(grid: Grid, compute: torch.dtype) -> None:
    """Against three steps of float weights w, computed with rounded(w) + (w - w) of which the bracket alone has a gradient."""
    network: Any = build(Networks(TINY), ("teacher",), 0)["teacher"]
    role = TrainedRole("student", network, Optim(clip=None), None, compute, grid)
    twin: Any = TINY.build().module
    twin.load_state_dict({name: weight.detach() for name, weight in role.weights.items()})
    optimizer = Optim(clip=None).build(list(twin.parameters()))
    for group in optimizer.param_groups:
        group["lr"].fill_(1e-2)
    x, t = torch.randn(16, 2), torch.rand(16).double()
    for step in range(3):
        weights: dict[str, Tensor] = {}
        for name, weight in twin.named_parameters():
            weight.grad = None
            value = on_grid(weight, grid) if weight.dim() == 2 else weight.detach()
            weights[name] = value.to(compute) + (weight - weight.detach()).to(compute)
            assert torch.equal(role.live[name], weights[name])
        torch.func.functional_call(twin, weights, (x, t, Condition(), ()))[0].float().square().mean().backward()
        role.take_turn(True)
        network.module(x, t, Condition(), ())[0].float().square().mean().backward()
        role.absorb()
        for name, weight in role.weights.items():
            torch.testing.assert_close(weight.grad, twin.get_parameter(name).grad, rtol=0, atol=0)
        optimizer.step()
        role.step(1e-2, 0.0, step)
        assert all(torch.equal(weight, twin.get_parameter(name)) for name, weight in role.weights.items())


def test_int8_is_torch_s_own_fake_quantisation() -> None:
    weight = (torch.randn(8, 33) * torch.logspace(-2, 2, 8)[:, None]).requires_grad_()
    scale = torch.maximum(weight.detach().amax(1) / 127, weight.detach().amin(1) / -128)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(8, dtype=torch.int32), 0, -128, 127)
    torch.testing.assert_close(on_grid(weight, "int8"), theirs.detach(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(theirs.sum(), weight)
    assert bool((gradient == 1).all())  # nothing lies outside of this grid, so that straight through is through everywhere


@pytest.mark.parametrize("grid", GRIDS)
def test_float_weights_are_saved_and_resumed_and_rounded_ones_are_sampled_and_exported(grid: Grid, tmp_path: Path) -> None:
    train(run_of("whole", grid))
    train(run_of("part", grid, max_iter=3))
    train(run_of("part", grid))
    for part in ("student", "student.ema"):
        whole, resumed = read(f"fewstep/default/whole@6:{part}"), read(f"fewstep/default/part@6:{part}")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        on = rounded(whole, grid)
        assert any(float((on[name] - whole[name]).abs().max()) > 1e-4 for name in whole)
        model = open_model(f"fewstep/default/whole@6:{part}")
        assert all(torch.equal(tensor, on[name]) for name, tensor in model.network.module.state_dict().items())
    assert json.loads((tmp_path / "fewstep/default/whole/student.json").read_text())["rounding"] == grid
    out = tmp_path / "student"
    assert main(["export", "fewstep/default/whole", "--out", str(out), "--format", "safetensors"]) == 0
    exported = read(str(out / "student.safetensors"))
    assert all(torch.equal(exported[name], on[name]) for name in exported)  # `on` is that of the average
    assert "quantize_" in (out / "README.md").read_text()
    assert json.loads((out / "student.json").read_text())["rounding"] == grid
    again = rounded(exported, grid)
    assert all(torch.allclose(again[name], exported[name], rtol=3e-7, atol=0) for name in exported)


def test_a_dense_student_is_rounded_afterwards_by_export_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(run_of("dense", None, max_iter=3))
    out = tmp_path / "student"
    words = ["export", "fewstep/default/dense", "--out", str(out), "--rounding", "int4"]
    assert main(words) == 0
    average = read("fewstep/default/dense:student.ema")
    exported = read(str(out / "student.safetensors"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in rounded(average, "int4").items())
    train(run_of("int8", "int8", max_iter=3))
    for more, message in (
        (["export", "fewstep/default/int8", "--out", str(out), "--rounding", "int4"], "was trained with weights of int8"),
        ([*words, "--format", "delta"], "--format delta cannot hold weights that are rounded to int4"),
        ([*words[:-1], "int3"], "'int3' is not one of int8, int4, float8"),
    ):
        assert main(more) == 2
        assert message in " ".join(capfd.readouterr().err.split())


def test_diffusers_class_opens_the_rounded_weights(tmp_path: Path) -> None:
    run = trained(tmp_path, "cosmos", method=KD(), nets=Networks(student=Full(NET, init="random", rounding="int8")))
    out = tmp_path / "student"
    assert main(["export", str(run), "--out", str(out), "--format", "diffusers"]) == 0
    theirs = CosmosTransformer3DModel.from_pretrained(out / "transformer")
    ours = open_model(str(run)).network.module.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())
    for layer in theirs.modules():
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(on_grid(layer.weight, "int8"), layer.weight.detach(), rtol=3e-7, atol=0)


def test_what_cannot_be_rounded_is_refused_by_name() -> None:
    run = run_of("no", "int4")
    with pytest.raises(ConfigError, match=r"networks\.critic\.rounding: is for the student"):
        check(replace(run, networks=replace(run.networks, critic=Full(rounding="int4"))))
    with pytest.raises(ConfigError, match=r"student\.rounding: is for a student with weights of its own \(full\)"):
        check(replace(run, networks=Networks(TINY, student=Lora(rounding="int4"))))


def test_the_plan_counts_the_rounded_weights_beside_the_float_ones() -> None:
    dense, run = plan(run_of("plan", None)), run_of("plan", "int4")
    both = plan(run)
    module: nn.Module = TINY.build().module
    size, tables = (sum(tensor.nbytes for tensor in tensors) for tensors in (module.parameters(), module.buffers()))
    linear = sum(layer.weight.nbytes for layer in module.modules() if isinstance(layer, nn.Linear))
    assert dense.parts["student.weights"] == size + tables and "student.master" not in dense.parts
    assert both.parts["student.master"] == size and both.parts["student.weights"] == linear + tables
    for precision in ("fp32", "bf16"):  # FSDP keeps fp32 shards of both
        sharded = replace(run, parallel=Parallel("fsdp"), trainer=replace(run.trainer, precision=precision))
        parts = plan(sharded, gpus=2).parts
        assert parts["student.master"] == size / 2
        assert parts["student.weights"] == pytest.approx((linear + tables) / 2, rel=0.02)


@pytest.mark.slow
def test_a_student_that_knows_its_four_bits_is_nearer_than_one_rounded_afterwards(tmp_path: Path) -> None:
    """Energy distance to the data: a dense student, the same rounded by export, and one trained so; 8 Gaussians, one call."""
    reference = MixtureSamples(EIGHT, num=8192, seed=78).open().batch(torch.arange(8192)).x0
    assert reference is not None

    def distance(address: str) -> float:
        model, rng = open_model(address), Rng(5, rows=range(8192))
        assert isinstance(model.sampler, StudentSampler)
        with torch.no_grad():
            return float(energy_distance(model.sampler(model.network, rng.normal((2,)), Condition(), rng), reference))

    rows: dict[str, list[float]] = {}
    for seed in range(3):
        for grid in (None, *GRIDS):
            run = run_of(f"{grid}_{seed}", grid, STUDENT, max_iter=600, batch_size=256, seed=seed, log_every=600)
            run = replace(run, optim=Optim(lr=2e-3, schedule="cosine", warmup_iters=50), ema=Ema(beta=0.98))
            run = replace(run, data=TeacherPairs(EIGHT, num=32768), checkpoint=Checkpoint(save_iter=600))
            train(run)
            rows.setdefault(str(grid), []).append(distance(f"fewstep/default/{grid}_{seed}"))
        for grid in GRIDS:
            out = str(tmp_path / f"{grid}_{seed}")
            assert main(["export", f"fewstep/default/None_{seed}", "--out", out, "--rounding", grid]) == 0
            rows.setdefault(f"{grid} afterwards", []).append(distance(out))
    for name, distances in rows.items():
        print(f"{name}: {', '.join(f'{value:.5f}' for value in distances)}")
    for grid in ("int4", "float8"):
        assert max(rows[grid]) < 0.5 * min(rows[f"{grid} afterwards"])
    assert max(rows["int4"]) < 0.003 and min(rows["int4 afterwards"]) > 0.008
