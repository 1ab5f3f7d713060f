"""Prompt adherence of toy clips by the probes: `fewstep evaluate CLIPS --scorer adherence judge=toyworld`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fewstep.config import kind
from fewstep.evaluation.judges import Judge
from fewstep.evaluation.score import Clip
from fewstep.toyworld import probes


@kind("toyworld", group="judge")
@dataclass(frozen=True)
class ToyJudge(Judge):
    """1 for a clip that shows every colour of its caption in its shape, and no other object; else 0."""

    label = "probes of the toy world"

    def scores(self, clips: Sequence[Clip], prompts: Sequence[str]) -> list[float]:
        parsed = probes.parse(torch.from_numpy(np.stack(clips)))
        description = probes.descriptions(prompts)
        fits = probes.colours_match(parsed, description) & probes.shapes_match(parsed, description)
        return fits.astype(float).tolist()
