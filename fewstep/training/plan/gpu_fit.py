"""Does a run fit a GPU, and what is the smallest change that would make it: `fewstep plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fewstep.batch import Batch
from fewstep.data.loader import first_batch
from fewstep.errors import UserError
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full
from fewstep.training.plan.ledger import PASSING
from fewstep.training.plan.plan import GIB, Measurement, measure, mock_batch
from fewstep.training.run import Run

GPUS = {  # GiB that the driver reports, most of which a process can have
    "h100": 79.6, "a100": 79.2, "a100-40": 39.4, "h200": 139.8, "b200": 178.4, "l40s": 44.4, "a6000": 47.5, "l4": 22.0,
    "rtx4090": 23.5, "rtx5090": 31.4,
}  # fmt: skip


OFFLOAD = "trainer.offload_teacher=true"


def memory_of(gpu: str) -> float:
    """GiB of a GPU, by name or as a number."""
    if gpu.lower() in GPUS:
        return GPUS[gpu.lower()]
    try:
        return float(gpu)
    except ValueError:
        raise UserError(f"gpu={gpu}: give GiB, or one of {', '.join(GPUS)}") from None


def advice(run: Run, batch: Batch, found: Measurement, gpus: int, gib: float) -> str:
    """The smallest change of settings that makes the run fit, in the order in which they cost least; then the least GPUs."""
    said: list[str] = []
    changed, words = run, list[str]()
    steps = [step for step in _changes(run) if step[1] != run]
    for text, alone in steps:
        if measure(alone, _part_of(batch, alone)).on(gpus).needed_gib <= gib:
            said.append(f"it fits with {text}")
            break
    else:
        for text, _ in steps:  # none is enough alone: one after the other
            before = changed
            changed = next((other for name, other in _changes(changed) if name == text), changed)
            if text.endswith("=lora"):  # then the teacher's weights are those of a role that is trained, and stay
                words = [word for word in words if word != OFFLOAD]
            words += [text] if changed != before else []
            if len(words) > 1 and measure(changed, _part_of(batch, changed)).on(gpus).needed_gib <= gib:
                said.append(f"it fits with {' '.join(words)}")
                break
        else:
            said.append("no setting alone makes it fit")
    sharded = replace(found, run=replace(run, parallel=replace(run.parallel, mode="fsdp", num_replicas=None)))
    for more in (2, 4, 8, 16, 32, 64, 128):
        if more > gpus and sharded.on(more).needed_gib <= gib:
            said.append(f"as it is, it fits on {more} GPUs with parallel.mode=fsdp")
            break
    return "; ".join(said)


def _changes(run: Run) -> Iterator[tuple[str, Run]]:
    """Changes of the configuration, from those that cost nothing but time to those that change what is trained."""
    trainer, networks = run.trainer, run.networks
    yield "trainer.checkpointing=true", replace(run, trainer=replace(trainer, checkpointing=True))
    if trainer.batch_size > 1:
        accum = trainer.grad_accum * trainer.batch_size
        small = replace(trainer, batch_size=1, grad_accum=accum)
        yield f"trainer.batch_size=1 trainer.grad_accum={accum}", replace(run, trainer=small)
    yield "trainer.precision=bf16", replace(run, trainer=replace(trainer, precision="bf16"))
    shares = any(isinstance(getattr(networks, role), Lora) for role in ("student", "critic"))
    if "teacher" in run.method.roles and not shares and run.parallel.mode == "ddp":
        yield OFFLOAD, replace(run, trainer=replace(trainer, offload_teacher=True))
    ours = [role for role in ("critic", "student") if role in run.method.roles]
    if networks.teacher is not None:
        for role in ours:
            if getattr(networks, role) == Full():
                here = replace(trainer, offload_teacher=False)
                yield f"networks.{role}=lora", replace(run, trainer=here, networks=replace(networks, **{role: Lora()}))


def _part_of(batch: Batch, run: Run) -> Batch:
    return batch.rows(slice(0, run.trainer.batch_size))


# --- the command ------------------------------------------------------------------------------------------------------


def command(run: Run, asked: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """What `fewstep plan` answers, as JSON and as text. asked: gpus, gpu, shape, text, of the command line."""
    gpus, name = int(asked.get("gpus", "1")), asked.get("gpu", "h100")
    gib = memory_of(name)
    note = ""
    if "shape" in asked or "text" in asked:
        batch = _given(run, asked)
    else:
        try:
            batch = first_batch(run.data.open(), run.trainer.batch_size)
        except (ValueError, OSError) as error:
            batch, said = _given(run, {}), str(error).strip().splitlines()[0]
            note = f"ASSUMED, because the data cannot be opened ({said}); shape=CxTxHxW and text=TOKENSxCHANNELS say otherwise"
    found = measure(run, batch)
    made = found.on(gpus)
    other = replace(run, trainer=replace(run.trainer, checkpointing=not run.trainer.checkpointing))
    activations = {run.trainer.checkpointing: found, other.trainer.checkpointing: measure(other, batch)}
    with_, without = (activations[key].at_peak.get(PASSING, 0) / GIB for key in (True, False))
    fits = made.needed_gib <= gib
    more = "" if fits else advice(run, batch, found, gpus, gib)
    told = made.as_json() | {
        "activations_gib": {"checkpointing": with_, "no_checkpointing": without},
        "assumed": note,
        "gpu": name,
        "gpu_gib": gib,
        "fits": fits,
        "advice": more,
    }
    verdict = f"fits {name} ({gib:g} GiB)" if fits else f"does not fit {name} ({gib:g} GiB): {more}"
    lines = [f"{run.job.name} on {gpus} GPU{'s' if gpus > 1 else ''}, one process each, {made.batch}", str(made)]
    if note:
        lines.insert(1, f"  these shapes are {note}")
    lines.append(f"  activations {with_:.3f} GiB with trainer.checkpointing, {without:.3f} GiB without")
    return told, "\n".join([*lines, verdict])


def dryrun(run: Run) -> str:
    """The plan of one GPU, for --dryrun; why there is none, where the shapes of its batches cannot be told."""
    try:
        return (
            f"memory on 1 GPU (more: fewstep plan):\n{measure(run, first_batch(run.data.open(), run.trainer.batch_size)).on(1)}"
        )
    except (ValueError, OSError) as error:
        said = str(error).strip().splitlines()[0]
        return f"memory is not planned, because the data cannot be opened: {said} (fewstep plan takes shape=CxTxHxW)"


def _given(run: Run, asked: Mapping[str, str]) -> Batch:
    shape = _sizes("shape", asked["shape"]) if "shape" in asked else None
    text = _sizes("text", asked["text"], 2) if "text" in asked else None
    return mock_batch(run, shape, text)  # pyright: ignore[reportArgumentType]  # two of them


def _sizes(name: str, text: str, num: int | None = None) -> tuple[int, ...]:
    try:
        sizes = tuple(int(word) for word in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or (num is not None and len(sizes) != num):
        example = "512x1024 (tokens, channels)" if name == "text" else "16x16x88x160 (C T H W of latents)"
        raise UserError(f"{name}={text}: sizes are written as {example}")
    return sizes


ASKED = ("gpus", "gpu", "shape", "text")


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words of the run, and those of the plan by name."""
    mine = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.partition("=")[0] in ASKED and "=" in word}
    return [word for word in words if not (word.partition("=")[0] in ASKED and "=" in word)], mine
