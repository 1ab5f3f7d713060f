"""Does a run fit a GPU, and what is the smallest change that would make it: `fewstep plan`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fewstep.batch import Batch
from fewstep.data.loader import first_batch
from fewstep.errors import UserError
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full
from fewstep.training.plan.ledger import PASSING
from fewstep.training.plan.plan import GIB, Measurement, measure, mock_batch, plan, without_context
from fewstep.training.plan.request import HERE, PlanRequest, memory_of
from fewstep.training.run import Run

OFFLOAD = "trainer.offload_teacher=true"
CPU = "this machine, which has no GPU"
Say = Callable[[str], None]


def _quiet(text: str) -> None:
    """Nobody watches."""


def advice(run: Run, batch: Batch, measurement: Measurement, gpus: int, gib: float, say: Say = _quiet) -> str:
    """The smallest change of settings that makes the run fit, in the order in which they cost least; then the least GPUs."""
    sentences: list[str] = []
    changed, words = run, list[str]()
    steps = [step for step in _changes(run) if step[1] != run]
    for text, alone in steps:
        say(f"it does not fit; does it with {text}?")
        if measure(alone, _part_of(batch, alone)).on(gpus).needed_gib <= gib:
            sentences.append(f"it fits with {text}")
            break
    else:
        for text, _ in steps:  # none is enough alone: one after the other
            before = changed
            changed = next((other for name, other in _changes(changed) if name == text), changed)
            if text.endswith("=lora"):  # then the teacher's weights are those of a role that is trained, and stay
                words = [word for word in words if word != OFFLOAD]
            words += [text] if changed != before else []
            say(f"and with {' '.join(words)}?")
            if len(words) > 1 and measure(changed, _part_of(batch, changed)).on(gpus).needed_gib <= gib:
                sentences.append(f"it fits with {' '.join(words)}")
                break
        else:
            sentences.append("no setting alone makes it fit")
    sharded = replace(measurement, run=replace(run, parallel=replace(run.parallel, mode="fsdp", num_replicas=None)))
    for more in (2, 4, 8, 16, 32, 64, 128):
        if more > gpus and more % run.parallel.context == 0 and sharded.on(more).needed_gib <= gib:
            sentences.append(f"as it is, it fits on {more} GPUs with parallel.mode=fsdp")
            break
    return "; ".join(sentences)


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


def answer(run: Run, request: PlanRequest, say: Say = _quiet) -> tuple[dict[str, Any], str]:
    """What `fewstep plan` prints, as JSON and as text.

    say: hears of every stage; one can take a minute for billions of weights.
    """
    gpus, note = request.gpus, ""
    name, gib = here(gpus) if request.gpu == HERE else (request.gpu, memory_of(request.gpu))
    if request.shape is not None or request.text is not None:
        batch = mock_batch(run, request.shape, request.text)
    else:
        try:
            batch = first_batch(run.data.open(), run.trainer.batch_size)
        except (ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            batch = mock_batch(run, None, None)
            note = (
                f"ASSUMED, because the data cannot be opened ({reason}); shape=CxTxHxW and text=TOKENSxCHANNELS say otherwise"
            )
    run = run if gpus > 1 else without_context(run)
    try:
        measurement = measure(run, batch, say)
    except UserError as error:
        raise UserError(f"{error}. These shapes are {note}" if note else str(error)) from None
    share = measurement.on(gpus)
    fits = share.needed_gib <= gib
    activations: dict[str, float] = {}
    if request.gpu != HERE or not fits:  # whoever trains here asks whether it fits, and not what else would
        other = replace(run, trainer=replace(run.trainer, checkpointing=not run.trainer.checkpointing))
        say("the same with the other value of trainer.checkpointing")
        both = {run.trainer.checkpointing: measurement, other.trainer.checkpointing: measure(other, batch)}
        names = {True: "checkpointing", False: "no_checkpointing"}
        activations = {text: both[key].on(gpus).parts.get(PASSING, 0) / GIB for key, text in names.items()}
    more = "" if fits else advice(run, batch, measurement, gpus, gib, say)
    record = share.as_json() | {
        "activations_gib": activations,
        "assumed": note,
        "gpu": name,
        "gpu_gib": gib,
        "fits": fits,
        "advice": more,
    }
    verdict = f"fits {name} ({gib:.4g} GiB)" if fits else f"does not fit {name} ({gib:.4g} GiB): {more}"
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}, one process each" if name != CPU else f"{CPU}, processes: {gpus}"
    lines = [f"{run.job.name} on {where}, {share.batch}", str(share)]
    if note:
        lines.insert(1, f"  these shapes are {note}")
    if activations:
        with_, without = activations["checkpointing"], activations["no_checkpointing"]
        lines.append(f"  activations {with_:.3f} GiB with trainer.checkpointing, {without:.3f} GiB without")
    return record, "\n".join([*lines, verdict])


def here(processes: int) -> tuple[str, float]:
    """What this machine trains on, and the GiB that each process can have of it: of its GPU, else of its memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / GIB
    return CPU, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / processes


def dryrun(run: Run) -> str:
    """The plan of one GPU, for --dryrun; why there is none, where the shapes of its batches cannot be told."""
    try:
        return f"memory on 1 GPU (more: fewstep plan):\n{plan(run)}"
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        return f"memory is not planned, because the data cannot be opened: {reason} (fewstep plan takes shape=CxTxHxW)"
