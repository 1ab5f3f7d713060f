"""Is the run still healthy? Distribution matching fails quietly: its losses look alike at the start, the end and in collapse.

Every `every` iterations the student generates for a fixed set of conditions and noises, and is held against its teacher, or
against the data where there is no teacher or where the data are pairs, which the teacher made. Each monitor is a number with a
limit, and a limit that is passed rings an alarm by name:

    collapse    mean distance between two of the student's samples, as a share of the reference's        rings below its limit
    drift       largest shift of a channel's mean, in the reference's spreads, or |log| of the spreads' ratio   rings above
    grad_ratio  the student's largest gradient norm since the last look over the median of recent ones   rings above
    critic_lag  the critic's denoising error on student samples over the teacher's                       rings above
    long_drift  how far the last segment of long clips has moved from the first (long_frames)            rings above
    sink_rise   how far long clips return to the likeness of their beginning (evaluation/long_run.py)    rings above
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.diffusion import Denoiser, Rng, Sampler, TeacherSampler, on_path
from fewstep.evaluation import long_run

Action = Literal["warn", "stop", "rollback", "off"]
SEVERITY: tuple[Action, ...] = ("off", "warn", "stop", "rollback")


@dataclass(frozen=True)
class Alarm:
    limit: float
    action: Action = "warn"  # stop: end the run; rollback: return to the last healthy checkpoint, with new noise


@dataclass(frozen=True)
class Health:
    every: int | None = None  # iterations between two looks; none: never
    num: int = 64  # samples of a look
    reference_calls: int = 16  # network calls of the teacher for its samples, made once
    guidance: float = 1.0  # w of the teacher for them; set it to the method's
    collapse: Alarm = Alarm(0.5)
    drift: Alarm = Alarm(0.5)
    grad_ratio: Alarm = Alarm(20.0)
    critic_lag: Alarm = Alarm(2.0)
    long_frames: int | None = None  # latent frames of a causal student's long clips, 16 at most; none: no look at such
    long_drift: Alarm = Alarm(1.0)
    sink_rise: Alarm = Alarm(0.5)
    max_rollbacks: int = 2  # then the run stops

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.every is not None and self.every < 1:
            yield "every", f"must be at least 1, or none for no looks, not {self.every}"
        if self.long_frames is not None and self.long_frames < 4:
            yield "long_frames", f"is {self.long_frames}: clips longer than those of training, 4 latent frames at least"
        if self.num < 2:
            yield "num", f"is {self.num}: diversity is a distance between samples, and needs two"


@dataclass(frozen=True)
class Ring:
    """An alarm that rang."""

    monitor: str
    value: float
    limit: float
    action: Action

    def __str__(self) -> str:
        side = "below" if self.monitor == "collapse" else "above"
        action = f"health.{self.monitor}.action={self.action}"
        return f"{self.monitor} is {self.value:.3g}, {side} its limit of {self.limit:g} ({action})"


@dataclass
class Monitor:
    """The looks of one run: the fixed conditions and noises, the reference samples, and recent gradient norms."""

    config: Health
    conditions: Batch  # `num` samples of the data, always the same
    sampler: Sampler
    teacher: Denoiser | None
    critic: Denoiser | None
    seed: int
    chunk: int = 64  # samples asked at once
    _norms: deque[float] = field(default_factory=lambda: deque[float](maxlen=101))
    _highest: float = 0.0  # norm since the last look
    _reference: Tensor | None = None

    def add_gradient_norm(self, norm: float) -> None:
        self._norms.append(norm)
        self._highest = max(self._highest, norm)

    @torch.no_grad()
    def look(self, student: Denoiser) -> dict[str, float]:
        """The value of every monitor that can be had here."""
        parts = torch.arange(self.conditions.size()).split(self.chunk)
        samples = torch.cat([self._sample(student, rows) for rows in parts])
        if self._reference is None:
            self._reference = torch.cat([self._make_reference(rows) for rows in parts])
        values = compare(samples, self._reference)
        if len(self._norms) > 10:
            values["grad_ratio"] = self._highest / max(statistics.median(self._norms), 1e-12)
        self._highest = 0.0
        if self.config.long_frames is not None:
            values |= self._long(student, self.config.long_frames)
        if self.critic is not None and self.teacher is not None:
            lags = [self._errors(samples[rows], rows, self.critic, self.teacher) for rows in parts]
            critic, teacher = (sum(lag[i] for lag in lags) for i in (0, 1))
            values["critic_lag"] = critic / max(teacher, 1e-12)
        return values

    def rings(self, values: Mapping[str, float]) -> list[Ring]:
        """The alarms that these values ring, the gravest last. A value that is no number rings too."""
        rings: list[Ring] = []
        for name, value in values.items():
            alarm: Alarm | None = {
                "collapse": self.config.collapse, "drift": self.config.drift,
                "grad_ratio": self.config.grad_ratio, "critic_lag": self.config.critic_lag,
                "long_drift": self.config.long_drift, "sink_rise": self.config.sink_rise,
            }.get(name)  # fmt: skip
            if alarm is None or alarm.action == "off":
                continue
            fine = value >= alarm.limit if name == "collapse" else value <= alarm.limit
            if not fine:
                rings.append(Ring(name, value, alarm.limit, alarm.action))
        return sorted(rings, key=lambda ring: SEVERITY.index(ring.action))

    def _rng(self, rows: Tensor, device: torch.device) -> Rng:
        return Rng(self.seed, 0, rows, device)

    def _sample(self, student: Denoiser, rows: Tensor) -> Tensor:
        part = self.conditions.rows(rows)
        assert part.x0 is not None
        rng = self._rng(rows, part.x0.device)
        return self.sampler(student, rng.normal_like(part.x0), part.cond, rng).float()

    def _long(self, student: Denoiser, frames: int) -> dict[str, float]:
        """Monitors of clips of that many latent frames, longer than those of training."""
        rows = torch.arange(min(16, self.conditions.size()))
        part = self.conditions.rows(rows)
        assert part.x0 is not None
        rng = self._rng(rows, part.x0.device)
        noise = rng.normal((part.x0.shape[1], frames, *part.x0.shape[3:]), part.x0.dtype).to(part.x0.device)
        return long_run.monitors(self.sampler(student, noise, part.cond, rng).float(), part.x0.shape[2])

    def _make_reference(self, rows: Tensor) -> Tensor:
        part = self.conditions.rows(rows)
        assert part.x0 is not None
        if self.teacher is None or part.noise is not None:  # pairs: what the teacher made, with its guidance
            return part.x0.float()
        noise = self._rng(rows, part.x0.device).normal_like(part.x0)  # that of the student's sample
        sampler = TeacherSampler.for_path(self.teacher.path)
        guidance = self.config.guidance if part.negative is not None else 1.0  # there is nothing to lead away from
        sampler = replace(sampler, num_steps=self.config.reference_calls, guidance=guidance)
        return sampler(self.teacher, noise, part.cond, negative=part.negative).float()

    def _errors(self, samples: Tensor, rows: Tensor, critic: Denoiser, teacher: Denoiser) -> tuple[float, float]:
        """Denoising errors of critic and teacher on student samples, summed over these rows and four noise levels."""
        rng, cond, path = self._rng(rows, samples.device), self.conditions.rows(rows).cond, teacher.path
        errors = [0.0, 0.0]
        for fraction in (0.3, 0.5, 0.7, 0.9):
            noise = rng.normal_like(samples)
            t = path.time_of(torch.full((len(samples),), fraction / (1 - fraction), dtype=torch.float64)).to(samples.device)
            x_t = path.add_noise(samples, noise, t)
            for i, net in enumerate((on_path(critic, path), teacher)):
                errors[i] += float(((net(x_t, t, cond).eps - noise) ** 2).sum())
        return errors[0], errors[1]


def compare(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """collapse and drift of `samples` against `reference`, (B, C, ...) each."""
    axes = (0, *range(2, samples.ndim))
    mean, spread = samples.mean(axes), samples.std(axes)
    reference_mean, reference_spread = reference.mean(axes), reference.std(axes).clamp(min=1e-12)
    shift = ((mean - reference_mean) / reference_spread).abs().max()
    stretch = (spread.clamp(min=1e-12) / reference_spread).log().abs().max()
    return {
        "collapse": float(_pair_distance(samples) / _pair_distance(reference).clamp(min=1e-12)),
        "drift": float(torch.maximum(shift, stretch)),
    }


def _pair_distance(x: Tensor) -> Tensor:
    flat = x.flatten(1).double()
    return torch.pdist(flat).mean()
