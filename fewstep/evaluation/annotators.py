"""What measures a control signal on clips that have no file of it: those that a model has just generated.

    fewstep evaluate STUDENT --prompts DATA --control depth --scorer control 'annotators=[{my_depth: {}}]' --config mine.py

Edges and blur are computed from the frames. Depth, masks and keypoints need an annotator: one class in a file given with
`--config`, registered with @kind(NAME, group="annotator"), with one method for each control that it measures. What it
measures must mean the same as the data set's files: run the program that made them.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np

from fewstep.config import OneOf, choices
from fewstep.data.controls import Pixels

Masks = list[tuple[str, np.ndarray]]  # phrase, bool T H W
Figures = list[list[np.ndarray]]  # of each frame: (K, 3) x, y in 0..1 and a score


class Annotator:
    """Measures signals of a clip, uint8 T H W 3. A method that is not implemented returns None: it does not measure that."""

    label: ClassVar[str] = ""  # what a reader calls it

    def suits(self, clip: Pixels, caption: str) -> bool:
        """Whether to take this annotator if none is named."""
        return False

    def depth(self, clip: Pixels) -> Pixels | None:
        """A depth video as the data set has it, T H W 3."""
        return None

    def seg(self, clip: Pixels) -> Masks | None:
        """The masks of the clip's objects."""
        return None

    def keypoint(self, clip: Pixels) -> Figures | None:
        """The figures of each frame."""
        return None


AnyAnnotator = Annotated[Annotator, OneOf("annotator")]


def suitable(clip: Pixels, caption: str) -> tuple[Annotator, ...]:
    """The registered annotators that were made for clips like this one."""
    kinds = choices("annotator")
    return tuple(one for one in (cls() for cls in kinds.values()) if one.suits(clip, caption))
