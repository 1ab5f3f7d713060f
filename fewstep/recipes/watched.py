"""What every recipe of a student has besides: previews of its clips, and monitors of its health."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from fewstep.training.health import Health
from fewstep.training.preview_clips import ClipsPreview
from fewstep.training.run import Run

EVERY = 500  # iterations, as the original code of Cosmos-Transfer1 draws samples


def watched(run: Run, every: int = EVERY, num: int = 8) -> Run:
    """The run with previews and monitors every `every` iterations; the monitors look at `num` samples."""
    health = Health(every=every, num=num, guidance=_guidance(run.method))
    return replace(run, preview=ClipsPreview(every=every), health=health)


def _guidance(method: Any) -> float:  # Any: a dataclass that is a Method
    """The guidance of the teacher that the method, or one of its terms, trains with; 1 if there is none."""
    parts = (method, *(getattr(method, field.name) for field in fields(method)))
    values = [getattr(part, "guidance", None) for part in parts]
    return next((float(value) for value in values if isinstance(value, int | float)), 1.0)
