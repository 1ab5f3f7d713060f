"""Adversarial terms: logits of a head on a network's features at a noised sample. DMD2, f-distill and LADD use them.

    student   softplus(-D(fake))
    head      softplus(D(fake)) + softplus(-D(real))          Goodfellow et al. 2014, arXiv:1406.2661 (non-saturating)
    r1        (D(real) - D(real + r1_std n))^2, both noised with the same t and eps

r1 approximates R1, |grad D(real)|^2 (Mescheder et al. 2018, arXiv:1801.04406), without second derivatives (Lin et al. 2025,
arXiv:2501.08316): divided by r1_std^2 it tends to it. The real sample is perturbed before both copies are noised with the same
t and eps: with different noise levels the term would punish the head for telling noise levels apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.batch import Condition
from fewstep.diffusion import Denoiser, Path, Rng, features, times
from fewstep.methods.contract import Head, Terms


@dataclass(frozen=True)
class Gan:
    weight: float = 1e-3  # of the student's term. Transfer1 1e-3; FastGen's video recipes 0.03
    head_weight: float = 1.0  # of the head's term; with features=critic it scales what that term does to the critic too
    features: Literal["teacher", "critic"] = "teacher"  # critic: DMD2's paper, Predict2.5; the head's gradient trains it too
    form: Literal["softplus", "bce", "hinge"] = "softplus"  # bce: Predict2.5's name for softplus
    real_noise: Literal["same", "own", "independent"] = "own"  # t and eps of the fake: Predict2.5; its t, new eps: Transfer1
    r1_weight: float = 0.0  # of the approximate R1; FastGen's LADD 0.1
    r1_std: float = 0.1  # in units of the data, whose spread is about 1; FastGen 0.1

    def student_loss(self, fake: Tensor) -> Tensor:
        """Low where the head takes the student's samples for real; `fake` are its logits on them."""
        if self.form == "hinge":
            return -fake.mean()
        return functional.softplus(-fake).mean()

    def head_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        """Low where the head tells student samples from real ones, by its logits on both."""
        if self.form == "hinge":
            return functional.relu(1 + fake).mean() + functional.relu(1 - real).mean()
        return functional.softplus(fake).mean() + functional.softplus(-real).mean()

    def head_terms(
        self,
        head: Head,
        trunk: Denoiser,
        fake: Sequence[Tensor],
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        law: times.Times,
        path: Path,
        cond: Condition,
        rng: Rng,
        **others: Tensor,
    ) -> Terms:
        """The terms of the head: `fake` are features of the noised student sample, `eps` and `t` its noise, x0 the real data.

        `others` are further terms of the same graph, weight 1. Gradients reach the trunk where its weights require them.
        """
        if self.real_noise == "independent":
            t = law.draw(rng, path).to(x0.device)
        if self.real_noise != "same":
            eps = rng.normal_like(x0)

        def logits(clean: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.features == "critic"):
                real = features(trunk, path.add_noise(clean, eps, t), t, cond, head.taps)
            return head(real)

        on_fake = head(fake)
        on_real = logits(x0)
        watch = {"logit_fake": on_fake.detach().mean(), "logit_real": on_real.detach().mean()}
        terms: dict[str, Tensor | tuple[Tensor, float]] = {
            **others,
            "head": (self.head_loss(on_fake, on_real), self.head_weight),
        }
        if self.r1_weight:
            moved = x0 + self.r1_std * rng.normal_like(x0)
            terms["r1"] = (((on_real - logits(moved)) ** 2).mean(), self.r1_weight)
        return Terms.of(watch=watch, **terms)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight <= 0:
            yield "weight", f"is {self.weight}: the head would not change the student; leave the GAN out (gan=none)"
        if self.r1_weight and self.r1_std <= 0:
            yield "r1_std", f"must be above 0 where r1_weight is, not {self.r1_std}"
