"""Pictures to features: the CLIP vision model that Wan 2.1 I2V reads its picture with, over the class of transformers.

encoder = open_image_encoder("wan2.1-i2v-14b-480p")     # a pipeline's folder or hub id: image_encoder/, image_processor/
features = encoder.encode(pictures)                     # uint8 B H W 3 -> B N D, what its last but one layer says
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.networks.files.folders import load_reader, load_transformer


@dataclass(frozen=True, eq=False)
class ClipVision:
    module: nn.Module
    processor: Any  # Any: transformers' image processors have no common type

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> Tensor:
        weight = next(self.module.parameters())
        pixels = self.processor(images=list(pictures), return_tensors="pt").pixel_values
        return self.module(pixels.to(weight.device, weight.dtype), output_hidden_states=True).hidden_states[-2].float()


def open_image_encoder(
    address: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ClipVision:
    """The image encoder of the pipeline in a folder or at a hub id. Frozen, in eval mode."""
    import transformers

    folder = Path(address)
    missing = [part for part in ("image_encoder", "image_processor") if folder.is_dir() and not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"no image encoder at {address}: it has no {missing[0]}/, which the folder of a Wan 2.1 I2V pipeline has"
        )
    # Resizes with PIL, as CLIP was trained; transformers' other one needs torchvision. Before 5.0 there was one class only.
    reader = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = load_reader(reader, str(address), "image_processor")
    module = load_transformer(transformers.CLIPVisionModel, str(address), "image_encoder", dtype=dtype)
    return ClipVision(module.to(device), processor)
