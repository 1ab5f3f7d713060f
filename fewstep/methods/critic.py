"""The critic: a denoiser of the student's own samples, which knows their score at every noise level.

    L = E |f(a x + s eps, t) - target|^2,   x a student sample without gradient      Yin et al. 2023, arXiv:2311.18828, eq. 6

Where a GAN reads the critic's features, its head is trained on the same graph (Yin et al. 2024, arXiv:2405.14867, section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.batch import Batch
from fewstep.diffusion import Path, Prediction, Rng, features, on_path, times
from fewstep.diffusion.prediction import Kind
from fewstep.methods.contract import Nets, Reduction, Terms, free_mask, reduced
from fewstep.methods.gan import Gan


@dataclass(frozen=True)
class Critic:
    space: Kind = "velocity"  # where its error is measured: "eps" Transfer1, "x0" FastGen
    times: times.AnyTimes | None = None  # noise it learns at; None: that at which the scores are compared
    draws: int = 1  # noise levels at which a critic turn uses one student sample
    reduction: Reduction = "mean"

    def losses(
        self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng, law: times.Times, gan: Gan | None = None
    ) -> Iterator[Terms]:
        """The terms of a critic turn on `sample`; with a GAN also those of its head.

        `law` are the times at which the scores are compared, for a critic without times of its own.
        """
        for _ in range(self.draws):
            yield from self._draw(path, nets, sample, batch, rng, self.times or law, gan)

    def _draw(
        self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng, law: times.Times, gan: Gan | None
    ) -> Iterator[Terms]:
        share = 1 / self.draws
        t = law.draw(rng, path).to(sample.device)
        eps = rng.normal_like(sample)
        truth = Prediction.exact(sample, eps, t, path)
        critic = on_path(nets.critic, path)
        taps = nets.head.taps if gan is not None and gan.features == "critic" else ()
        answer = critic(truth.x_t, t, batch.cond, taps=taps)
        error = (answer.read(self.space) - truth.read(self.space)) ** 2
        loss = reduced(error, free_mask(batch.cond, error), self.reduction)
        if gan is None:
            yield Terms.of(critic=(loss, share))
            return
        assert batch.x0 is not None
        if gan.features == "critic":  # one graph: the head's gradient goes on into the trunk
            terms = gan.head_terms(
                nets.head, critic, answer.features, batch.x0, eps, t, law, path, batch.cond, rng, critic=loss
            )
            yield terms.scaled(share)
            return
        x_t = truth.x_t
        del answer, truth, error  # the critic's graph is gone before the head's begins
        yield Terms.of(critic=(loss, share))
        del loss
        teacher = on_path(nets.teacher, path)
        with torch.no_grad():
            fake = features(teacher, x_t, t, batch.cond, nets.head.taps)
        yield gan.head_terms(nets.head, teacher, fake, batch.x0, eps, t, law, path, batch.cond, rng).scaled(share)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.draws < 1:
            yield "draws", f"must be at least 1, not {self.draws}"
