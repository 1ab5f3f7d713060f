"""SiD: score identity distillation, without data. The student lowers the Fisher divergence itself, not a KL's.

    E |phi - psi|^2 = E (phi - psi) . (phi - x)     for the exact psi      Zhou et al. 2024, arXiv:2404.04057
    L = w [ (1 - alpha) |phi - psi|^2 + (phi - psi) . (psi - x) ]          the second less alpha times the first
    w = 1 / mean |x - phi|, one per sample

phi and psi are the x0 of teacher and critic at the noised student sample x. Unlike DMD2's, the gradient goes through both of
them (their weights stay as they are), so that a student turn holds two more graphs. The critic learns as in DMD2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fewstep.batch import Batch
from fewstep.config import kind
from fewstep.diffusion import Path, Rng, guided, on_path
from fewstep.methods.contract import Nets, Reduction, Terms, free_mask, reduced
from fewstep.methods.dmd2 import DMD2, normalised


@kind("sid", group="method")
@dataclass(frozen=True)
class SiD(DMD2):
    alpha: float = 1.0  # 0.5 .. 1.2 work in the paper, 1.0 and 1.2 best; 0 is the plain square, which a late critic biases
    reduction: Reduction = "mean"

    def _student_terms(self, path: Path, nets: Nets, sample: Tensor, batch: Batch, rng: Rng) -> Terms:
        t = self.times.draw(rng, path).to(sample.device)
        x_t, mask = path.add_noise(sample, rng.normal_like(sample), t), free_mask(batch.cond, sample)
        teacher = guided(on_path(nets.teacher, path), batch.negative, self.guidance, interval=self.guidance_interval)
        phi, psi = teacher(x_t, t, batch.cond).x0, on_path(nets.critic, path)(x_t, t, batch.cond).x0
        product = (phi - psi) * ((1 - self.alpha) * (phi - psi) + (psi - sample))
        weight = normalised(phi.new_ones(phi.shape), sample, phi, mask, self.normalizer_min, self.normalizer_add).detach()
        gap = reduced((phi - psi).detach() ** 2, mask, "mean")
        return Terms.of(sid=reduced(weight * product, mask, self.reduction), watch={"fisher": gap})

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        for name in ("gan", "guidance_times"):
            if getattr(self, name) is not None:
                yield name, "is no part of SiD: leave it out"
        if self.regression_weight:
            yield "regression_weight", "is no part of SiD: leave it at 0"
