"""The memory a run will need on each GPU, without a GPU and without weights.

The run's own networks are built on fake tensors (shapes, types and devices, no contents), placed by the run's own `place`,
given the run's own optimisers and averages; then the method's own `losses` take one step of each turn, with backward, and a
ledger keeps what is alive. So what a network saves for its backward, what checkpointing spares and which role keeps no graph is
found, not estimated.

Several GPUs that share the tokens of a clip (parallel.context): the step is taken with one share of them, so that activations
are those of one GPU. DDP holds everything else on each. FSDP holds a share of each weight, gradient, optimiser state and
average, and while a block is at work its gathered weights and unreduced gradients; those of two blocks and of what lies outside
blocks are added. The worst moment of one GPU that holds everything need not be that of a share, so two are kept of every turn:
when most is held, and when activations hold most.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.batch import Batch
from fewstep.data.loader import first_batch
from fewstep.data.mix import Mix
from fewstep.data.mock import Mock
from fewstep.diffusion import RectifiedFlow, Rng
from fewstep.errors import UserError
from fewstep.methods import KD, CausalKD
from fewstep.methods.contract import Turn
from fewstep.networks.files.folders import unread
from fewstep.networks.frozen import Offloaded
from fewstep.networks.lora import Lora, Shared
from fewstep.networks.roles import Full, Networks, Whole, build
from fewstep.networks.saved import SavedOnHost
from fewstep.parallel import COMPUTE, Context, World
from fewstep.training import iteration
from fewstep.training.crew import Crew, assemble
from fewstep.training.plan.ledger import HOST, PASSING, Ledger
from fewstep.training.run import Run

GIB = 2**30
RESERVE_GIB = 1.5  # context, libraries' workspaces; and ..
GAPS = 1.03  # .. what an allocator with expandable segments loses between blocks


@dataclass(frozen=True)
class Plan:
    """Bytes by label ("student.weights", ..., "activations") at the worst moment of the worst turn, on one GPU."""

    gpus: int
    parts: Mapping[str, int]
    turns: Mapping[str, int]  # the peak of each turn
    batch: str  # shapes it was planned for

    @property
    def peak_gib(self) -> float:
        return sum(self.parts.values()) / GIB

    @property
    def needed_gib(self) -> float:
        """What a GPU must have: with what lies outside of tensors."""
        return self.peak_gib * GAPS + RESERVE_GIB

    def as_json(self) -> dict[str, Any]:
        return {
            "gpus": self.gpus,
            "peak_gib_per_gpu": self.peak_gib,
            "needed_gib_per_gpu": self.needed_gib,
            "parts_gib": {name: size / GIB for name, size in sorted(self.parts.items())},
            "turns_gib": {name: size / GIB for name, size in self.turns.items()},
            "batch": self.batch,
        }

    def __str__(self) -> str:
        width = max(map(len, self.parts))
        lines = [f"  {name:{width}}  {size / GIB:9.3f} GiB" for name, size in sorted(self.parts.items()) if size]
        worst = max(self.turns, key=lambda name: self.turns[name])
        lines.append(f"  {'sum':{width}}  {self.peak_gib:9.3f} GiB in each process, at the worst moment of the {worst} turn")
        lines.append(f"  {'needed':{width}}  {self.needed_gib:9.3f} GiB, with libraries and an allocator's gaps")
        return "\n".join(lines)


@dataclass(frozen=True)
class Measurement:
    """Bytes that one step holds on a GPU that holds everything; the share of each of several GPUs is computed from it."""

    run: Run
    turns: Mapping[str, Sequence[Mapping[str, int]]]  # bytes by label at the moments of each turn that may be its worst
    copies: Mapping[str, float]  # labels of modules' rounded copies of fp32 weights, and how much of each FSDP keeps
    gathered: int  # weights and gradients of the blocks at work, whole, under FSDP
    batch: str

    def on(self, gpus: int) -> Plan:
        """The plan for one of `gpus` GPUs."""
        sharded = self.run.parallel.mode == "fsdp"
        replicas = (self.run.parallel.num_replicas or 1) if sharded else gpus
        for key, parts in (("num_replicas", replicas), ("context", self.run.parallel.context)):
            if gpus % parts:
                raise UserError(f"parallel.{key}={parts} does not divide gpus={gpus}")
        share = self._share(gpus // replicas)
        worst = {turn: max(map(share, moments), key=lambda parts: sum(parts.values())) for turn, moments in self.turns.items()}
        sizes = {turn: sum(parts.values()) for turn, parts in worst.items()}
        return Plan(gpus, worst[max(sizes, key=lambda turn: sizes[turn])], sizes, self.batch)

    def _share(self, shards: int) -> Callable[[Mapping[str, int]], Mapping[str, int]]:
        """From bytes of a GPU that holds everything to those of one that holds a share."""
        if shards == 1:
            return lambda parts: parts

        def share(parts: Mapping[str, int]) -> Mapping[str, int]:
            held = {name: size * self.copies.get(name, 1) for name, size in parts.items()}
            shared = {name: math.ceil(size if name == PASSING else size / shards) for name, size in held.items() if size}
            return shared | {"gathered": self.gathered}

        return share


def plan(run: Run, gpus: int = 1, batch: Batch | None = None) -> Plan:
    """What `run` needs on each of `gpus` GPUs; `batch`: tensors of the real shapes, None: the first of the run's data."""
    run = run if gpus > 1 else without_context(run)
    return measure(run, first_batch(run.data.open(), run.trainer.batch_size) if batch is None else batch).on(gpus)


def measure(run: Run, batch: Batch, say: Callable[[str], None] = lambda text: None) -> Measurement:
    """Takes one step of every turn on tensors without contents, and records what is held. say: hears of every stage."""
    say("networks, optimisers and averages on tensors without contents")
    run = replace(run, trainer=replace(run.trainer, compile=False))
    ledger, world = Ledger(), _one_of(run.parallel.context)
    with _fake() as fake, _unread(run):
        networks = _networks(run, fake)
        with fake:
            crew = assemble(run, networks, world)
            _enter(ledger, crew)
            for name, role in crew.trained.items():
                role.absorb = _entering(ledger, f"{name}.gradients", role.absorb)
                # A fused step is in place and adds nothing; torch has no fake of it, and would run it on real zeros as large
                # as weights, gradients and states.
                if role.optimizer.defaults.get("fused"):
                    role.optimizer.step = _no_step
            batch = _faked(batch, fake)
        gathered = _gathered(crew.modules, COMPUTE[run.trainer.precision])  # while all that is trained asks for gradients
        turns: dict[str, list[Mapping[str, int]]] = {}
        for step, turn in _turns(run).items():
            ledger.begin()
            say(f"one iteration of the {turn.label} turn")
            with ledger:
                _iterate(run, crew, turn, step, batch, ledger, world)
            turns.setdefault(turn.label, []).extend(ledger.moments())
            for role in crew.trained.values():
                role.take_turn(False)
    # Under FSDP bf16 weights are gathered ones only; those of a grid are fp32 shards beside the ones that are trained.
    grown = torch.float32.itemsize / COMPUTE[run.trainer.precision].itemsize
    copies = {f"{name}.weights": grown if role.on_grid else 0 for name, role in crew.trained.items() if role.rounds}
    return Measurement(run, turns, copies, gathered, _shapes(batch))


def mock_batch(run: Run, shape: tuple[int, ...] | None, text: tuple[int, int] | None) -> Batch:
    """A batch of the shapes that the teacher's configuration implies, for what is not given: of Cosmos 1 at 704 x 1280."""
    teacher: Any = run.networks.teacher or run.networks.student.network  # Any: a specification tells more than it must
    default = Mock()
    if shape is None:
        channels = getattr(teacher, "latent_channels", getattr(teacher, "channels", default.shape[0]))
        shape = (channels, *default.shape[1:])
    if text is None:
        channels = getattr(teacher, "text_projection_from", None) or getattr(teacher, "text_dim", 1024)
        text = (512, channels) if channels else None
    path = getattr(teacher, "path", RectifiedFlow())
    method = run.method
    times = method.times_on(method.path or path) if isinstance(method, (KD, CausalKD)) else ()  # of states on the teacher's way
    controls = tuple(getattr(teacher, "controls", ()))[: 1 if isinstance(run.data, Mix) else None]  # a batch of a mix has one
    spec = Mock(shape, text, controls=controls, path_times=times)
    return spec.open().batch(torch.arange(run.trainer.batch_size))


def without_context(run: Run) -> Run:
    """The run as one process alone does it."""
    return replace(run, parallel=replace(run.parallel, context=1))


def _one_of(context: int) -> World:
    """A process alone, or one of those that share the tokens of a clip, which sends nothing."""
    return World(0, context, torch.device("cpu"), None, None, Context(0, context) if context > 1 else None)


# --- fakes ------------------------------------------------------------------------------------------------------------


@contextmanager
def _fake() -> Iterator[Any]:  # Any: torch's FakeTensorMode
    """Within, modules can be moved and converted as fakes."""

    def convert(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # torch exchanges fake parameters as whole objects, and fails where anything else refers to one weakly.
        for module in self.modules() if recurse else (self,):
            with torch.no_grad():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = fn(parameter.data)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fn(buffer)
        return self

    convert_before = nn.Module._apply
    nn.Module._apply = convert
    try:
        with warnings.catch_warnings():
            # torch's own, about what it does itself when a fake is made of another or copied
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
            yield fake_mode()
    finally:
        nn.Module._apply = convert_before


@contextmanager
def _unread(run: Run) -> Iterator[None]:
    """Within, a pretrained network is built from its configuration, and no file of weights is opened."""
    networks = run.networks
    specs = (networks.teacher, networks.student.network, networks.critic.network)
    if not any(spec is not None and spec.source is not None for spec in specs):
        yield  # nothing would be read: diffusers, which takes longer to import than torch, is not needed for it
        return
    with unread():
        yield


def fake_mode() -> Any:  # Any: torch's FakeTensorMode
    """torch's own mode of fakes, whose tensors may be copied."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # the way torch.export and its memory tools go

    class Mode(FakeTensorMode):
        def __deepcopy__(self, memo: dict[int, Any]) -> Mode:
            # A copied fake would otherwise copy its mode, and in it the bare addresses of weak references to storages, each
            # of which then frees what the other has freed: the heap is corrupt, and something else dies of it later.
            return self

    return Mode(allow_non_fake_inputs=True)


def _networks(run: Run, fake: Any) -> dict[str, Any]:
    """The networks of the run's method; what has no weights is built as it is."""

    def unread(role: Any) -> Any:
        if isinstance(role, Full):
            return replace(role, network=role.network or run.networks.teacher, init="random")
        return replace(role, init="teacher") if isinstance(role, Lora) else role

    config = run.networks
    config = replace(config, student=unread(config.student), critic=unread(config.critic), teacher_init=None)
    with fake:
        nets: dict[str, Any] = dict(build(config, run.method.roles, run.trainer.seed))
    for role, net in nets.items():
        if not any(True for _ in net.module.parameters()) and role == "teacher":
            nets[role] = build(Networks(teacher=config.teacher), ("teacher",), run.trainer.seed)["teacher"]
    return nets


def _faked(batch: Batch, fake: Any) -> Batch:
    """The batch with every large tensor as a fake; small ones (times, labels, masks) may be looked at by a method."""

    def change(tensor: Tensor) -> Tensor:
        return fake.from_tensor(tensor) if tensor.numel() > 4096 else tensor

    return batch._map(change)


def _enter(ledger: Ledger, crew: Crew) -> None:
    """Enters every tensor that stays under its owner, and gradients as they appear."""
    for whole in crew.modules:
        ledger.hold((*whole.module.parameters(), *whole.module.buffers()), "teacher.weights")
    for name, network in crew.networks.items():
        if not (isinstance(network, Shared) and network.role is None):
            ledger.hold((*network.module.parameters(), *network.module.buffers()), f"{name}.weights")
    for name, role in crew.trained.items():
        for key, tensor in role.state().items():
            part = key.split(".")[0]
            if part != "buffers":
                label = {"weights": "master" if role.rounds else "weights", "ema": "ema", "optim": "optimizer"}[part]
                ledger.hold([tensor], f"{name}.{label}")

        def note(parameter: Tensor, label: str = f"{name}.gradients") -> None:
            if parameter.grad is not None:
                ledger.hold([parameter.grad], label)

        for live in role.live.values():
            live.register_post_accumulate_grad_hook(note)
    for network in crew.networks.values():
        if isinstance(network, SavedOnHost):
            network.watchers.append(lambda: ledger.entering(HOST))
            network = network.inner
        if isinstance(network, Offloaded):
            ledger.hold(network.at_home(), HOST)


def _entering(ledger: Ledger, label: str, function: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with ledger.entering(label):
            function()

    return call


def _no_step(closure: Any = None) -> Any:
    return None


def _turns(run: Run) -> dict[int, Turn]:
    """The first step of each turn the method has."""
    first: dict[Turn, int] = {}
    for step in range(min(run.trainer.max_iter, 20_000)):  # longer than any warm-up or phase that is not the last
        first.setdefault(run.method.turn(step), step)
    return {step: turn for turn, step in first.items()}


def _iterate(run: Run, crew: Crew, turn: Turn, step: int, batch: Batch, ledger: Ledger, world: World) -> None:
    """One iteration of the loop with one micro-batch, its gradients entered in the ledger."""
    rng = Rng(run.trainer.seed, step, torch.arange(batch.size()), "cpu")
    for _ in iteration.gradients(run, crew, turn, [iteration.Part(batch, rng, 1 / run.trainer.grad_accum)]):
        for name in turn.trains:
            grads = [w.grad for w in crew.trained[name].weights.values() if w.grad is not None]
            ledger.hold(grads, f"{name}.gradients")
    norms = iteration.norms(crew, turn, world)
    # Of eight bits, the step is compiled, and holds one weight's temporaries. The norm of fakes has no value: 1e9 is clipped.
    stepped = {name: 1e9 for name in norms if crew.trained[name].optim.states == "fp32"}
    iteration.step(run, crew, stepped, step, 0)


# --- several GPUs -----------------------------------------------------------------------------------------------------


def _gathered(modules: Iterable[Whole], compute: torch.dtype) -> int:
    """Whole weights that FSDP has at once: two blocks, one at work and the next on its way, and what is in no block; and where
    they are trained, the fp32 gradients of one block before they are shared out."""
    most = 0
    for whole in modules:
        size: Callable[[Iterable[Tensor]], int] = lambda ps: sum(p.numel() for p in ps)  # noqa: E731
        blocks = sorted((size(block.parameters()) for block in whole.blocks), reverse=True)
        rest = size(whole.module.parameters()) - sum(blocks)
        trained = max((size(p for p in block.parameters() if p.requires_grad) for block in whole.blocks), default=0)
        most = max(most, (sum(blocks[:2]) + rest) * compute.itemsize + trained * 4)
    return most


def _shapes(batch: Batch) -> str:
    tensors = {"x0": batch.x0, "text": batch.cond.text, **batch.cond.control}
    return ", ".join(f"{name} {'x'.join(map(str, t.shape))}" for name, t in tensors.items() if t is not None)
