"""The loop: read it from top to bottom. No callbacks; a new ability is a new visible line.

for each iteration:  whose turn?  ->  micro-batches: losses, backward  ->  check, clip, step, average  ->  look, log, save
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import check
from fewstep.data.contract import Dataset
from fewstep.data.loader import Batches, first_batch
from fewstep.diffusion import Rng, Sampler, TeacherSampler
from fewstep.diffusion.derivative import TOLERANCE
from fewstep.errors import UserError
from fewstep.files import FULL, explain, remove, write_json
from fewstep.methods.contract import Nets
from fewstep.networks.contract import Network
from fewstep.networks.files.checkpoints import newest_in
from fewstep.networks.lora import Shared
from fewstep.networks.roles import FROZEN, build
from fewstep.networks.weights.addresses import load_into, locate, read
from fewstep.parallel import World, is_joined, is_lost_process, leave_world, peak_memory_gib
from fewstep.training import iteration
from fewstep.training.alone import alone_in
from fewstep.training.checkpoint import Checkpoints, Progress
from fewstep.training.crew import Crew, assemble
from fewstep.training.errors import Diverged, Interrupted, TrainingError
from fewstep.training.guard import refuse_non_finite
from fewstep.training.health import Monitor, Ring
from fewstep.training.heap import keep_freed_memory
from fewstep.training.log import RunLog
from fewstep.training.looks import Looks
from fewstep.training.meter import Meter
from fewstep.training.original_files import write_original_files
from fewstep.training.records import DIVERGED, SUMMARY
from fewstep.training.resume import Resumption
from fewstep.training.run import Run
from fewstep.training.run_folder import (
    noted_in,
    other_codec,
    other_shapes,
    refuse_parted_branches,
    refuse_untrained_span,
    sampler_of,
    summary,
    write_records,
)
from fewstep.training.signals import Signals

CHECKED_ROWS = 8  # samples on which a derivative is compared with differences


def train(run: Run) -> dict[str, Any]:
    """Trains, or goes on training, the run in its folder, and returns what its summary.json says."""
    check(run)
    if run.trainer.num_threads:
        torch.set_num_threads(run.trainer.num_threads)
    joined_before = is_joined()
    world = run.parallel.join()
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        with alone_in(run.job.folder()) if world.is_main else nullcontext():
            return _train(run.on_readers(world.num_readers), world)
    except Diverged as error:
        if world.is_main:
            write_json(run.job.folder() / DIVERGED, {"reason": str(error)})
        raise
    except RuntimeError as error:
        if isinstance(error, TrainingError) or world.mesh is None or not is_lost_process(error):
            raise
        raise TrainingError(_peer_message(run, world, error)) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise TrainingError(
            f"{run.job.folder()}: the run ended. {explain(error)}: it goes on from its last checkpoint, which is whole"
        ) from error
    finally:
        if not joined_before:
            leave_world()


def _train(run: Run, world: World) -> dict[str, Any]:
    began, folder, method, last = time.monotonic(), run.job.folder(), run.method, run.trainer.max_iter
    global_batch = run.trainer.batch_size * run.trainer.grad_accum * world.num_readers

    # --- where to begin: this run's latest checkpoint, or the beginning
    options = run.checkpoint
    checkpoints = Checkpoints(folder / "checkpoints", world, options.keep_last, options.keep_every, options.async_write)
    latest = checkpoints.latest()
    resumption = None if latest is None else Resumption.of(run, latest)
    results = None if resumption is None else resumption.results(last)
    if resumption is not None and results is not None:
        if world.is_main:
            print(resumption.nothing_to_do(last), file=sys.stderr)
        return results

    # --- what is cheap to check comes before what is dear to load
    run.networks.refuse_contradictions()
    data = run.data.open()
    first = _check_data(run, data)
    refuse_untrained_span(run, first)
    refuse_parted_branches(run, world)

    # --- networks, on their device, sharded; then the trained ones with their weights, optimisers and average
    noted = noted_in(folder) if latest is not None else {}
    divided = world.mesh is not None and run.parallel.mode == "fsdp"
    networks = build(run.networks, method.roles, run.trainer.seed, latest is not None, noted, divided=divided)
    if latest is None and options.load_path is not None:
        _load_weights(options.load_path, networks, divided)
    crew = assemble(run, networks, world)
    sampler = sampler_of(run, crew.student.network, folder if latest is not None else None)

    progress = Progress(step=0) if latest is None else _restore(checkpoints, latest, crew)
    earlier_s = progress.wall_s
    old_config = write_records(run, folder, sampler, first, noted) if world.is_main else None
    world.barrier()
    monitor = _monitor(run, crew, data, sampler, world)

    title = f"{run.job.name} on {world.size} x {world.device.type}" if world.size > 1 else run.job.name
    log, stop = RunLog(folder if world.is_main else None, title, progress.step, last), Signals()
    with log, stop, checkpoints, _open_batches(run, data, progress, world, log) as batches:
        log.say(_greeting(run, data, crew, sampler, latest, progress, world))
        if resumption is not None and resumption.changes:
            log.say(f"settings that changed, the ones before are in {old_config}: {resumption.text()}")
        warnings = other_shapes(run, first) if latest is None else []
        warnings += other_codec(run, data, crew.student.network) if latest is None and world.is_main else []
        for warning in warnings:
            log.say(f"warning: {warning}")
        checked = _check_derivative(run, crew, first, world, log)
        looks = Looks(run, crew, sampler, data, world, log)
        if progress.step == 0 and run.preview is not None:
            log.metrics(0, looks.show(0))

        meter = Meter()
        while progress.step < last:
            turn = method.turn(progress.step)

            # --- gradients, summed over micro-batches
            meter.begin_iteration()
            for terms in iteration.gradients(run, crew, turn, _parts(run, batches, progress, world)):
                meter.add(terms)

            # --- a look at all numbers, then each role's own step
            norms = iteration.norms(crew, turn, world)
            sizes = refuse_non_finite(norms, meter.terms, crew, turn, progress.step, world, checkpoints)
            rates = iteration.step(run, crew, sizes, progress.step, progress.updates)
            meter.add_step(norms, rates)
            if monitor is not None and "student" in sizes:
                monitor.add_gradient_norm(sizes["student"])
            progress = replace(
                progress,
                step=progress.step + 1,
                samples=progress.samples + global_batch,
                updates=progress.updates + ("student" in turn.trains),
                wall_s=earlier_s + time.monotonic() - began,
            )

            # --- looks, logged as one line before the checkpoint that goes on from here
            step, ended = progress.step, progress.step == last
            record, rings = dict[str, float](), list[Ring]()
            if step % run.trainer.log_every == 0 or ended:
                record |= meter.read(world, global_batch) | _data_metrics(batches, world) | checked
                record["memory_gib"] = peak_memory_gib(world.device)
                log.losses(step, record)
            if run.preview is not None and (ended or (_is_due(run.preview.every, step) and looks.are_cheap())):
                record |= looks.show(step)
            if monitor is not None and _is_due(run.health.every, step):
                values = _mean_over_ranks(monitor.look(crew.student.network), world)
                record |= {f"health/{name}": value for name, value in values.items()}
                rings = monitor.rings(values)
                progress = replace(progress, healthy=not rings)
            if record:
                log.metrics(step, record)
            log.advance(step)
            for ring in rings:
                log.say(f"ALARM at iteration {step}: {ring}")
            if rings and rings[-1].action in ("stop", "rollback"):
                progress, meter = _stop_or_return(run, rings[-1], progress, crew, checkpoints, log), Meter()
                continue
            progress = _with_score(run, progress, record)
            if options.is_over(progress.stale) and not ended:
                log.say(f"{options.best_metric} was not better for {progress.stale} values: the run ends at iteration {step}")
                last, ended = step, True

            # --- saves
            interrupted, writing = world.any(stop.requested, checkpoints.is_writing)
            if not writing:
                checkpoints.finish()
            if step % options.save_iter == 0 or ended or interrupted:
                checkpoints.save(crew.state(), progress)
                if options.original:
                    checkpoints.finish()
                    if world.is_main:
                        write_original_files(folder / "checkpoints" / f"iter_{step:09d}")
            if interrupted and not ended:
                checkpoints.finish()
                raise Interrupted(
                    f"{stop.name} received: iteration {step} of {last} is saved in {checkpoints.latest()}. "
                    "The same command goes on from there"
                )

        checkpoints.finish()
        results = summary(run, log.at_start, log.last, progress, world)
        if world.is_main:
            write_json(folder / SUMMARY, results)
            remove(folder / DIVERGED)
        scores = [f"  {name} {log.last[name]:.4f}" for name in log.at_start]
        log.say(f"done: {folder}/summary.json" + "".join(scores))
    return results


# --- parts of the above, in its order ---------------------------------------------------------------------------------


def _peer_message(run: Run, world: World, error: RuntimeError) -> str:
    latest = newest_in(run.job.folder() / "checkpoints") or "none"
    return (
        f"{run.job.folder()}: process {world.rank} of {world.size} ends because another one has ended or does not answer; that "
        f"one's messages say why ({str(error).splitlines()[0][:200]}). The last complete checkpoint is {latest}. The same "
        "command goes on from there; torchrun --max-restarts=3 does so by itself"
    )


def _check_data(run: Run, data: Dataset) -> Batch:
    """The first batch; refuses one that lacks what it declares, and lets the method look before any weight is read."""
    first = first_batch(data, run.trainer.batch_size)
    lacking = sorted(name for name in run.method.needs if getattr(first, name) is None)
    if lacking:
        name = type(run.method).__name__
        raise UserError(f"data: method {name} needs {', '.join(lacking)}, which is declared, but not in the first batch")
    # `check` is no part of the contract: few methods need it.
    look = getattr(run.method, "check", None)
    if look is not None:
        look(first)
    return first


def _check_derivative(run: Run, crew: Crew, first: Batch, world: World, log: RunLog) -> dict[str, float]:
    """How far the student's derivative, of a method that is trained with one, is from differences on the first samples.

    Raises UserError where an exact one is wrong; differences are what their step makes of them.
    """
    # `agreement` is no part of the contract: few methods need it.
    look = getattr(run.method, "agreement", None)
    if look is None:
        return {}
    batch = first.rows(slice(0, CHECKED_ROWS)).to(world.device)
    agreement = look(Nets(crew.networks), batch, Rng(run.trainer.seed, 0, range(batch.size()), world.device))
    record = _mean_over_ranks({"derivative_error": agreement.error}, world)
    error, most = record["derivative_error"], TOLERANCE[run.trainer.precision]
    finding = (
        f"the student's derivative (derivative={agreement.derivative.kind}) differs by {error:.2g} (relative) from differences"
    )
    if agreement.derivative.is_exact and not error <= most:
        raise UserError(
            f"{finding} on the first samples, where {most:g} may be rounding: a part of the network, for instance an attention "
            "kernel, has a wrong tangent. Choose another kernel, or derivative=difference with a step that suits the network"
        )
    advice = "" if error <= most else ": its step does not suit this network; choose another derivative.step"
    log.say(f"{finding}{'' if agreement.derivative.is_exact else f' of other steps{advice}'}")
    return record


def _restore(checkpoints: Checkpoints, path: Path, crew: Crew) -> Progress:
    progress = checkpoints.load(path, crew.state())
    for role in crew.trained.values():
        role.loaded()
    return progress


def _load_weights(address: str, networks: Mapping[str, Network], divided: bool) -> None:
    """checkpoint.load_path: the weights of every trained role, and nothing else of that run."""
    folder, _ = locate(address)
    for name, network in networks.items():
        if name not in FROZEN:
            replaces = divided and not isinstance(network, Shared)  # adapters are parts of two modules
            source = f"{address} (checkpoint.load_path, {name})"
            load_into(network.module, read(f"{folder}:{name}"), source, replaces=replaces)


def _rows(run: Run, world: World, micro: int) -> Tensor:
    """Rows of this rank's micro-batch in the batch of the whole iteration: the same batch however it is divided."""
    size = run.trainer.batch_size
    return torch.arange(size) + (micro * world.num_readers + world.reader) * size


def _open_batches(run: Run, data: Dataset, progress: Progress, world: World, log: RunLog) -> Batches:
    rows = [_rows(run, world, micro) for micro in range(run.trainer.grad_accum)]
    per_step = run.trainer.batch_size * run.trainer.grad_accum * world.num_readers
    end = progress.samples + (run.trainer.max_iter - progress.step) * per_step
    say = log.say if world.is_main else lambda text: print(text, file=sys.stderr)  # each rank reports its own bad samples
    return Batches(data, rows, per_step, run.trainer.seed, end, run.loader, say)


def _parts(run: Run, batches: Batches, progress: Progress, world: World) -> Iterator[iteration.Part]:
    """The micro-batches of one iteration. After a roll-back the same samples get other noise."""
    for micro in range(run.trainer.grad_accum):
        part = batches.take(progress.samples, micro)
        rng = Rng(run.trainer.seed + (progress.rollbacks << 32), progress.step, part.rows, world.device)
        yield iteration.Part(part.batch.to(world.device), rng, part.share / run.trainer.grad_accum)


def _data_metrics(batches: Batches, world: World) -> dict[str, float]:
    """The share of time spent waiting for data, and the number of samples left out, on all ranks."""
    values = _mean_over_ranks(batches.metrics(), world)
    if batches.max_bad:
        batches.leave_out(world.gather(batches.bad_samples()))
        values["data/bad"] = float(batches.num_bad)
    return values


def _with_score(run: Run, progress: Progress, record: Mapping[str, float]) -> Progress:
    """With the value of checkpoint.best_metric, the lower the better, if this iteration has one."""
    value = None if run.checkpoint.best_metric is None else record.get(run.checkpoint.best_metric)
    if value is None:
        return progress
    score = -value if run.checkpoint.best_is == "highest" else value
    is_better = progress.best is None or score < progress.best
    return replace(
        progress, score=score, best=score if is_better else progress.best, stale=0 if is_better else progress.stale + 1
    )


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _mean_over_ranks(values: Mapping[str, float], world: World) -> dict[str, float]:
    """The same numbers on every rank, so that all ranks decide alike."""
    numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=world.device)
    return dict(zip(values, world.mean(numbers).tolist(), strict=True))


def _monitor(run: Run, crew: Crew, data: Dataset, sampler: Sampler, world: World) -> Monitor | None:
    if not run.health.every:
        return None
    conditions = first_batch(data, run.health.num).to(world.device)
    return Monitor(run.health, conditions, sampler, crew.teacher, crew.critic, run.trainer.seed, run.trainer.batch_size)


def _stop_or_return(run: Run, ring: Ring, progress: Progress, crew: Crew, checkpoints: Checkpoints, log: RunLog) -> Progress:
    """Ends the run, or restores the last healthy checkpoint and returns its progress, as the alarm's action says."""
    checkpoints.finish()
    healthy = checkpoints.latest(healthy_only=True)
    if ring.action == "stop" or healthy is None or progress.rollbacks >= run.health.max_rollbacks:
        note = "" if ring.action == "stop" else f" ({progress.rollbacks} roll-backs so far)"
        raise Diverged(
            f"stopped at iteration {progress.step}: {ring}{note}. The last healthy checkpoint is {healthy or 'none'}"
        )
    back = replace(_restore(checkpoints, healthy, crew), rollbacks=progress.rollbacks + 1, wall_s=progress.wall_s)
    checkpoints.return_to(healthy, back)
    log.say(f"rolled back to {healthy}; going on with new noise")
    log.rewind(back.step)
    return back


def _greeting(
    run: Run, data: Dataset, crew: Crew, sampler: Sampler, latest: Path | None, progress: Progress, world: World
) -> str:
    names = {"student": "model (networks.student), a teacher to be:"} if isinstance(sampler, TeacherSampler) else {}
    sizes = ", ".join(
        f"{names.get(name, name)} {sum(p.numel() for p in role.weights.values()):,} weights"
        for name, role in crew.trained.items()
    )
    origin = f"resuming {latest} (iteration {progress.step})" if latest else "from the beginning"
    batch = run.trainer.batch_size * run.trainer.grad_accum * world.num_readers
    return f"{run.job.folder()}: {origin}; {sizes}; {len(data):,} samples, {batch} per iteration"
