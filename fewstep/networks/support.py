"""What `fewstep ls networks` prints: every published network with its size and licence, and the memory its recipes need.

The plans are stored, because planning 7 B takes minutes; each names the command that plans it anew, and a slow test runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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


PLANS: tuple[StoredPlan, ...] = (
    StoredPlan(
        recipe="dmd2_cosmos_transfer1_7b_edge",
        network="cosmos_control",
        overrides=("networks.student=lora", "networks.critic=lora"),
        shape="16x16x88x160",  # 704 x 1280, 121 frames
        gpus=1,
        gpu="h100",
        peak_gib=58.18,
        needed_gib=61.43,
        largest=(("activations", 39.53), ("teacher weights", 15.14)),
    ),
    # Of the other controls: the same.
    StoredPlan(
        recipe="DISTILL_CTRL_7Bv1_edge_fsdp_kd_train",
        network="cosmos_control",
        overrides=(),
        shape="16x16x88x160",
        gpus=8,
        gpu="h100",
        peak_gib=41.08,
        needed_gib=43.82,
        largest=(("activations", 25.85), ("student optimizer", 7.57)),
    ),
    StoredPlan(
        recipe="DISTILL_CTRL_7Bv1_edge_fsdp_dmd2_train",
        network="cosmos_control",
        overrides=(),
        shape="16x16x88x160",
        gpus=8,
        gpu="h100",
        peak_gib=70.08,
        needed_gib=73.68,
        largest=(("activations", 43.15), ("critic optimizer", 7.57)),
    ),
    StoredPlan(
        recipe="dmd2_trigflow_distill_cosmos_predict2_2B_bidirectional_TnI2V",
        network="cosmos",
        overrides=("text=512x100352",),
        shape="16x24x88x160",  # 704 x 1280, 93 frames
        gpus=4,
        gpu="h100",
        peak_gib=44.95,
        needed_gib=47.80,
        largest=(("activations", 29.83), ("critic optimizer", 3.84)),
    ),
    StoredPlan(
        recipe="dmd2_trigflow_distill_cosmos_predict2_14B_bidirectional_TnI2V",
        network="cosmos",
        overrides=("text=512x100352",),
        shape="16x24x88x160",
        gpus=32,
        gpu="h200",
        peak_gib=79.31,
        needed_gib=83.19,
        largest=(("activations", 63.44), ("critic optimizer", 3.35)),
    ),
    StoredPlan(
        recipe="dmd2_trigflow_distill_cosmos_transfer2p5_2B_bidirectional_edge",
        network="cosmos_control",
        overrides=("text=512x100352",),
        shape="16x24x88x160",
        gpus=8,
        gpu="h100",
        peak_gib=47.02,
        needed_gib=49.93,
        largest=(("activations", 36.47), ("critic optimizer", 2.57)),
    ),
    StoredPlan(
        recipe="video2world_7b_example_cosmos_nemo_assets",
        network="cosmos",
        overrides=(),
        shape="16x16x88x160",
        gpus=8,
        gpu="h100",
        peak_gib=38.05,
        needed_gib=40.69,
        largest=(("activations", 20.92), ("student optimizer", 6.74)),
    ),
    StoredPlan(
        recipe="video2world_7b_lora_example_cosmos_nemo_assets",
        network="cosmos",
        overrides=(),
        shape="16x16x60x106",  # 480 x 848
        gpus=4,
        gpu="h100",
        peak_gib=25.70,
        needed_gib=27.97,
        largest=(("teacher weights", 13.48), ("activations", 12.11)),
    ),
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
