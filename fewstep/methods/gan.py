"""The adversarial terms that DMD2, f-distill and LADD share: logits of a head on a network's features, at a noised sample.

    student   softplus(-D(fake))
    head      softplus(D(fake)) + softplus(-D(real))          Goodfellow et al. 2014, arXiv:1406.2661 (non-saturating)
    r1        (D(real) - D(real + r1_std n))^2, both noised with the same t and eps

r1 approximates R1, |grad D(real)|^2 (Mescheder et al. 2018, arXiv:1801.04406), without second derivatives (Lin et al. 2025,
arXiv:2501.08316): divided by r1_std^2 it tends to it. What is perturbed is the real sample, before both are noised alike. Two
copies at different noise levels would punish the head for telling noise levels apart.
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
    head_weight: float = 1.0  # of the head's term, and where it reads the critic of what that term does to the critic
    features: Literal["teacher", "critic"] = "teacher"  # critic: as the DMD2 paper and Predict2.5; its trunk learns from it too
    form: Literal["softplus", "bce", "hinge"] = "softplus"  # bce (with logits) is softplus under Predict2.5's name
    real_noise: Literal["same", "own", "independent"] = "own"  # as the fake's: t and eps, Predict2.5; t, Transfer1; neither
    r1_weight: float = 0.0  # of the approximate R1; FastGen's LADD 0.1
    r1_std: float = 0.1  # in units of the data, whose spread is about 1; FastGen 0.1

    def fools(self, fake: Tensor) -> Tensor:
        """The student's loss: the head is to call its samples real."""
        if self.form == "hinge":
            return -fake.mean()
        return functional.softplus(-fake).mean()

    def tells(self, fake: Tensor, real: Tensor) -> Tensor:
        """The head's loss: to tell the two apart."""
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
        **more: Tensor,
    ) -> Terms:
        """The head's turn: `fake` are features of the noised student sample, `eps` and `t` its noise, x0 the real data.

        `more` are further terms of the same graph, weight 1. Gradients reach the trunk where its weights ask for them.
        """
        if self.real_noise == "independent":
            t = law.draw(rng, path).to(x0.device)
        if self.real_noise != "same":
            eps = rng.normal_like(x0)
        with torch.set_grad_enabled(self.features == "critic"):
            seen = features(trunk, path.add_noise(x0, eps, t), t, cond, head.taps)
        on_fake, on_real = head(fake), head(seen)
        watch = {"logit_fake": on_fake.detach().mean(), "logit_real": on_real.detach().mean()}
        found: dict[str, Tensor | tuple[Tensor, float]] = {**more, "head": (self.tells(on_fake, on_real), self.head_weight)}
        if self.r1_weight:
            moved = x0 + self.r1_std * rng.normal_like(x0)
            with torch.set_grad_enabled(self.features == "critic"):
                seen = features(trunk, path.add_noise(moved, eps, t), t, cond, head.taps)
            found["r1"] = (((on_real - head(seen)) ** 2).mean(), self.r1_weight)
        return Terms.of(watch=watch, **found)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight <= 0:
            yield "weight", f"is {self.weight}: the student would not see its head; leave the GAN out (gan=none)"
        if self.r1_weight and self.r1_std <= 0:
            yield "r1_std", f"must be above 0 where r1_weight is, not {self.r1_std}"
