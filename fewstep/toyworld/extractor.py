"""The toy world's feature network for every scorer: `fewstep evaluate CLIPS --features toyworld`, of 17 frames of 32 x 32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.config import kind
from fewstep.evaluation.features.contract import Extractor
from fewstep.toyworld import features


@kind("toyworld", group="features")
@dataclass(frozen=True)
class ToyFeatures(Extractor):
    """The network that was trained on clips of the toy world; reads 17 frames of 32 x 32."""

    label = "toy network"

    @property
    def fingerprint(self) -> str:
        return features.weights_hash()[:8]

    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        return features.features(torch.from_numpy(np.ascontiguousarray(clips)))[:, None]
