"""The contract of a feature extractor. One of the user's own is a class in a file given with `--config FILE.py`:

    @kind("my_network", group="features")
    @dataclass(frozen=True)
    class MyNetwork(Extractor):
        label = "My network"

        @property
        def fingerprint(self): return "v1"

        def features(self, clips):                      # uint8 B T H W 3
            return my_network(torch.from_numpy(clips))  # float B k d: k rows for each clip, one or one for each frame

A score is named after the extractor: mmd_my_network, frechet_my_network. FID and FVD are the names of Frechet distances on
Inception-v3 and on I3D with their published preprocessing, and on nothing else.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.config import OneOf
from fewstep.errors import UserError
from fewstep.untrusted.pickles import UnsafePickle
from fewstep.untrusted.safe_tensors import read_safetensors
from fewstep.untrusted.torch_files import load_torch

M = TypeVar("M", bound=torch.nn.Module)


class Extractor(ABC):
    """Turns clips into rows of features."""

    label: ClassVar[str]  # what a reader calls it
    is_standardised: ClassVar[bool] = True  # features are divided by their deviation over the real clips
    frechet: ClassVar[str] = "frechet"  # what a Frechet distance on these features is called
    least_frames: ClassVar[int] = 1  # of a clip
    blind_to: ClassVar[str] = ""  # changes that were measured not to move the distance

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the weights and of all that is done to the clips: distances compare only if it is the same."""

    @abstractmethod
    def features(self, clips: NDArray[np.uint8]) -> Tensor:
        """Rows of features (B, k, d), float32 on the CPU, of clips (B, T, H, W, 3) of one size."""


AnyExtractor = Annotated[Extractor, OneOf("features")]


def device() -> torch.device:
    """Where feature networks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def packaged(package: str, file: str) -> Path | None:
    """A file in an installed package, without importing the package; None if it is not installed."""
    spec = find_spec(package)
    for root in [] if spec is None else spec.submodule_search_locations or []:
        path = Path(root) / file
        if path.is_file():
            return path
    return None


def weights(path: Path, advice: str) -> dict[str, Tensor]:
    """The tensors of a file of weights; it runs no code. Raises UserError for a TorchScript archive, which is a program."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. {advice}")
    if path.suffix == ".safetensors":
        return read_safetensors(path, advice)[0]
    try:
        tensors = load_torch(path)
    except UnsafePickle as error:
        raise UserError(f"{path}: holds no plain weights ({error}). {advice}") from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path}: holds no dictionary of tensors. {advice}")
    return tensors


def unset(make: Callable[[], M]) -> M:
    """A module whose weights will be loaded, built without a draw from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        return make()


def load(module: torch.nn.Module, tensors: dict[str, Tensor], path: Path, advice: str) -> None:
    """Loads weights by name; raises UserError that names the first tensors which do not fit."""
    own = module.state_dict()
    missing = sorted(name for name in own if name not in tensors and not name.endswith("num_batches_tracked"))
    wrong = sorted(name for name in own if name in tensors and tensors[name].shape != own[name].shape)
    if missing or wrong:
        raise UserError(
            f"{path}: are the weights of another network: {', '.join((missing + wrong)[:3])} .. do not fit. {advice}"
        )
    module.load_state_dict({name: tensors[name] for name in own if name in tensors}, strict=False)
    module.eval().requires_grad_(False)


def hash_of(tensors: dict[str, Tensor], *facts: object) -> str:
    """The first eight digits of the hash over names, tensors and facts."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def evenly(num: int, total: int) -> NDArray[np.int64]:
    """`num` places spread evenly over `total`, the first and the last among them; all if there are not more."""
    return np.arange(total) if total <= num else np.linspace(0, total - 1, num).round().astype(np.int64)


def resized(clip: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A clip T H W 3 at another size: averaged over areas when it shrinks, bilinear when it grows."""
    import cv2

    if clip.shape[1:3] == (height, width):
        return clip
    how = cv2.INTER_AREA if height * width < clip.shape[1] * clip.shape[2] else cv2.INTER_LINEAR
    frames = [cv2.resize(np.ascontiguousarray(frame), (width, height), interpolation=how) for frame in clip]
    return np.stack(frames).astype(np.uint8, copy=False)
