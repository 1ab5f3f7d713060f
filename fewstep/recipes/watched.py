"""What every recipe of a student has besides: previews of its clips, and monitors of its health."""

from __future__ import annotations

from dataclasses import replace

from fewstep.training.health import Health
from fewstep.training.preview_clips import ClipsPreview
from fewstep.training.run import Run

EVERY = 500  # iterations, as the original code of Cosmos-Transfer1 draws samples


def watched(run: Run, every: int = EVERY, num: int = 8) -> Run:
    """The run with previews and monitors every `every` iterations; the monitors look at `num` samples."""
    guidance = float(getattr(run.method, "guidance", 1.0))  # of methods with a teacher
    return replace(run, preview=ClipsPreview(every=every), health=Health(every=every, num=num, guidance=guidance))
