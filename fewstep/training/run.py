"""One run, declared: every setting, its default, and the checks that cross from one group to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from fewstep.config import ConfigError, OneOf
from fewstep.data.contract import AnyData
from fewstep.data.loader import Loader
from fewstep.environment import output_root
from fewstep.files import is_plain
from fewstep.methods.contract import ByChunks, Method
from fewstep.networks.contract import NOT_SHARED
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Networks
from fewstep.parallel import World, join_world
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.preview import AnyPreview

AnyMethod = Annotated[Method, OneOf("method")]


@dataclass(frozen=True)
class Job:
    """Where the run lives: OUTPUT_ROOT/PROJECT/GROUP/NAME. The same three names are the same run, and resume it."""

    project: str = "fewstep"
    group: str = "default"
    name: str = "run"
    after: tuple[str, ...] = ()  # recipes whose finished run this one starts from; trained first if they are not there

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("project", "group", "name"):
            path = Path(getattr(self, key))
            if path.is_absolute() or not all(is_plain(part) for part in path.parts) or not path.parts:
                yield key, f"is a folder inside OUTPUT_ROOT, not {str(path)!r}"

    def folder(self) -> Path:
        return output_root() / self.project / self.group / self.name


@dataclass(frozen=True)
class Trainer:
    max_iter: int = 1000  # iterations; each is one turn of one or more roles
    batch_size: int = 64  # samples per process (or per context of several) and micro-batch
    grad_accum: int = 1  # micro-batches per iteration; the global batch is batch_size * grad_accum * processes / context
    global_batch: int | None = None  # samples of an iteration on all processes: decides grad_accum; none: grad_accum decides it
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # of compute; weights, optimiser and EMA are fp32 always
    log_every: int = 100  # iterations between two lines of metrics.jsonl
    num_threads: int | None = None  # CPU threads of torch; None: torch's choice. 1 is fastest for the analytic recipes
    compile: bool = False  # torch.compile on every block
    checkpointing: bool = False  # run blocks again in backward instead of keeping their activations
    recompute: Literal["blocks", "selective"] = (
        "blocks"  # with checkpointing: whole blocks; selective: all but their matrix products and attention
    )
    recompute_roles: tuple[str, ...] = ()  # with checkpointing: of these roles only; (): of all
    offload_activations: tuple[
        str, ...
    ] = ()  # with checkpointing: block inputs of these roles' calls wait on the host; (): none
    frozen: Literal["compute", "8bit", "float8"] = (
        "compute"  # what frozen weights are kept in; 8bit (int8), float8: Linear layers
    )
    offload_teacher: bool = (
        False  # its weights lie on the CPU between its calls; for a teacher that shares its weights with none
    )


@dataclass(frozen=True)
class Parallel:
    mode: Literal["ddp", "fsdp"] = "ddp"  # with one process: no difference
    num_replicas: int | None = None  # fsdp: replicas of the sharded model (HSDP); None: 1, shard over all
    context: int = 1  # processes that share the tokens of a clip; with one process: no difference
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = 1800.0  # of a collective: a rank that waits longer says so and ends

    def join(self) -> World:
        """The processes of the run, joined."""
        return join_world(self.device, self.num_replicas, self.timeout_s, self.context)


@dataclass(frozen=True)
class Checkpoint:
    save_iter: int = 500  # iterations between two checkpoints; the last iteration always writes one
    keep_last: int = 2  # older ones are removed, but for ..
    keep_every: int | None = None  # .. those whose iteration is a multiple of this
    best_metric: str | None = None  # .. and the one at which this number of metrics.jsonl was best so far: RUN@best
    best_is: Literal["lowest", "highest"] = "lowest"  # which value of it is best
    patience: int | None = None  # end the run after so many values of best_metric none of which was better; none: never
    load_path: str | None = None  # weights to start from (a run, RUN@ITER, or a checkpoint folder); not used when resuming
    original: bool = False  # beside each its weights as files of the original Cosmos code (training/original_files.py)
    async_write: bool = False  # write while training goes on; costs a copy in memory

    def is_over(self, stale: int) -> bool:
        """Whether `patience` ends the run after so many values that were not better."""
        return self.patience is not None and stale >= self.patience


def _remedy(missing: list[str]) -> str:
    """Where fields of a batch come from that data lack."""
    if missing == ["negative"]:
        return "Set data.text=t5_xxl and data.negative=zeros, or negative.pickle (fewstep prepare text --negative-prompt TEXT)"
    return "Pairs of noise and answer, and states on the way, come from a teacher: fewstep pairs, or data=teacher_pairs"


@dataclass(frozen=True)
class Run:
    method: AnyMethod
    networks: Networks
    data: AnyData
    job: Job = Job()
    optim: Optim = Optim()
    critic_optim: Optim | None = None  # None: as optim
    head_optim: Optim | None = None  # None: as critic_optim
    ema: Ema = Ema()
    trainer: Trainer = Trainer()
    parallel: Parallel = Parallel()
    checkpoint: Checkpoint = Checkpoint()
    loader: Loader = Loader()
    preview: AnyPreview | None = None
    health: Health = Health()

    def on_readers(self, num: int) -> Run:
        """The run with the number of micro-batches that its global batch needs on so many processes (or contexts of several).

        So it goes on with the same batches, in the same order and with the same noise, wherever it is resumed.
        """
        trainer = self.trainer
        if trainer.global_batch is None:
            return self
        if trainer.global_batch % (trainer.batch_size * num):
            raise ConfigError(
                f"trainer.global_batch={trainer.global_batch} cannot be divided among {num} processes with "
                f"trainer.batch_size={trainer.batch_size}: give a divisor of {trainer.global_batch / num:g} as batch_size, or "
                "another number of processes"
            )
        return replace(self, trainer=replace(trainer, grad_accum=trainer.global_batch // (trainer.batch_size * num)))

    def optim_of(self, role: str) -> Optim:
        own = {"critic": self.critic_optim, "head": self.head_optim or self.critic_optim}
        return own.get(role) or self.optim

    def problems(self) -> Iterable[tuple[str, str]]:
        trainer, checkpoint = self.trainer, self.checkpoint
        for name in ("max_iter", "batch_size", "grad_accum", "log_every"):
            if getattr(trainer, name) < 1:
                yield f"trainer.{name}", f"must be at least 1, not {getattr(trainer, name)}"
        for key in ("recompute_roles", "offload_activations"):
            unknown = sorted(set(getattr(trainer, key)) - set(self.method.roles))
            if unknown:
                yield f"trainer.{key}", f"names {', '.join(unknown)}; this method has {', '.join(self.method.roles)}"
        yield from self._problems_of_offload()
        if not trainer.checkpointing and (trainer.recompute_roles or trainer.recompute != "blocks"):
            yield "warn:trainer.recompute", "and trainer.recompute_roles have no effect without trainer.checkpointing=true"
        if trainer.global_batch is not None and trainer.global_batch % trainer.batch_size:
            yield "trainer.global_batch", f"is {trainer.global_batch}, no multiple of trainer.batch_size={trainer.batch_size}"
        missing = sorted(self.method.needs - self.data.fields)
        if missing:
            yield (
                "data",
                (
                    f"method {type(self.method).__name__} needs {', '.join(missing)}, but this data has only "
                    f"{', '.join(sorted(self.data.fields))}. {_remedy(missing)}"
                ),
            )
        if "teacher" in self.method.roles and self.networks.teacher is None:
            yield "networks.teacher", f"is none, but method {type(self.method).__name__} asks a teacher"
        yield from self._problems_of_causality()
        yield from self._problems_of_context()
        if "head" in self.method.roles and self.networks.head is None:
            yield (
                "networks.head",
                f"is none, but method {type(self.method).__name__} trains a discriminator: choose one (fewstep ls), and "
                "say which blocks it reads (networks.head.taps) and how wide they are (networks.head.channels)",
            )
        for key, optim in (("optim", self.optim), ("critic_optim", self.critic_optim), ("head_optim", self.head_optim)):
            if optim is not None and optim.warmup_iters > trainer.max_iter:
                yield (
                    f"{key}.warmup_iters",
                    (
                        f"is {optim.warmup_iters}, longer than the run (trainer.max_iter={trainer.max_iter}): "
                        "the learning rate would never be reached"
                    ),
                )
        if checkpoint.save_iter < 1:
            yield "checkpoint.save_iter", f"must be at least 1, not {checkpoint.save_iter}"
        network = self.networks.student.network or self.networks.teacher
        if checkpoint.original and network is not None and not network.has_original_names:
            yield "checkpoint.original", "is for networks of Cosmos: this one has no names in the files of the original code"
        if checkpoint.patience is not None and (checkpoint.patience < 1 or checkpoint.best_metric is None):
            yield "checkpoint.patience", "is a number of values, at least 1, of checkpoint.best_metric: set that, too"
        if self.loader.num_workers is not None and self.loader.num_workers < 0:
            yield "loader.num_workers", f"must be at least 0, not {self.loader.num_workers}"
        if self.loader.ahead < 1:
            yield "loader.ahead", f"must be at least 1, not {self.loader.ahead}"
        if trainer.log_every > trainer.max_iter:
            yield "warn:trainer.log_every", f"is {trainer.log_every}, never reached in {trainer.max_iter} iterations"
        if checkpoint.keep_last < 1:
            yield "checkpoint.keep_last", "must be at least 1: a run without a checkpoint cannot resume"
        shares = any(isinstance(getattr(self.networks, role), Lora) for role in ("student", "critic"))
        if trainer.offload_teacher and shares:
            yield (
                "warn:trainer.offload_teacher",
                "has no effect: the teacher's weights are those of the roles that are adapters",
            )
        for key, is_set in (("offload_teacher", trainer.offload_teacher), ("frozen", trainer.frozen != "compute")):
            if is_set and self.parallel.mode == "fsdp":
                yield (
                    f"trainer.{key}",
                    "does not go with parallel.mode=fsdp, which shares frozen weights out over the processes",
                )
        if self.parallel.mode == "ddp" and self.parallel.num_replicas is not None:
            yield "warn:parallel.num_replicas", "has no effect with parallel.mode=ddp, where every process is a replica"
        if self.critic_optim is not None and not {"critic", "head"} & set(self.method.roles):
            yield "warn:critic_optim", f"has no effect: method {type(self.method).__name__} trains no critic"
        for key, value in (("head_optim", self.head_optim), ("networks.head", self.networks.head)):
            if value is not None and "head" not in self.method.roles:
                yield f"warn:{key}", f"has no effect: method {type(self.method).__name__} trains no discriminator"

    def _problems_of_offload(self) -> Iterable[tuple[str, str]]:
        trainer, key = self.trainer, "trainer.offload_activations"
        whole = set(trainer.offload_activations) - set(trainer.recompute_roles or self.method.roles)
        if trainer.offload_activations and not trainer.checkpointing:
            yield key, "needs trainer.checkpointing=true: without it all that a block computes would travel, and not its input"
        elif whole & set(self.method.roles):
            yield key, f"names {', '.join(sorted(whole))}, whose blocks are not recomputed (trainer.recompute_roles)"
        if "head" in trainer.offload_activations:
            yield key, "names head, a discriminator, which has no blocks to recompute"

    def _problems_of_context(self) -> Iterable[tuple[str, str]]:
        if self.parallel.context < 1:
            yield "parallel.context", f"must be at least 1, not {self.parallel.context}"
        if self.parallel.context <= 1:
            return
        for role in ("teacher", "student", "critic"):
            spec = self.networks.spec_of(role) if role in self.method.roles else None
            if spec is not None and not spec.shares_tokens:
                yield "parallel.context", f"is {self.parallel.context}, but the network of the {role} {NOT_SHARED}"

    def _problems_of_causality(self) -> Iterable[tuple[str, str]]:
        name, networks = type(self.method).__name__, self.networks
        causality = self.method.causal_roles if isinstance(self.method, ByChunks) else {}
        for role, is_causal in causality.items():
            spec = networks.spec_of(role)
            if spec is None or role not in self.method.roles or spec.is_causal == is_causal:
                continue
            if is_causal and role == "teacher":
                text = "take a run of causal_finetune, or give it kind causal, over the network it is now"
                yield "networks.teacher", f"must be causal for method {name}: {text}"
            elif is_causal:
                yield (
                    f"networks.{role}.causal",
                    f"must be set for method {name}: networks.{role}.causal.chunk=3",
                )
            else:
                yield f"networks.{role}", f"is causal, but with score_teacher=bidirectional method {name} compares whole clips"
        specs = [networks.spec_of(role) for role in self.method.roles if role in ("student", "teacher", "critic")]
        if self.trainer.compile and any(spec is not None and spec.is_causal for spec in specs):
            yield "trainer.compile", "does not go with causal networks yet, whose blocks attend to other frames at each chunk"
        student = networks.spec_of("student")
        if self.health.long_frames is not None and (student is None or not student.is_causal or not causality):
            yield "health.long_frames", f"is for students that generate chunk after chunk, which those of method {name} do not"
        if student is not None and student.is_causal and not causality:
            yield (
                "warn:networks.student.causal",
                f"has no effect on how the student generates: method {name} samples all frames of a clip at once",
            )
