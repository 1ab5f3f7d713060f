"""The loop: read it from top to bottom. No callbacks; a new ability is a new visible line.

    for each iteration:  whose turn?  ->  micro-batches: losses, backward  ->  clip, check, step, average  ->  look, save
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.batch import Batch
from fewstep.config import to_yaml
from fewstep.data.contract import Dataset
from fewstep.data.order import samples_at
from fewstep.diffusion import Rng, StudentSampler
from fewstep.methods.contract import Nets, Terms, Turn
from fewstep.networks.contract import Network
from fewstep.networks.roles import build
from fewstep.networks.weights import load_into, locate, read
from fewstep.parallel import World, join_world, leave_world, shard
from fewstep.training.checkpoint import Checkpoints, Progress, replace_text
from fewstep.training.errors import Interrupted, TrainingError
from fewstep.training.health import Monitor
from fewstep.training.log import RunLog
from fewstep.training.preview import Scene
from fewstep.training.role import TrainedRole
from fewstep.training.run import Run

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(run: Run) -> dict[str, Any]:
    """Trains, or goes on training, the run in its folder, and returns what its summary.json says."""
    if run.trainer.num_threads:
        torch.set_num_threads(run.trainer.num_threads)
    world = join_world(run.parallel.device, run.parallel.num_replicas, run.parallel.timeout_s)
    try:
        return _train(run, world)
    finally:
        leave_world()


def _train(run: Run, world: World) -> dict[str, Any]:
    began, folder, method = time.monotonic(), run.job.folder(), run.method

    # --- what is cheap to check comes before what is dear to load
    data = run.data.open()
    first = data.batch(torch.arange(min(run.trainer.batch_size, len(data))))
    _check_batch(method, first)
    if world.is_main:
        _write_run_files(run, folder)
    world.barrier()

    # --- networks, on their device, sharded; then the trained ones with their weights, optimisers and average
    nets = build(run.networks, method.roles, run.trainer.seed)
    for role, network in nets.items():
        _place(run, network, world, trained=role != "teacher")
    roles = {
        name: TrainedRole(name, net, run.optim_of(name), run.ema if name == "student" else None)
        for name, net in nets.items()
        if name != "teacher"
    }
    student, asked = roles["student"], Nets(nets)
    sampler = method.sampler(nets["student"].path)

    # --- where to begin: this run's latest checkpoint, other weights, or the beginning
    options = run.checkpoint
    checkpoints = Checkpoints(folder / "checkpoints", world, options.keep_last, options.keep_every, options.async_write)
    world.barrier()
    latest, progress = checkpoints.latest(), Progress()
    if latest is not None:
        progress = _restore(checkpoints, latest, roles)
    elif options.load_path is not None:
        _load_weights(options.load_path, roles)
    last = run.trainer.max_iter
    monitor = _monitor(run, nets, first, sampler, world)
    stop = _Signals()

    title = f"{run.job.name} on {world.size} x {world.device.type}" if world.size > 1 else run.job.name
    with RunLog(folder if world.is_main else None, title, progress.step, last) as log, stop:
        log.say(_greeting(run, folder, data, roles, latest, progress, world))
        numbers = _preview(run, student, nets, sampler, 0, folder, world) if progress.step == 0 else _kept(folder)
        if progress.step == 0:
            _keep(folder, numbers, world)
        undistilled = {f"{name}_undistilled": value for name, value in numbers.items()}

        meter = _Meter()
        while progress.step < last:
            step = progress.step
            turn = method.turn(step)
            for name, role in roles.items():
                role.take_turn(name in turn.trains)

            # --- gradients, summed over micro-batches
            for micro in range(run.trainer.grad_accum):
                rows = _rows(run, world, micro)
                batch = data.batch(samples_at(progress.samples + rows, len(data), run.trainer.seed)).to(world.device)
                rng = Rng(run.trainer.seed + (progress.rollbacks << 32), step, rows, world.device)
                for terms in method.losses(turn, asked, batch, rng):
                    (terms.total / run.trainer.grad_accum).backward()
                    for name in turn.trains:
                        roles[name].absorb()
                    meter.saw(terms)

            # --- steps, each role's own, after a look at the numbers
            for name in turn.trains:
                role, optim = roles[name], run.optim_of(name)
                norm = role.clipped_norm(world)
                _refuse_non_finite(norm, meter, turn, name, step, checkpoints)
                lr = optim.lr_at(step, last)
                role.step(lr, progress.updates)
                meter.saw_step(name, norm, lr)
                if name == "student" and monitor is not None:
                    monitor.saw_gradient(float(norm))
            progress = replace(
                progress,
                step=step + 1,
                samples=progress.samples + run.trainer.batch_size * run.trainer.grad_accum * world.size,
                updates=progress.updates + ("student" in turn.trains),
            )

            # --- looks
            step, ended = progress.step, progress.step == last
            log.advance(step)
            if step % run.trainer.log_every == 0 or ended:
                log.metrics(step, meter.read(world, run))
            if run.preview is not None and run.preview.every and step % run.preview.every == 0 and not ended:
                numbers = _preview(run, student, nets, sampler, step, folder, world)
                log.metrics(step, numbers)
            if monitor is not None and run.health.every and step % run.health.every == 0:
                progress = _look(run, monitor, roles, progress, checkpoints, log)

            # --- saves
            interrupted = world.any(stop.requested) if world.size > 1 else stop.requested
            if progress.step % options.save_iter == 0 or progress.step == last or interrupted:
                checkpoints.save(_state(roles), progress)
            if interrupted and progress.step < last:
                checkpoints.finish()
                raise Interrupted(
                    f"{stop.name} received: iteration {progress.step} of {last} is saved in {checkpoints.latest()}. "
                    "The same command goes on from there"
                )

        checkpoints.finish()
        numbers = _preview(run, student, nets, sampler, last, folder, world)
        log.metrics(last, numbers)
        summary = _summary(run, folder, meter, numbers | undistilled, time.monotonic() - began, progress, world)
        if world.is_main:
            replace_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        log.say(f"done: {folder}/summary.json" + "".join(f"  {name} {value:.4f}" for name, value in numbers.items()))
    return summary


# --- parts of the above, in its order ---------------------------------------------------------------------------------


def _check_batch(method: Any, first: Batch) -> None:
    """Lets a method look at real data before any weight is read. `check` is no part of the contract: few methods need it."""
    check = getattr(method, "check", None)
    if check is not None:
        check(first)


def _place(run: Run, network: Network, world: World, trained: bool) -> None:
    module, compute = network.module, COMPUTE[run.trainer.precision]
    module.requires_grad_(trained).train(trained)
    module.to(world.device)
    if not trained or run.parallel.mode == "ddp" or world.mesh is None:
        module.to(compute) if compute != torch.float32 and any(True for _ in module.parameters()) else None
    shard(
        module,
        network.blocks,
        world,
        mode=run.parallel.mode,
        compute=compute,
        checkpointing=run.trainer.checkpointing,
        compiled=run.trainer.compile,
    )


def _restore(checkpoints: Checkpoints, path: Path, roles: Mapping[str, TrainedRole]) -> Progress:
    progress = checkpoints.load(path, _state(roles))
    for role in roles.values():
        role.loaded()
    return progress


def _state(roles: Mapping[str, TrainedRole]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, role in roles.items() for key, tensor in role.state().items()}


def _load_weights(address: str, roles: Mapping[str, TrainedRole]) -> None:
    folder, _ = locate(address)
    for name, role in roles.items():
        load_into(role.network.module, read(f"{folder}:{name}"), f"{address} (checkpoint.load_path, {name})")


def _rows(run: Run, world: World, micro: int) -> Tensor:
    """Places of this rank's micro-batch in the batch of the whole step: the same batch however it is divided."""
    size = run.trainer.batch_size
    return torch.arange(size) + (micro * world.size + world.rank) * size


def _refuse_non_finite(norm: Tensor, meter: _Meter, turn: Turn, role: str, step: int, checkpoints: Checkpoints) -> None:
    if bool(torch.isfinite(norm + 0 * meter.newest)):
        return
    checkpoints.finish()
    bad = [name for name, value in meter.newest_terms.items() if not bool(torch.isfinite(value))]
    what = f"term '{bad[0]}' is {float(meter.newest_terms[bad[0]])}" if bad else f"every term is finite, but its gradient is {norm}"
    raise TrainingError(
        f"iteration {step}, {turn.name} turn: {what} in the gradient of role '{role}'. No weight was changed by this iteration; "
        f"the last checkpoint is {checkpoints.latest() or 'none'}. Look at the data of this iteration, or lower optim.lr"
    )


class _Meter:
    """Sums of what is logged, on the device: reading a number waits for it, so that is done once per log line."""

    def __init__(self) -> None:
        self.newest = torch.zeros(())
        self.newest_terms: dict[str, Tensor] = {}
        self.last: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._began, self._steps = time.monotonic(), 0

    def saw(self, terms: Terms) -> None:
        self.newest, self.newest_terms = terms.total.detach(), {n: v.detach() for n, v in terms.values.items()}
        for name, value in (*self.newest_terms.items(), *terms.watch.items()):
            self._add(f"loss/{name}" if name in self.newest_terms else f"watch/{name}", value.detach())

    def saw_step(self, role: str, norm: Tensor, lr: float) -> None:
        self._add(f"grad_norm/{role}", norm.detach())
        self.last[f"lr/{role}"] = lr
        self._steps += 1

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, world: World, run: Run) -> dict[str, float]:
        """Means since the last reading, over all ranks; then starts anew."""
        means = {name: float(world.mean(total / self._counts[name])) for name, total in sorted(self._sums.items())}
        seconds = time.monotonic() - self._began
        per_step = run.trainer.batch_size * run.trainer.grad_accum * world.size
        self.last |= means | {"samples_per_s": self._steps * per_step / seconds, "memory_gib": peak_memory_gib(world.device)}
        self._sums, self._counts, self._began, self._steps = {}, {}, time.monotonic(), 0
        return self.last


def _monitor(run: Run, nets: Mapping[str, Network], first: Batch, sampler: StudentSampler, world: World) -> Monitor | None:
    if not run.health.every:
        return None
    some = first.rows(slice(0, run.health.num)).to(world.device)
    return Monitor(run.health, some, sampler, nets.get("teacher"), nets.get("critic"), run.trainer.seed)


def _look(
    run: Run, monitor: Monitor, roles: Mapping[str, TrainedRole], progress: Progress, checkpoints: Checkpoints, log: RunLog
) -> Progress:
    """Logs the monitors and does what their alarms ask; the progress to go on from."""
    values = monitor.look(roles["student"].network)
    log.metrics(progress.step, {f"health/{name}": value for name, value in values.items()})
    rings = monitor.rings(values)
    for ring in rings:
        log.say(f"ALARM at iteration {progress.step}: {ring}")
    action = rings[-1].action if rings else "off"
    if action in ("off", "warn"):
        return replace(progress, healthy=not rings)
    checkpoints.finish()
    healthy = checkpoints.latest(healthy_only=True)
    if action == "stop" or healthy is None or progress.rollbacks >= run.health.max_rollbacks:
        why = "" if action == "stop" else f" ({progress.rollbacks} roll-backs so far, healthy checkpoint: {healthy or 'none'})"
        raise TrainingError(
            f"stopped at iteration {progress.step}: {rings[-1]}{why}. The last healthy checkpoint is {healthy or 'none'}"
        )
    back = _restore(checkpoints, healthy, roles)
    log.say(f"rolled back to {healthy}; going on with new noise")
    return replace(back, rollbacks=progress.rollbacks + 1)


def _preview(
    run: Run, student: TrainedRole, nets: Mapping[str, Network], sampler: StudentSampler, step: int, folder: Path, world: World
) -> dict[str, float]:
    if run.preview is None:
        return {}
    with student.averaged(), torch.no_grad():
        scene = Scene(
            student.network, nets.get("teacher"), sampler, step, folder / "previews", world.device, world.is_main
        )
        return dict(run.preview.show(scene))


def _keep(folder: Path, numbers: Mapping[str, float], world: World) -> None:
    if world.is_main:
        replace_text(folder / "previews" / "undistilled.json", json.dumps(dict(numbers)))


def _kept(folder: Path) -> dict[str, float]:
    path = folder / "previews" / "undistilled.json"
    return json.loads(path.read_text()) if path.is_file() else {}


class _Signals:
    """Within, SIGTERM and SIGINT are remembered instead of obeyed; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.requested, self.name = False, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread (a notebook, a server): then signals are its business
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested, self.name = True, signal.Signals(number).name
        for own in (signal.SIGTERM, signal.SIGINT):
            signal.signal(own, self._before.get(own, signal.SIG_DFL))


def _write_run_files(run: Run, folder: Path) -> None:
    (folder / "previews").mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.yaml", to_yaml(run))
    replace_text(folder / "env.json", json.dumps(environment(), indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Versions and machine, as they stand in env.json and summary.json."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "fewstep": fewstep.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "gpu": gpu,
        "command": sys.argv,
    }


def _greeting(
    run: Run, folder: Path, data: Dataset, roles: Mapping[str, TrainedRole], latest: Path | None, progress: Progress, world: World
) -> str:
    sizes = ", ".join(f"{name} {sum(p.numel() for p in role.weights.values()):,} weights" for name, role in roles.items())
    origin = f"resuming {latest} (iteration {progress.step})" if latest else "from the beginning"
    batch = run.trainer.batch_size * run.trainer.grad_accum * world.size
    return f"{folder}: {origin}; {sizes}; {len(data):,} samples, {batch} per iteration"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: of the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _summary(
    run: Run, folder: Path, meter: _Meter, numbers: Mapping[str, float], seconds: float, progress: Progress, world: World
) -> dict[str, Any]:
    values = {"recipe": run.job.name, "method": run.method.kind, "step": progress.step, "samples": progress.samples}  # type: ignore[attr-defined]
    values |= {"student_updates": progress.updates, "rollbacks": progress.rollbacks} | meter.last | dict(numbers)
    values |= {"wall_s": round(seconds, 2), "peak_memory_gib": round(peak_memory_gib(world.device), 3)}
    versions = {key: value for key, value in environment().items() if key in ("fewstep", "python", "torch")}
    return values | {"device": str(world.device), "num_processes": world.size, "versions": versions}
