"""Two gloo processes against one: the layout changes speed only.

What differs: the sum of the ranks' mean gradients is taken in another order than the mean over the whole batch, and Adam of
sharded weights on a CPU is not the fused one. Both are roundings of fp32, 1e-7 of a value; Adam's first steps, which divide a
gradient by its own size, make 1e-6 of it in a weight.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.networks.weights.addresses import read_tensors

WORKER = '''
import os, sys, json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from fewstep.batch import Batch, Condition
from fewstep.config import kind, recipe
from fewstep.diffusion import Prediction, RectifiedFlow, Rng, TeacherSampler
from fewstep.diffusion.path import AnyPath
from fewstep.diffusion.times import Listed
from fewstep.inference.synthetic import InMemory, MixtureSamples, TeacherPairs
from fewstep.methods import DMD2, KD, LADD, AverageVelocity, Finetune, FlowMap, Gan, StudentSample, Terms
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.contract import NetworkDefaults, NetworkSpec
from fewstep.networks.heads import MultiscaleSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.ema import Ema
from fewstep.training.health import Alarm, Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

MIXTURE = MixtureSpec(means=((1.0, 0.0), (-1.0, 0.5)), stds=(0.2, 0.3))
MLP = TinySpec(width=24, depth=2)
DIT = TinySpec(architecture="dit", channels=2, width=24, depth=2, num_heads=2, text_dim=3)  # text weights that nobody uses

@kind("layout_latents", group="data")
@dataclass(frozen=True)
class Latents:
    fields = frozenset({"x0"})
    def open(self):
        return InMemory(Batch(x0=Rng(5, 0, range(40)).normal((2, 2, 3, 3))))

@kind("layout_mean", group="preview")
@dataclass(frozen=True)
class MeanOfSamples:
    """A look with the average between two steps: what is gathered for it must not be trained on."""
    every: int | None = 2
    def show(self, scene):
        shape = (2, 2, 3, 3) if scene.student.module.enter.in_features == 3 else (2,)
        rng = Rng(9, 0, range(16), scene.device)
        made = scene.sampler(scene.student, rng.normal(shape), Condition(), rng)
        if scene.teacher is not None:
            weights = list(scene.teacher.module.parameters())
            local = sum(w.to_local().numel() if isinstance(w, DTensor) else w.numel() for w in weights)
            print("TEACHER", scene.folder.parent.name, local, sum(w.numel() for w in weights))
        return {"score": float(made.abs().mean())}

class Probe(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.block = nn.Linear(2, 2)
    def forward(self, x, t):
        SEEN.append((sorted(set(t.double().tolist())), str(self.layer.weight.dtype)))
        return self.block(self.layer(x.to(self.layer.weight.dtype)))
SEEN = []

@dataclass(frozen=True)
class ProbeNetwork(NetworkDefaults):
    module: Probe
    path: Any
    blocks: tuple[nn.Module, ...] = ()
    def __call__(self, x_t, t, cond, *, taps=(), cache=None):
        return Prediction(x_t, t, self.path, self.module(x_t, t).float())

@kind("layout_probe", group="network")
@dataclass(frozen=True)
class ProbeSpec(NetworkSpec):
    path: AnyPath = field(default_factory=RectifiedFlow)
    def build(self):
        module = Probe()
        return ProbeNetwork(module, self.path, (module.block,))

@kind("layout_bad_rank", group="method")
@dataclass(frozen=True)
class BadRank(Finetune):
    """One rank's loss is no number, in a way that reaches no gradient and so no other rank."""
    def losses(self, turn, nets, batch, rng):
        for terms in super().losses(turn, nets, batch, rng):
            bad = rng.step == 2 and int(rng.rows.min()) > 0
            yield Terms.of(denoising=terms.values["denoising"] + (torch.tensor(float("inf")) if bad else 0.0))

def full(spec):
    return Full(spec, init="random")

NETS = {
    "mlp": Networks(MIXTURE, full(MLP), full(MLP)),
    "dit": Networks(DIT, Full(), full(DIT)),  # a twin of a frozen tiny teacher, and a critic that knows nothing yet
    "head": Networks(DIT, Full(), full(DIT), head=MultiscaleSpec(taps=(0, 1), channels=24, hidden=16)),
    "map": Networks(MIXTURE, full(replace(MLP, end_time=True))),
    "lora": Networks(DIT, Lora(rank=2, train=("enter",)), Lora(rank=3)),  # adapters over one frozen network
    "grid": Networks(DIT, Full(rounding="int8"), full(DIT)),  # a student of rounded weights
}
TWO_STEPS = StudentSample((1.0, 0.6))
METHODS = {
    "finetune": (Finetune(), MixtureSamples(MIXTURE, num=100)),
    "kd": (KD(), TeacherPairs(MIXTURE, num=100, sampler=TeacherSampler("heun", 8, shift=1.0))),
    "dmd2": (DMD2(student=TWO_STEPS, student_update_freq=2), MixtureSamples(MIXTURE, num=100)),
    # features of a frozen teacher, through which the student's gradient goes; and of a critic, which the head trains too
    "gan": (DMD2(student=TWO_STEPS, student_update_freq=2, gan=Gan(weight=0.3)), None),
    "trunk": (DMD2(student=TWO_STEPS, student_update_freq=2, gan=Gan(weight=0.3, features="critic", r1_weight=0.5)), None),
    "ladd": (LADD(student=TWO_STEPS), None),
    # its losses are scaled to the mean of those of some of the rows, wherever these are
    "flow_map": (FlowMap(AverageVelocity(source="data", weighting="anyflow")), MixtureSamples(MIXTURE, num=100)),
}

def make(name, method, net, mode, size, num_replicas=None, **trainer):
    algorithm, data = METHODS[method]
    if net in ("dit", "head", "lora", "grid"):
        data = Latents()
        assert method != "kd"
    return Run(
        job=Job(name=name),
        method=algorithm,
        networks=NETS[net],
        data=data,
        optim=Optim(lr=1e-3, clip=0.3, weight_decay=0.1),
        ema=Ema("power"),
        trainer=replace(Trainer(max_iter=6, batch_size=8 // size, num_threads=1, log_every=1), **trainer),
        parallel=Parallel(mode=mode, device="cpu", num_replicas=num_replicas, timeout_s=60),
        checkpoint=Checkpoint(save_iter=3 if (method, net) == ("dmd2", "dit") else 6, keep_last=9),
        preview=MeanOfSamples(),
        health=Health(every=3, num=8, reference_calls=4, collapse=Alarm(0.0), drift=Alarm(99.0), critic_lag=Alarm(1e9)),
    )

CASES = [("kd", "mlp"), ("dmd2", "mlp"), ("flow_map", "map"), ("finetune", "dit"), ("dmd2", "dit"), ("dmd2", "lora")]
CASES += [("dmd2", "grid"), *((method, "head") for method in ("gan", "trunk", "ladd"))]
RUNS = {f"one_{m}_{n}": make(f"one_{m}_{n}", m, n, "ddp", 1) for m, n in CASES}
for mode in ("ddp", "fsdp"):
    RUNS |= {f"{mode}_{m}_{n}": make(f"{mode}_{m}_{n}", m, n, mode, 2) for m, n in CASES}
RUNS["hsdp_dmd2_dit"] = make("hsdp_dmd2_dit", "dmd2", "dit", "fsdp", 2, num_replicas=2)
everything = make("fsdp_everything", "dmd2", "dit", "fsdp", 2, batch_size=2, grad_accum=2, checkpointing=True)
RUNS["fsdp_everything"] = replace(everything, checkpoint=Checkpoint(save_iter=3, async_write=True))
for net in ("lora", "grid"):
    name = f"fsdp_everything_{net}"
    offloads = METHODS["dmd2"][0].roles if net == "grid" else ()
    RUNS[name] = make(
        name, "dmd2", net, "fsdp", 2, batch_size=2, grad_accum=2, checkpointing=True, offload_activations=offloads
    )
probe = replace(
    make("fsdp_probe", "finetune", "mlp", "fsdp", 2, precision="bf16"),
    networks=Networks(student=full(ProbeSpec())), preview=None, health=Health(), method=Finetune(times=Listed((0.999, 0.5))),
)
RUNS["fsdp_probe"] = probe
for mode in ("one", "ddp", "fsdp"):
    RUNS[f"{mode}_bf16"] = make(
        f"{mode}_bf16", "dmd2", "dit", "ddp" if mode == "one" else mode, 1 if mode == "one" else 2, precision="bf16"
    )
for mode in ("ddp", "fsdp"):
    RUNS[f"{mode}_bad"] = replace(make(f"{mode}_bad", "finetune", "mlp", mode, 2), method=BadRank())

def with_layout(base, name, mode, size):
    run = RUNS[base]
    return replace(run, job=Job(name=name), parallel=replace(run.parallel, mode=mode),
                   trainer=replace(run.trainer, batch_size=8 // size))

@recipe("layout_toy")
def layout_toy():
    return make("layout_toy", "finetune", "mlp", "fsdp", 2, max_iter=10)

if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    from fewstep.training.loop import train
    ports = json.loads(os.environ["PORTS"])
    for port, word in zip(ports, sys.argv[1:]):
        os.environ["MASTER_PORT"] = str(port)
        name, _, base = word.partition("=")
        run = RUNS[name] if not base else with_layout(*base.split(",")[:1], name, base.split(",")[1], 2)
        try:
            train(run)
        except Exception as error:
            print(f"{name} rank {os.environ['RANK']}: {type(error).__name__}: {error}", file=sys.stderr)
        if name == "fsdp_probe":
            print("SEEN", json.dumps(SEEN))
'''


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Desk:
    """The worker file, a folder for the runs, and two processes when they are wanted."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "worker.py"
        self.file.write_text(WORKER)
        self.root = folder / "out"

    def module(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("fewstep_test_worker", self.file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    def on_two(self, *words: str) -> list[tuple[str, str]]:
        """Trains the named runs one after the other on two processes: what each rank said on stdout and stderr."""
        common = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OUTPUT_ROOT": str(self.root), "OMP_NUM_THREADS": "1"}
        common |= {"PORTS": json.dumps(free_ports(len(words)))}
        processes = [
            subprocess.Popen(
                [sys.executable, str(self.file), *words],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            said = [process.communicate(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert [process.returncode for process in processes] == [0, 0], said
        return said

    def tensors(self, name: str, step: int = 6) -> dict[str, Tensor]:
        return read_tensors(self.root / "fewstep" / "default" / name / "checkpoints" / f"iter_{step:09d}", "")

    def lines(self, name: str) -> list[dict[str, float]]:
        path = self.root / "fewstep" / "default" / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]


CASES = [
    "kd_mlp",
    "dmd2_mlp",
    "flow_map_map",
    "finetune_dit",
    "dmd2_dit",
    "dmd2_lora",
    "dmd2_grid",
    "gan_head",
    "trunk_head",
    "ladd_head",
]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Everything that is trained from the beginning, once."""
    desk = Desk(tmp_path_factory.mktemp("layouts"))
    names = [f"{mode}_{case}" for mode in ("ddp", "fsdp") for case in CASES]
    names += [
        "hsdp_dmd2_dit",
        "fsdp_everything",
        "fsdp_everything_lora",
        "fsdp_everything_grid",
        "fsdp_probe",
        "ddp_bf16",
        "fsdp_bf16",
    ]
    names += ["ddp_bad", "fsdp_bad"]
    desk.said = desk.on_two(*names)  # type: ignore[attr-defined]
    module = desk.module()
    before = os.environ.get("OUTPUT_ROOT")
    os.environ["OUTPUT_ROOT"] = str(desk.root)
    try:
        for name, run in module.RUNS.items():
            if name.startswith("one_"):
                train_alone(run)
        yield desk
    finally:
        if before is None:
            del os.environ["OUTPUT_ROOT"]
        else:
            os.environ["OUTPUT_ROOT"] = before


def train_alone(run: Any) -> None:
    from fewstep.training.loop import train

    train(run)


def assert_like(desk: Desk, name: str, reference: str, weights: float = 3e-6, losses: float = 2e-6) -> None:
    lines, want = desk.lines(name), desk.lines(reference)
    assert [line["step"] for line in lines] == [line["step"] for line in want] == list(range(7))
    for line, other in zip(lines, want, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"samples_per_s", "memory_gib", "data/wait_share", "derivative_error"}:
            bound = 20 * losses if key.startswith(("health/", "score")) else losses
            assert line[key] == pytest.approx(other[key], rel=bound, abs=bound), (line["step"], key)
    mine, theirs = desk.tensors(name), desk.tensors(reference)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, theirs[key], rtol=weights, atol=weights, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(desk: Desk, mode: str, case: str) -> None:
    assert_like(desk, f"{mode}_{case}", f"one_{case}")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("hsdp_dmd2_dit", "one_dmd2_dit"),
        ("fsdp_everything", "one_dmd2_dit"),
        ("fsdp_everything_lora", "one_dmd2_lora"),
        ("fsdp_everything_grid", "one_dmd2_grid"),
    ],
)
def test_and_so_do_the_other_layouts(desk: Desk, name: str, reference: str) -> None:
    """Replicas of shards; accumulation, recomputed blocks, activations on the host, checkpoints in the background at once."""
    assert_like(desk, name, reference)


def test_a_role_on_a_shared_backbone_saves_its_adapters_and_nothing_else(desk: Desk) -> None:
    for layout in ("one", "ddp", "fsdp"):
        saved = [name for name in desk.tensors(f"{layout}_dmd2_lora") if ".optim." not in name]
        own = {name.split(".", 2)[2] for name in saved}
        assert {name.split(".lora_")[0] for name in own if ".lora_" in name} >= {"blocks.0.qkv", "blocks.1.mlp.2"}
        assert {name for name in own if ".lora_" not in name} == {"enter.weight", "enter.bias"}


def test_weights_that_nothing_depends_on_stay_in_every_layout(desk: Desk) -> None:
    """With weight decay, a gradient of 0 in place of none would shrink them."""
    last, first = desk.tensors("fsdp_dmd2_dit"), desk.module().DIT
    idle = [name for name in last if name.startswith("student.weights.") and ("key_value" in name or "query" in name)]
    assert idle and first.text_dim
    early = desk.tensors("fsdp_dmd2_dit", 3)
    assert all(torch.equal(last[name], early[name]) for name in idle)
    moving = [name for name in last if name.startswith("student.weights.") and "qkv" in name]
    assert not any(torch.equal(last[name], early[name]) for name in moving)


def test_a_frozen_teacher_is_sharded_too(desk: Desk) -> None:
    for mode, part in (("fsdp", 0.5), ("hsdp", 1.0), ("ddp", 1.0)):
        held = [0, 0]
        for out, _ in desk.said:  # type: ignore[attr-defined]
            line = next(line for line in out.splitlines() if line.startswith(f"TEACHER {mode}_dmd2_dit "))
            local, whole = (int(word) for word in line.split()[2:])
            assert local == pytest.approx(part * whole, rel=0.05)
            held = [held[0] + local, whole]
        assert held[0] >= held[1] > 1000


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_bf16_differs_by_its_own_rounding_only(desk: Desk, mode: str) -> None:
    assert_like(desk, f"{mode}_bf16", "one_bf16", weights=2e-3, losses=3e-2)


def test_a_time_is_not_rounded_under_fsdp(desk: Desk) -> None:
    """By default FSDP2 casts what a module is given: 0.999 would be 1.0 in bf16."""
    for out, _ in desk.said:  # type: ignore[attr-defined]
        seen = json.loads(next(line for line in out.splitlines() if line.startswith("SEEN"))[5:])
        assert seen
        for times, dtype in seen:
            assert set(times) <= {0.999, 0.5} and dtype == "torch.bfloat16"
        assert any(0.999 in times for times, _ in seen)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_number_that_is_none_on_one_rank_stops_all_and_names_it(desk: Desk, mode: str) -> None:
    for rank, (_, told) in enumerate(desk.said):  # type: ignore[attr-defined]
        line = next(line for line in told.splitlines() if line.startswith(f"{mode}_bad rank {rank}"))
        assert "Diverged: iteration 2, student turn" in line
        assert "loss term 'denoising' is inf (rank 1)" in line


# --- checkpoints across layouts ---------------------------------------------------------------------------------------


WAYS = [("one", "fsdp"), ("ddp", "one"), ("ddp", "fsdp"), ("fsdp", "one"), ("fsdp", "ddp"), ("fsdp", "fsdp")]


@pytest.fixture(scope="module")
def continued(desk: Desk) -> Desk:
    """A layout's checkpoint after 3 iterations, gone on with in another to 6."""
    module = desk.module()
    jobs = desk.root / "fewstep" / "default"
    words = []
    for origin, mode in WAYS:
        name = f"{origin}_to_{mode}"
        source = jobs / f"{origin}_dmd2_dit" / "checkpoints" / "iter_000000003"
        shutil.copytree(source, jobs / name / "checkpoints" / "iter_000000003")
        if mode == "one":
            train_alone(module.with_layout("one_dmd2_dit", name, "ddp", 1))
        else:
            words.append(f"{name}=one_dmd2_dit,{mode}")
    desk.on_two(*words)
    return desk


@pytest.mark.parametrize("origin", ["one", "ddp", "fsdp"])
def test_a_checkpoint_is_the_same_whoever_wrote_it(desk: Desk, origin: str) -> None:
    mine, theirs = desk.tensors(f"{origin}_dmd2_dit", 3), desk.tensors("one_dmd2_dit", 3)
    assert mine.keys() == theirs.keys()
    assert {name: tensor.shape for name, tensor in mine.items()} == {name: tensor.shape for name, tensor in theirs.items()}
    assert {".".join(name.split(".")[:2]) for name in mine} == {
        "student.weights", "student.ema", "student.optim", "critic.weights", "critic.optim",
    }  # fmt: skip


@pytest.mark.parametrize(("origin", "mode"), WAYS)
def test_a_run_goes_on_in_another_layout(continued: Desk, origin: str, mode: str) -> None:
    name = f"{origin}_to_{mode}"
    mine, theirs = continued.tensors(name), continued.tensors("one_dmd2_dit")
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=3e-6, atol=3e-6, msg=lambda text, key=key: f"{key}: {text}")
    if origin == mode:  # and in its own with the same bits
        original = continued.tensors(f"{origin}_dmd2_dit")
        assert all(torch.equal(mine[key], original[key]) for key in mine)


def test_every_tensor_loads_on_one_as_it_was_written_on_two(desk: Desk) -> None:
    """Read back through a run's own load, not through the reader of whole tensors."""
    from fewstep.training.loop import train

    module = desk.module()
    jobs = desk.root / "fewstep" / "default"
    source = jobs / "fsdp_dmd2_dit" / "checkpoints" / "iter_000000006"
    run = replace(module.with_layout("one_dmd2_dit", "loaded", "ddp", 1), preview=None)
    shutil.copytree(source, jobs / "loaded" / "checkpoints" / "iter_000000006")
    train(replace(run, trainer=replace(run.trainer, max_iter=7), optim=replace(run.optim, lr=1e-12)))
    mine, theirs = desk.tensors("loaded", 7), desk.tensors("fsdp_dmd2_dit", 6)
    for key in theirs:
        if ".weights." in key:
            assert float((mine[key] - theirs[key]).abs().max()) < 1e-9, key


# --- torchrun itself --------------------------------------------------------------------------------------------------


def test_the_command_under_torchrun_and_a_signal_to_one_rank(tmp_path: Path) -> None:
    """One rank is asked to end: all do, after a checkpoint; the same command on one process ends the run."""
    desk = Desk(tmp_path)
    wait = "import time; import fewstep.inference.synthetic as s; b = s.InMemory.batch\n"
    wait += "s.InMemory.batch = lambda self, index: (time.sleep(0.05), b(self, index))[1]\n"
    desk.file.write_text(wait + WORKER)
    words = ["--config", str(desk.file), "experiment=layout_toy", "trainer.max_iter=200"]
    environment = os.environ | {"OUTPUT_ROOT": str(desk.root), "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "fewstep.train",
        *words,
    ]
    process = subprocess.Popen(launch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = desk.root / "fewstep" / "default" / "layout_toy" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 90
        while not metrics.is_file() or len(metrics.read_text().splitlines()) < 5:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGTERM)
        told, _ = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "is saved in" in told and "The same command goes on from there" in told
    checkpoints = metrics.parent / "checkpoints"
    step = int((checkpoints / "latest_checkpoint.txt").read_text().removeprefix("iter_"))
    assert 4 <= step < 60
    again = [*words[:-1], f"trainer.max_iter={step + 2}", "trainer.batch_size=8"]
    done = subprocess.run([sys.executable, "-m", "fewstep.train", *again], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"(iteration {step})" in done.stderr
    assert json.loads((metrics.parent / "summary.json").read_text())["samples"] == 8 * (step + 2)


@pytest.mark.slow
def test_two_machines_train_what_one_process_trains(tmp_path: Path) -> None:
    """The command of docs/install.md on two agents of torchrun, each of which counts as a machine; a whole copy on each."""
    desk = Desk(tmp_path)
    desk.file.write_text(WORKER)
    (port,) = free_ports(1)
    environment = os.environ | {"OUTPUT_ROOT": str(desk.root), "OMP_NUM_THREADS": "1"}
    words = ["-m", "fewstep.train", "--config", str(desk.file), "experiment=layout_toy", "trainer.max_iter=6"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    torchrun += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", *words, "job.name=two_machines"]
    machines = [
        subprocess.Popen(
            [*torchrun, "parallel.num_replicas=2"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [machine.communicate(timeout=240)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
            machine.wait()
    assert [machine.returncode for machine in machines] == [0, 0], said
    alone = [sys.executable, *words, "job.name=alone", "parallel.mode=ddp", "trainer.batch_size=8"]
    done = subprocess.run(alone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_like(desk, "two_machines", "alone")
