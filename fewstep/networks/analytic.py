"""A Gaussian mixture as a network: the exact answer at every noise level, on every path. The perfect teacher.

If x0 ~ sum_k w_k N(m_k, diag c_k^2) then x_t ~ sum_k w_k N(a m_k, diag(a^2 c_k^2 + s^2)), and given the component
    E[x0 | x_t, k]  = m_k + a c_k^2 / (a^2 c_k^2 + s^2) (x_t - a m_k)
    E[eps | x_t, k] =         s     / (a^2 c_k^2 + s^2) (x_t - a m_k)
so that both, weighted by the posterior of k, are finite wherever a^2 c_k^2 + s^2 is not 0: at both ends of every path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.config import kind
from fewstep.diffusion import Cache, Path, Prediction, RectifiedFlow, Rng
from fewstep.diffusion.path import AnyPath, spread, working_dtype
from fewstep.diffusion.prediction import coefficients_for
from fewstep.errors import UserError
from fewstep.networks.contract import NetworkDefaults, NetworkSpec
from fewstep.untrusted.text import fault_of


class GaussianMixture(NetworkDefaults):
    """means: (K, *shape); stds: K numbers, or of means' shape; weights: K, any positive; labels: class of each component.

    A condition with a label sees the components of that class only; label -1 and no label see all.
    """

    def __init__(
        self,
        means: Tensor | Sequence[object],
        stds: Tensor | Sequence[float] | float = 1.0,
        weights: Tensor | Sequence[float] | None = None,
        *,
        path: Path | None = None,
        labels: Tensor | Sequence[int] | None = None,
    ):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim < 2:
            raise UserError(f"means must be (components, *shape), but has shape {tuple(self.means.shape)}")
        num, ones = len(self.means), [1] * (self.means.ndim - 1)
        stds = torch.as_tensor(stds, dtype=torch.float64)
        self.stds = (stds.reshape(-1, *ones) if stds.ndim <= 1 else stds).expand_as(self.means)
        weights = torch.ones(num) if weights is None else weights
        weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = weights / weights.sum()
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
        for name, value in (("weights", self.weights), ("labels", self.labels)):
            if value is not None and len(value) != num:
                raise UserError(f"{name} has {len(value)} entries for {num} components")
        self.path: Path = RectifiedFlow() if path is None else path
        self.module = nn.Module()  # nothing to train
        self.blocks: tuple[nn.Module, ...] = ()

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[int] = (), cache: Cache | None = None
    ) -> Prediction:
        if taps:
            raise UserError("a Gaussian mixture has no blocks to tap")
        x = x_t.to(working_dtype(x_t))
        posterior, centred, variance = self._posterior(x, t, cond)
        a, s, da, ds = (c.unsqueeze(1) if c.ndim else c for c in coefficients_for(self.path, t, x))
        means, stds = self.means.to(x), self.stds.to(x)
        x0 = means + a * stds**2 * centred / variance
        eps = s * centred / variance
        velocity = (posterior * (da * x0 + ds * eps)).sum(1)
        return Prediction(x, t, self.path, velocity)

    def score(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """Gradient of log_prob."""
        posterior, centred, variance = self._posterior(x_t, t, cond or Condition())
        return (posterior * -centred / variance).sum(1)

    def log_prob(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """(B,) log density of x_t at noise level t."""
        return torch.logsumexp(self._log_joint(x_t, t, cond or Condition())[0], 1)

    def sample(self, rng: Rng, label: Tensor | None = None) -> Tensor:
        """One x0 for every row of `rng`, float32; with `label` (B,), of that class."""
        log_weights = self._log_weights(len(rng.rows), label).exp()
        place = (rng.uniform()[:, None] >= (log_weights / log_weights.sum(1, keepdim=True)).cumsum(1)).sum(1)
        component = place.clamp(max=len(self.means) - 1)
        noise = rng.normal(self.means.shape[1:], torch.float64)
        return (self.means[component] + self.stds[component] * noise).float()

    def ode_map(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x_t at t = 0, in closed form; a single Gaussian only.

        Each axis keeps its place in units of its own spread: x0 = m + c (x_t - a m) / sqrt(a^2 c^2 + s^2).
        """
        if len(self.means) != 1:
            raise UserError(f"the ODE of a mixture has no closed form: this one has {len(self.means)} components")
        a, s, _, _ = coefficients_for(self.path, t, x_t)
        mean, std = self.means[0].to(x_t), self.stds[0].to(x_t)
        return mean + std * (x_t - a * mean) / torch.sqrt(a**2 * std**2 + s**2)

    def on(self, path: Path) -> GaussianMixture:
        """The same mixture, answering on another path."""
        return GaussianMixture(self.means, self.stds, self.weights, path=path, labels=self.labels)

    def _log_weights(self, num: int, label: Tensor | None) -> Tensor:
        log_weights = self.weights.log().expand(num, -1)
        if self.labels is None or label is None:
            return log_weights
        label = label.cpu()
        allowed = (label[:, None] == -1) | (label[:, None] == self.labels)
        if not bool(allowed.any(1).all()):
            wrong = sorted(set(label[~allowed.any(1)].tolist()))
            classes = sorted(set(self.labels.tolist()))
            raise UserError(f"label {wrong} is no class of this mixture, which has {classes}, and -1")
        return torch.where(allowed, log_weights, float("-inf"))

    def _log_joint(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K) log w_k N(x; ..), up to nothing; and (B, K, *shape) x - a m_k and a^2 c_k^2 + s^2."""
        a, s, _, _ = (c.unsqueeze(1) if c.ndim else c for c in coefficients_for(self.path, t, x))
        centred = x.unsqueeze(1) - a * self.means.to(x)
        # A component of no width has no variance left at t = 0. The floor, which float32 holds too, then gives x to the
        # nearest component, however far rounding has put it; and 0 / floor is the 0 noise it holds.
        variance = (a**2 * self.stds.to(x) ** 2 + s**2).clamp(min=1e-30)
        log_prob = -0.5 * (centred**2 / variance + torch.log(2 * torch.pi * variance)).flatten(2).sum(2)
        return self._log_weights(len(x), cond.label).to(x) + log_prob, centred, variance

    def _posterior(self, x: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor, Tensor]:
        log_joint, centred, variance = self._log_joint(x, t, cond)
        posterior = spread(torch.softmax(log_joint, 1).flatten(), centred.flatten(0, 1))
        return posterior.unflatten(0, log_joint.shape), centred, variance


@kind("gaussian_mixture", group="network")
@dataclass(frozen=True)
class MixtureSpec(NetworkSpec):
    """The analytic teacher, and with `sample` of what it builds the data of the analytic recipes."""

    means: tuple[tuple[float, ...], ...] = ((0.0, 0.0),)
    stds: tuple[float, ...] = (1.0,)
    weights: tuple[float, ...] | None = None
    labels: tuple[int, ...] | None = None
    path: AnyPath = RectifiedFlow()

    def build(self) -> GaussianMixture:
        with fault_of("a Gaussian mixture", "Give its means, stds and weights in shapes that fit"):
            return GaussianMixture(self.means, self.stds, self.weights, path=self.path, labels=self.labels)
