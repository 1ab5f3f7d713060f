"""Losses and gradients of two iterations in several layouts, each against one process.

    python tests/parallel/context_worker.py METHOD.NETWORK.ROLES[=LAYOUT,..] .. [--quick]

The processes are forked from this one, so that everything is imported once. Every layout is tried with and without recomputed
blocks and accumulation. Prints one line of JSON for each.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.batch import Batch, Condition
from fewstep.diffusion import Rng
from fewstep.methods import DMD2, KD, SCM, Finetune, Gan, SelfForcing, StudentSample
from fewstep.networks.causal_attention import Causality
from fewstep.networks.contract import AnyNetwork
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.heads import MultiscaleSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.parallel import World, leave_world, local
from fewstep.training import iteration
from fewstep.training.crew import assemble
from fewstep.training.ema import Ema
from fewstep.training.optim import Optim
from fewstep.training.run import Job, Parallel, Run, Trainer

ALONE = World(0, 1, torch.device("cpu"), None)
NUM = 4  # samples of an iteration
FRAMES, SIDES = 3, (6, 6)  # of latents: 27 tokens, which two processes cannot share evenly

SMALL: dict[str, Any] = {"latent_channels": 4, "num_heads": 3, "head_dim": 12, "num_layers": 2, "text_dim": 12}
COSMOS: dict[str, Any] = {**SMALL, "mlp_ratio": 2, "adaln_lora_dim": 4, "max_size": (4, 8, 8)}
CONTROL: dict[str, Any] = {**COSMOS, "num_control_blocks": 1, "hint_channels": 8, "learnable_positions": True}
NETWORKS: dict[str, AnyNetwork] = {
    "cosmos": CosmosSpec(**COSMOS),
    "transfer1": CosmosControlSpec(style="transfer1", family="edm", sigma_data=0.5, **CONTROL),
    "transfer25": CosmosControlSpec(**CONTROL),
    "wan": WanSpec(ffn_dim=32, freq_dim=16, text_tokens=7, **SMALL),
}
HEAD = MultiscaleSpec(taps=(0, 1), channels=36, hidden=16)
GAN = Gan(weight=0.3, features="critic")
METHODS: dict[str, Any] = {
    "finetune": Finetune(),
    "given": Finetune(first_frames=(0.0, 0.5, 0.5)),  # a time for every frame
    "kd": KD(),
    "dmd2": DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=2, gan=GAN),
    "dmd2_r1": DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=2, gan=replace(GAN, r1_weight=0.5, r1_std=0.5)),
    "dmd2_edm": DMD2(student=StudentSample((80.0, 5.0)), student_update_freq=2, gan=GAN),
    "scm": SCM(),
    "self_forcing": SelfForcing(student_update_freq=2),
}
LAYOUTS = {  # name: processes, settings
    "ddp": (2, Parallel("ddp")),
    "fsdp": (2, Parallel("fsdp")),
    "hsdp": (2, Parallel("fsdp", num_replicas=2)),
    "context": (2, Parallel("ddp", context=2)),
    "fsdp_context": (4, Parallel("fsdp", context=2)),
}


IS_QUICK = "--quick" in sys.argv  # two of the settings
NO_DATA: Any = None  # batches are made here
SETTINGS: list[dict[str, Any]] = [
    {"checkpointing": checkpointing, "grad_accum": accum} for checkpointing in (False, True) for accum in (1, 2)
]


@dataclass(frozen=True)
class Iteration:
    """Losses and whole gradients of every turn."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def make(case: str, parallel: Parallel, **trainer: Any) -> Run:
    method, network, roles = case.split(".")
    spec = NETWORKS[network]
    causal = Causality(chunk=1, span=3) if method == "self_forcing" else None
    if roles == "lora":
        student, critic = Lora(rank=2, causal=causal), Lora(rank=3)
    else:
        student, critic = Full(causal=causal), Full(spec, init="random")
    return Run(
        job=Job(name=case),
        method=METHODS[method],
        networks=Networks(spec, student, critic, head=HEAD if method.startswith("dmd2") else None),
        data=NO_DATA,
        optim=Optim(lr=1e-3),
        ema=Ema("none"),
        trainer=Trainer(max_iter=2, **trainer),
        parallel=replace(parallel, device="cpu", timeout_s=60),
    )


def the_batch(run: Run) -> Batch:
    rng = Rng(5, 0, range(NUM))
    shape = (4, FRAMES, *SIDES)
    assert run.networks.teacher is not None
    control = {name: rng.normal(shape) for name in run.networks.teacher.control_branches}
    text = rng.normal((7, 12))
    cond = Condition(text=text, control=control)
    negative = replace(cond, text=torch.zeros_like(text))
    return Batch(x0=rng.normal(shape), cond=cond, negative=negative, noise=rng.normal(shape))


def iterate(run: Run, world: World) -> Iteration:
    batch = the_batch(run)
    networks = build(run.networks, run.method.roles, 0)
    draw = torch.Generator().manual_seed(1)
    for role, network in networks.items():  # a student equal to its teacher, and weights that begin at 0, would hide gradients
        if role == "teacher":
            continue
        # A head that cannot tell real from fake has biases whose gradient is the difference of two equal halves: rounding.
        scale = 0.2 if role == "head" else 0.05
        for parameter in network.module.parameters():
            parameter.data += scale * torch.randn(parameter.shape, generator=draw)
    crew = assemble(run, networks, world)
    losses: dict[str, list[Tensor]] = {}
    gradients: dict[str, Tensor] = {}
    accum = run.trainer.grad_accum
    size = NUM // world.num_readers // accum
    for step in range(2):
        turn = run.method.turn(step)
        rows = [torch.arange(size) + (micro * world.num_readers + world.reader) * size for micro in range(accum)]
        parts = [iteration.Part(batch.rows(own), Rng(7, step, own), 1 / accum) for own in rows]
        for terms in iteration.gradients(run, crew, turn, parts):
            for name, value in terms.values.items():
                losses.setdefault(f"{step}.{turn.name}.{name}", []).append(value.detach() / accum)
        iteration.norms(crew, turn, world)
        for role in turn.trains:
            for name, weight in crew.trained[role].weights.items():
                if weight.grad is not None:
                    grad: Any = weight.grad
                    gradients[f"{step}.{role}.{name}"] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    means = {name: world.mean(torch.stack(values).sum()) for name, values in losses.items()}
    return Iteration(means, gradients)


def differences(got: Iteration, want: Iteration) -> dict[str, float]:
    """The largest relative difference of a loss, of a gradient, and of the gradient of a role."""
    assert got.losses.keys() == want.losses.keys(), got.losses.keys() ^ want.losses.keys()
    assert got.gradients.keys() == want.gradients.keys(), got.gradients.keys() ^ want.gradients.keys()
    losses = max(float((got.losses[n] - v).abs() / v.abs()) for n, v in want.losses.items())
    far = {name: float((got.gradients[name] - g).norm()) for name, g in want.gradients.items()}
    norms = {name: float(g.norm()) for name, g in want.gradients.items()}
    role_of = {name: ".".join(name.split(".")[:2]) for name in far}
    of_role = {role: math.hypot(*(norms[n] for n in norms if role_of[n] == role)) for role in role_of.values()}
    together = {role: math.hypot(*(far[n] for n in far if role_of[n] == role)) / norm for role, norm in of_role.items()}
    # What is nearly 0 beside the others is rounding: of that the difference is taken relative to a hundredth of the role's.
    worst = max(far[name] / max(norms[name], 1e-2 * of_role[role_of[name]]) for name in far)
    return {"loss": losses, "gradient": worst, "role": max(together.values())}


def fork(size: int, work: Callable[[], None]) -> None:
    """Runs `work` on `size` processes, of which each knows its rank as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: list[int] = []
    sys.stdout.flush()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in words.items()})
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert not any(codes), codes


def compare(case: str, layout: str, want: Iteration) -> None:
    """Prints how far the layout is from one process, with and without recomputed blocks and accumulation."""
    size, parallel = LAYOUTS[layout]

    def work() -> None:
        world = make(case, parallel).parallel.join()
        for trainer in SETTINGS[:: 3 if IS_QUICK else 1]:
            got = iterate(make(case, parallel, **trainer), world)
            if world.is_main:
                print(json.dumps({"case": case, "layout": layout, **trainer, **differences(got, want)}))
            dist.barrier()
        leave_world()

    fork(size, work)


def count_reductions() -> None:
    """Prints how often gradients are summed over replicas (HSDP 2 x 1) in an iteration of one and of two micro-batches."""
    counts: dict[int, int] = {}

    def work() -> None:
        world = make("dmd2.cosmos.full", LAYOUTS["hsdp"][1]).parallel.join()
        assert world.weights is not None
        replicas = world.weights.get_group("replicate")
        sum_over = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            counts[accum] = counts.get(accum, 0) + (kwargs.get("group") is replicas)
            return sum_over(tensor, *args, **kwargs)

        dist.all_reduce = counted
        for accum in (1, 2):
            iterate(make("dmd2.cosmos.full", LAYOUTS["hsdp"][1], grad_accum=accum), world)
        if world.is_main:
            print(json.dumps(counts))
        leave_world()

    fork(2, work)


class Held(TorchDispatchMode):
    """The most bytes that all storages have held at once, at their sizes of that moment: FSDP frees and fills the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[Any, int]] = {}  # of a storage by its address: a weak reference to it, and its bytes
        self.total = 0  # at least what is held: what has been freed is found out before a new peak counts
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.hold(part for part in tree_leaves((args, kwargs, out)) if isinstance(part, Tensor))
        return out

    def hold(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            _, before = self.sizes.get(id(storage), (None, 0))
            self.sizes[id(storage)] = weakref.ref(storage), storage.nbytes()
            self.total += max(0, storage.nbytes() - before)
        if self.total > self.peak:
            alive = ((key, ref, ref()) for key, (ref, _) in self.sizes.items())
            self.sizes = {key: (ref, storage.nbytes()) for key, ref, storage in alive if storage is not None}
            self.total = sum(size for _, size in self.sizes.values())
            self.peak = max(self.peak, self.total)


def memory_run(parallel: Parallel, layers: int, checkpointing: bool) -> Run:
    run = make("dmd2.cosmos.full", parallel, batch_size=1, checkpointing=checkpointing)
    spec = CosmosSpec(**{**COSMOS, "num_heads": 4, "head_dim": 24, "num_layers": layers, "max_size": (4, 16, 16)})
    networks = replace(run.networks, teacher=spec, critic=Full(spec, init="random"), head=replace(HEAD, channels=96))
    return replace(run, networks=networks)


def memory_batch(side: int) -> Batch:
    rng, shape = Rng(5, 0, range(1)), (4, 4, side, side)
    text = rng.normal((7, 12))
    return Batch(x0=rng.normal(shape), cond=Condition(text=text), negative=Condition(text=torch.zeros_like(text)))


def memory_of(run: Run, world: World, batch: Batch) -> int:
    """Peak bytes of two iterations, one of each turn, with optimiser states and averages."""
    crew = assemble(run, build(run.networks, run.method.roles, 0), world)
    held = Held()
    held.hold(tensor for whole in crew.modules for tensor in (*whole.module.parameters(), *whole.module.buffers()))
    held.hold(crew.state().values())
    with held:
        for step in range(2):
            turn = run.method.turn(step)
            for _ in iteration.gradients(run, crew, turn, [iteration.Part(batch, Rng(7, step, range(1)), 1.0)]):
                pass
            norms = {name: float(norm) for name, norm in iteration.norms(crew, turn, world).items()}
            iteration.step(run, crew, norms, step, 0)
    return held.peak


def saved_bytes(run: Run, world: World, batch: Batch) -> int:
    """Bytes that autograd keeps of the student's forward for its backward, weights excluded."""
    crew = assemble(run, build(run.networks, run.method.roles, 0), world)
    weights = {p.untyped_storage().data_ptr() for whole in crew.modules for p in whole.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    assert batch.x0 is not None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = crew.student.network(batch.x0, torch.full((1,), 0.5, dtype=torch.float64), batch.cond)
    del answer
    return sum(kept.values())


def show_memory() -> None:
    """Prints the bytes of one process, of one of two under FSDP, and of one of two that share tokens; and those planned."""
    from fewstep.training.plan.plan import plan

    few, many = memory_batch(4), memory_batch(16)
    cases = {  # weights dominate in the first, activations in the second
        "fsdp": (memory_run(LAYOUTS["fsdp"][1], 8, True), few),
        "context": (memory_run(LAYOUTS["context"][1], 2, False), many),
    }
    for name, (run, batch) in cases.items():
        alone = replace(run, parallel=replace(run.parallel, context=1))
        planned = [round(plan(run, gpus, batch).peak_gib * 2**30) for gpus in (1, 2)]
        record = {
            "layout": name,
            "planned": planned,
            "one": memory_of(alone, ALONE, batch),
            "saved": saved_bytes(alone, ALONE, batch),
        }

        def work(run: Run = run, batch: Batch = batch, record: dict[str, Any] = record) -> None:
            world = run.parallel.join()
            two = memory_of(run, world, batch)
            shared = 0 if world.context is None else saved_bytes(run, world, batch)
            if world.is_main:
                print(json.dumps({**record, "two": two, "saved_of_two": shared}))
            leave_world()

        fork(2, work)


def show_host() -> None:
    """Prints how much memory two processes under FSDP take at most while they open a teacher, a student and a critic."""
    import accelerate  # noqa: F401  # modules are memory, too: all are imported before it is counted
    import torch.distributed.fsdp
    from diffusers import CosmosTransformer3DModel  # noqa: F401

    size = {**COSMOS, "num_heads": 6, "head_dim": 128, "num_layers": 8}  # beside 200 MB what modules take themselves is little
    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            for name in ("teacher", "critic"):
                module: Any = CosmosSpec(**size).build().module
                module.save_pretrained(f"{folder}/{name}")

        fork(1, save)  # elsewhere: what this process had and freed, its children would fill without a trace
        whole = Path(f"{folder}/teacher/diffusion_pytorch_model.safetensors").stat().st_size
        run = make("dmd2.cosmos.full", LAYOUTS["fsdp"][1])
        spec = CosmosSpec(pretrained=f"{folder}/teacher")
        critic = Full(replace(spec, pretrained=f"{folder}/critic"), init=f"{folder}/critic/diffusion_pytorch_model.safetensors")
        head = replace(HEAD, channels=768)
        run = replace(
            run, networks=Networks(spec, Full(), critic, f"{folder}/teacher/diffusion_pytorch_model.safetensors", head)
        )

        def work() -> None:
            world = run.parallel.join()
            before, peak, ended = _anonymous(), [0], threading.Event()

            def watch() -> None:
                while not ended.wait(0.002):
                    peak[0] = max(peak[0], _anonymous())

            thread = threading.Thread(target=watch)
            thread.start()
            crew = assemble(run, build(run.networks, run.method.roles, 0, divided=True), world)
            end = _anonymous()
            ended.set()
            thread.join()
            tensors = [p for part in crew.modules for p in (*part.module.parameters(), *part.module.buffers())]
            storages = {
                local(t).untyped_storage().data_ptr(): local(t).untyped_storage() for t in (*tensors, *crew.state().values())
            }
            kept = sum(storage.nbytes() for storage in storages.values())
            for role, name in (("student", "teacher"), ("critic", "critic")):
                wanted = load_file(f"{folder}/{name}/diffusion_pytorch_model.safetensors")
                weights: dict[str, Any] = crew.trained[role].weights
                assert weights.keys() == wanted.keys()
                assert all(torch.equal(weights[n].full_tensor(), wanted[n]) for n in wanted)
            if world.is_main:
                print(json.dumps({"whole": whole, "kept": kept, "peak": peak[0] - before, "end": end - before}))
            leave_world()

        fork(2, work)


def _anonymous() -> int:
    """Bytes of this process's memory that are no pages of files."""
    match = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    OTHERS = {"reductions": count_reductions, "memory": show_memory, "host": show_host}
    for word in (word for word in sys.argv[1:] if word != "--quick"):
        if word in OTHERS:
            OTHERS[word]()
            continue
        case, _, layouts = word.partition("=")
        want = iterate(make(case, Parallel()), ALONE)
        for layout in layouts.split(",") if layouts else LAYOUTS:
            compare(case, layout, want)
