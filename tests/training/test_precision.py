"""bf16 is the precision of compute: weights, Adam's state and the average are fp32 and move; times are never rounded."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Prediction, RectifiedFlow
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.times import Listed
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import Finetune
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.contract import NetworkDefaults, NetworkSpec
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training import ema
from fewstep.training.ema import Ema
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer

MIXTURE = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))


@pytest.fixture(autouse=True)
def output_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))


@kind("precision_small_weights", group="network")
@dataclass(frozen=True)
class SmallWeights(NetworkSpec):
    """A tiny network whose weights are of size 0.02, as those of a large one are."""

    width: int = 64
    path: AnyPath = field(default_factory=RectifiedFlow)

    def build(self) -> Any:
        network = TinySpec(width=self.width, depth=2, path=self.path).build()
        for parameter in network.module.parameters():
            nn.init.normal_(parameter, std=0.02)
        return network


def run_of(name: str, network: Any, **trainer: Any) -> Run:
    return Run(
        job=Job(name=name),
        method=Finetune(times=Listed((0.999, 0.5))),
        networks=Networks(student=Full(network, init="random")),
        data=MixtureSamples(MIXTURE, num=512),
        optim=Optim(lr=1e-5, clip=None),
        ema=Ema(beta=0.9999),
        trainer=replace(Trainer(max_iter=20, batch_size=32, num_threads=1), **trainer),
        checkpoint=Checkpoint(save_iter=1, keep_last=99),
    )


def share_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    moved = torch.cat([(before[name] != after[name]).flatten() for name in before])
    return float(moved.float().mean())


def test_weights_move_at_a_small_rate_where_those_of_a_bf16_run_stand_still() -> None:
    run = run_of("bf16", SmallWeights(), precision="bf16")
    train(run)
    folder = run.job.folder()
    torch.manual_seed(0)
    ours = share_moved(read(f"{folder}@1:student"), read(f"{folder}@20:student"))

    # the same network, data and rate, with weights and Adam's state in bf16: what 31 recipes of FastGen do
    module = SmallWeights().build().module.to(torch.bfloat16)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    adamw = torch.optim.AdamW(module.parameters(), lr=1e-5)
    data = run.data.open()
    for step in range(20):
        x0 = data.batch(torch.arange(32) + 32 * (step % 16)).x0
        assert x0 is not None
        t, eps = torch.where(torch.arange(32) < 16, 0.999, 0.5), torch.randn(32, 2)
        x_t = (1 - t)[:, None] * x0 + t[:, None] * eps
        raw, _ = module(x_t, torch.atan2(t, 1 - t).double(), Condition(), ())
        loss = (raw.float() - (eps - x0)).square().mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    theirs = share_moved(start, {name: parameter.detach() for name, parameter in module.named_parameters()})
    print(f"share of weights that moved in 20 steps at lr 1e-5: fp32 master weights {ours:.3f}, bf16 weights {theirs:.3f}")
    assert ours > 0.95
    assert theirs < 0.3

    averages = [read(f"{folder}@{step}:student.ema") for step in (1, 20)]
    assert share_moved(*averages) > 0.95


def test_everything_that_is_saved_is_fp32() -> None:
    run = run_of("saved", SmallWeights(), precision="bf16", max_iter=2)
    train(run)
    found = FileSystemReader(run.job.folder() / "checkpoints" / "iter_000000002").read_metadata().state_dict_metadata
    assert {about.properties.dtype for about in found.values()} == {torch.float32}  # type: ignore[union-attr]


def test_an_average_at_beta_9999_follows_its_closed_form() -> None:
    """Weights of 0.02 that drift by 1e-5 an update; a bf16 average of them does not move at all."""
    beta, drift, updates = Ema(beta=0.9999).beta_at(10**6), 1e-5, 2000
    assert beta == 0.9999
    weight = torch.full((8,), 0.02)
    fp32, bf16 = {"w": weight.clone()}, {"w": weight.bfloat16()}
    for n in range(1, updates + 1):
        ema.update(fp32, {"w": weight + drift * n}, beta)
        ema.update(bf16, {"w": (weight + drift * n).bfloat16()}, beta)
    # sum over n of (1 - beta) beta^(N - n) (w + d n), plus beta^N w  =  w + d (N - beta (1 - beta^N) / (1 - beta))
    want = 0.02 + drift * (updates - beta * (1 - beta**updates) / (1 - beta))
    moved = want - 0.02
    print(f"average moved by {float(fp32['w'][0]) - 0.02:.3e} of {moved:.3e} in fp32, {float(bf16['w'][0]) - 0.02:.3e} in bf16")
    assert float(fp32["w"][0]) - 0.02 == pytest.approx(moved, rel=0.02)
    assert float(bf16["w"][0]) == float(weight.bfloat16()[0])


def test_bf16_starts_from_the_weights_as_they_were_read() -> None:
    """Rounding them at the start would change what a student inherits from its teacher, before the first step."""
    run = run_of("start", SmallWeights(), precision="bf16", max_iter=1)
    train(replace(run, optim=Optim(lr=1e-12, weight_decay=0.0)))
    built = build(run.networks, ["student"], 0)["student"].module.state_dict()
    kept = read(f"{run.job.folder()}:student")
    assert max(float((built[name] - kept[name]).abs().max()) for name in kept) < 1e-10
    assert max(float((tensor - tensor.bfloat16().float()).abs().max()) for tensor in kept.values()) > 1e-5


def test_a_bf16_run_follows_the_fp32_one() -> None:
    said = {}
    for precision in ("fp32", "bf16"):
        run = run_of(precision, SmallWeights(), precision=precision, max_iter=300, log_every=50)
        said[precision] = train(replace(run, optim=Optim(lr=3e-3), checkpoint=Checkpoint(save_iter=300)))["loss/denoising"]
    assert said["bf16"] == pytest.approx(said["fp32"], rel=0.1)


# --- the cast trap ----------------------------------------------------------------------------------------------------

SEEN: list[tuple[Tensor, torch.dtype]] = []


class Probe(nn.Module):
    """Remembers the time it is given, and the type of its weights while it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        SEEN.append((t.detach().clone(), self.layer.weight.dtype))
        return self.layer(x.to(self.layer.weight.dtype))


@dataclass(frozen=True)
class ProbeNetwork(NetworkDefaults):
    module: Probe
    path: Any
    blocks: tuple[nn.Module, ...] = ()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Any = None) -> Prediction:
        return Prediction(x_t, t, self.path, self.module(x_t, t).float())

    def new_cache(self, like: Tensor) -> Any:
        raise ValueError


@kind("precision_probe", group="network")
@dataclass(frozen=True)
class ProbeSpec(NetworkSpec):
    path: AnyPath = field(default_factory=RectifiedFlow)

    def build(self) -> ProbeNetwork:
        return ProbeNetwork(Probe(), self.path)


def test_a_time_is_never_rounded_to_bf16() -> None:
    assert float(torch.tensor(0.999).bfloat16()) == 1.0  # the trap
    SEEN.clear()
    run = run_of("trap", ProbeSpec(), precision="bf16", max_iter=3)
    train(run)
    assert {dtype for _, dtype in SEEN} == {torch.bfloat16}
    times = torch.cat([t for t, _ in SEEN]).double()
    assert set(times.tolist()) == {0.999, 0.5}
