"""What `fewstep ls networks` prints: every published network with its size and licence, and the memory its recipes need.

The plans are stored in plans.yaml, because planning 7 B takes minutes; each names the command that plans it anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from fewstep.networks.families.published import FAMILIES, PUBLISHED


@dataclass(frozen=True)
class StoredPlan:
    """What `fewstep plan` answered for a recipe: planned on tensors without contents, not measured on a GPU."""

    recipe: str
    network: str  # kind of its teacher
    overrides: tuple[str, ...]
    shape: str  # of one latent, C x T x H x W
    gpus: int
    gpu: str  # the smallest of `fewstep plan gpu=` it was asked for; it fits
    peak_gib: float  # on each GPU
    needed_gib: float  # with the device's context and an allocator's gaps
    largest: tuple[tuple[str, float], ...]  # parts, GiB

    @property
    def command(self) -> str:
        words = (f"experiment={self.recipe}", *self.overrides, f"shape={self.shape}", f"gpus={self.gpus}", f"gpu={self.gpu}")
        return " ".join(("fewstep plan", *words))


PLANS: tuple[StoredPlan, ...] = tuple(
    StoredPlan(**row | {"overrides": tuple(row["overrides"]), "largest": tuple(row["largest"].items())})
    for row in yaml.safe_load(Path(__file__).with_name("plans.yaml").read_text(encoding="utf-8"))
)


def as_json() -> list[dict[str, Any]]:
    """One entry for each `network=`, with its published models and the plans of recipes over it."""
    return [
        {
            "name": family,
            "about": about,
            "models": [_model(model) for model in PUBLISHED if model.network == family],
            "plans": [asdict(plan) | {"command": plan.command} for plan in PLANS if plan.network == family],
        }
        for family, about in FAMILIES.items()
    ]


def _model(model: Any) -> dict[str, Any]:
    total = model.networks * model.parameters
    return asdict(model) | {"constant": f"fewstep.networks.{model.constant}", "total": total}


def text() -> str:
    """The same for a person: families, published models, memory."""
    families = _columns([("network=", "what it is"), *FAMILIES.items()])
    heads = ("published model", "network=", "parameters", "reads", "licence of the weights")
    models = _columns([heads, *((m.model, m.network, m.size, " ".join(m.reads), m.license) for m in PUBLISHED)])
    heads = ("recipe", "GPUs", "GiB each", "fits", "largest parts, GiB", "with")
    plans = _columns([heads, *(_row(plan) for plan in PLANS)])
    return "\n".join(
        [
            *families,
            "",
            *models,
            "Licences are notes: check the model card. Masks and padding, which some read too, are not named. docs/models.md",
            "",
            *plans,
            "Planned, not measured. Planned anew, in minutes, or for settings of your own, and with all parts:",
            *(f"  {plan.command}" for plan in PLANS),
        ]
    )


def _row(plan: StoredPlan) -> Sequence[str]:
    parts = ", ".join(f"{name} {gib:.2f}" for name, gib in plan.largest)
    settings = " ".join((*plan.overrides, f"latents {plan.shape}"))
    return plan.recipe, str(plan.gpus), f"{plan.needed_gib:.2f}", plan.gpu, parts, settings


def _columns(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
