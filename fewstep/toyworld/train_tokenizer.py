"""Trains the toy world's video tokenizer, or its decoder alone, in a loop of its own: a tokenizer is no denoiser.

    python -m fewstep.toyworld.train_tokenizer tokenizer trainer.max_iter=6500
    python -m fewstep.toyworld.train_tokenizer decoder tokenizer.pretrained=fewstep/toyworld/stack/vae
    torchrun --nproc_per_node 2 -m fewstep.toyworld.train_tokenizer tokenizer trainer.batch_size=4

KEY=VALUE changes a setting of `TokenizerRun`. The run folder, checkpoints, moving average and log are those of `fewstep train`;
the same command resumes, with equal bits.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

import fewstep
from fewstep.config import ConfigError, apply_overrides, check, to_yaml
from fewstep.data.folder.dataset import Folder
from fewstep.data.loader import Batches
from fewstep.diffusion import Rng
from fewstep.environment import output_root
from fewstep.errors import UserError
from fewstep.files import write_json, write_text
from fewstep.methods.contract import Turn
from fewstep.networks.roles import drawing
from fewstep.parallel import World, join_world, leave_world, place
from fewstep.toyworld.autoencode import Autoencode, Networks
from fewstep.toyworld.clip_critic import ClipCriticSpec
from fewstep.toyworld.perceptual import PerceptualSpec
from fewstep.toyworld.tokenizer import TokenizerSpec
from fewstep.training import iteration
from fewstep.training.alone import alone_in
from fewstep.training.checkpoint import Checkpoints, Progress
from fewstep.training.crew import Crew
from fewstep.training.ema import Ema
from fewstep.training.errors import Interrupted, TrainingError
from fewstep.training.guard import refuse_non_finite
from fewstep.training.heap import keep_freed_memory
from fewstep.training.log import RunLog
from fewstep.training.meter import Meter
from fewstep.training.optim import Optim
from fewstep.training.role import TrainedRole
from fewstep.training.run import Job
from fewstep.training.run_folder import environment
from fewstep.training.signals import Signals

PERCEPTUAL = "perceptual.safetensors"  # below the output root
LATENT_CHANNELS = 8


@dataclass(frozen=True)
class Trainer:
    max_iter: int = 10000  # iterations; each trains the tokenizer and, if there is one, the critic
    batch_size: int = 8  # clips per process
    seed: int = 0
    num_threads: int = 1  # CPU threads of torch
    log_every: int = 100  # iterations between two lines of metrics.jsonl
    save_iter: int = 500  # iterations between two checkpoints; the last iteration always writes one
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class TokenizerRun:
    """All settings of a training of the tokenizer."""

    job: Job
    tokenizer: TokenizerSpec
    loss: Autoencode
    perceptual: PerceptualSpec
    data: Folder
    optim: Optim
    critic: ClipCriticSpec = ClipCriticSpec()
    critic_optim: Optim = Optim(lr=4e-4, betas=(0.5, 0.99), weight_decay=0.0, clip=None)
    ema: Ema = Ema(beta=0.999)
    trainer: Trainer = Trainer()

    def problems(self) -> Iterable[tuple[str, str]]:
        for name in ("max_iter", "batch_size", "num_threads", "log_every", "save_iter"):
            if getattr(self.trainer, name) < 1:
                yield f"trainer.{name}", f"must be at least 1, not {getattr(self.trainer, name)}"

    def optim_of(self, role: str) -> Optim:
        return self.critic_optim if role == "critic" else self.optim


def tokenizer() -> TokenizerRun:
    """The tokenizer: 17 x 32 x 32 pixels to 5 x 4 x 4 latents of 8 channels."""
    return TokenizerRun(
        job=Job(project="toyworld", group="basic", name="toy_tokenizer"),
        tokenizer=TokenizerSpec(latent_channels=LATENT_CHANNELS),
        loss=Autoencode(noise=0.05, perceptual=1.0),
        perceptual=PerceptualSpec(str(output_root() / PERCEPTUAL)),
        data=Folder("datasets/toyworld/train", text=None),
        optim=Optim(lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, schedule="cosine", warmup_iters=200, clip=1.0),
    )


def decoder() -> TokenizerRun:
    """The tokenizer's decoder alone, trained further against a critic; every latent stays what it is."""
    first = tokenizer()
    return replace(
        first,
        job=replace(first.job, name="toy_decoder"),
        tokenizer=TokenizerSpec(pretrained=f"{fewstep.TOY}/vae", trains="decoder"),
        loss=replace(first.loss, adversarial=1.0),
        optim=replace(first.optim, lr=4e-4, betas=(0.5, 0.99)),
        trainer=replace(first.trainer, max_iter=8000, batch_size=4),
    )


RUNS = {"tokenizer": tokenizer, "decoder": decoder}


def train(run: TokenizerRun) -> dict[str, Any]:
    """Trains, or resumes, the run in its folder, and returns the contents of its summary.json."""
    check(run)
    torch.set_num_threads(run.trainer.num_threads)
    world = join_world(run.trainer.device, None, 1800.0)
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        with alone_in(run.job.folder()) if world.is_main else nullcontext():
            return _train(run, world)
    finally:
        leave_world()


def _train(run: TokenizerRun, world: World) -> dict[str, Any]:
    began = time.monotonic()
    folder, trainer = run.job.folder(), run.trainer
    data = run.data.open()

    # --- networks, optimisers and the average of the tokenizer
    with drawing("student", trainer.seed):  # the random numbers of the shipped tokenizer's first weights
        networks = Networks(run.tokenizer.build())
    if run.loss.perceptual:
        networks = replace(networks, perceptual=run.perceptual.build())
    if run.loss.adversarial:
        with drawing("critic", trainer.seed):
            networks = replace(networks, critic=run.critic.build())
    for network, is_trained in ((networks.tokenizer, True), (networks.critic, True), (networks.perceptual, False)):
        if network is not None:
            place(network.module, (), world, mode="ddp", compute=torch.float32, trained=is_trained)
    trained: dict[str, Any] = {"tokenizer": networks.tokenizer} | ({"critic": networks.critic} if networks.critic else {})
    roles = {
        name: TrainedRole(name, network, run.optim_of(name), run.ema if name == "tokenizer" else None)
        for name, network in trained.items()
    }
    crew, turn = Crew({}, roles, ()), Turn("tokenizer", tuple(roles))

    # --- where to begin: this run's latest checkpoint, or the beginning
    checkpoints = Checkpoints(folder / "checkpoints", world, keep_last=2, keep_every=None, async_write=False)
    latest = checkpoints.latest()
    progress = Progress(step=0) if latest is None else checkpoints.load(latest, crew.state())
    for role in roles.values():
        role.loaded()
    earlier_s = progress.wall_s
    if world.is_main:
        write_text(folder / "config.yaml", to_yaml(run))
        write_json(folder / "env.json", environment())
    world.barrier()

    per_step = trainer.batch_size * world.size
    rows = torch.arange(trainer.batch_size) + world.rank * trainer.batch_size
    end = progress.samples + (trainer.max_iter - progress.step) * per_step
    log = RunLog(folder if world.is_main else None, run.job.name, progress.step, trainer.max_iter)
    with log, Signals() as stop, checkpoints, Batches(data, [rows], per_step, trainer.seed, end, say=log.say) as batches:
        log.say(f"{folder}: " + (f"resuming {latest}" if latest else "from the beginning") + f"; {len(data):,} clips")
        meter = Meter()
        while progress.step < trainer.max_iter:
            # --- gradients
            meter.begin_iteration()
            for role in roles.values():
                role.take_turn(True)
            part = batches.take(progress.samples, 0)
            pixels = part.batch.to(world.device).x0
            assert pixels is not None
            for terms in run.loss.losses(networks, pixels, Rng(trainer.seed, progress.step, part.rows, world.device)):
                (terms.total * part.share).backward()
                meter.add(terms)

            # --- each role's own step
            norms = iteration.norms(crew, turn, world)
            sizes = refuse_non_finite(norms, meter.terms, crew, turn, progress.step, world, checkpoints)
            rates = {name: run.optim_of(name).lr_at(progress.step, trainer.max_iter) for name in norms}
            for name, size in sizes.items():
                roles[name].step(rates[name], size, progress.updates)
            meter.add_step(norms, rates)
            step = progress.step + 1
            wall_s = earlier_s + time.monotonic() - began
            progress = replace(progress, step=step, samples=progress.samples + per_step, updates=step, wall_s=wall_s)

            # --- log, save
            has_ended = step == trainer.max_iter
            if step % trainer.log_every == 0 or has_ended:
                values = meter.read(world, per_step)
                log.losses(step, values)
                log.metrics(step, values)
            log.advance(step)
            (is_interrupted,) = world.any(stop.requested)
            if step % trainer.save_iter == 0 or has_ended or is_interrupted:
                checkpoints.save(crew.state(), progress)
            if is_interrupted and not has_ended:
                raise Interrupted(f"{stop.name} received: iteration {step} is saved in {checkpoints.latest()}")
        results = {"recipe": run.job.name, "step": progress.step, **log.last, "wall_s": round(progress.wall_s, 2)}
        if world.is_main:
            write_json(folder / "summary.json", results)
        log.say(f"done: {folder}/summary.json")
    return results


def main(words: Sequence[str]) -> int:
    """What the command does; the exit status is 0 done, 1 failed, 2 wrong use."""
    try:
        if not words or words[0] not in RUNS:
            raise ConfigError([("", f"which run? python -m fewstep.toyworld.train_tokenizer {' | '.join(RUNS)} KEY=VALUE ..")])
        train(apply_overrides(RUNS[words[0]](), words[1:]))
    except (UserError, TrainingError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
