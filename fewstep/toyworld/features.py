"""The video feature network of the toy world, for distances between sets of clips.

Four 3D convolutions over RGB and its temporal first and second differences, averaged over space and time. It was trained on
the world's own labels (colours, shapes, motion words, collisions, places) and on the logarithm of gravity, on clips that play
under 0.25 to 2.5 times the world's: a network trained on appearance alone is blind to shuffled frames and finds wrong gravity
better than real. `python -m fewstep.toyworld.train_features` made the weights that are shipped.

Features are standardised by the mean and deviation that real clips had when the weights were made. Those are stored with the
weights, so that distances of different runs compare. A distance on them is a "toy Frechet (net HASH)", by `name`; it has
nothing to do with FID or FVD, whose networks these are not.

`random_net` has the same layers with random weights from a fixed seed: a check that cannot have been tuned.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import UserError
from fewstep.untrusted.safe_tensors import read_safetensors

SHIPPED = Path(__file__).parent / "weights" / "toyfeatures.safetensors"
WIDTHS = (20, 40, 64, 96)  # channels; the last is the number of features
_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))  # t, h, w; the receptive field ends as 17 frames of 31 x 31 pixels
_DIFFERENCE_SCALE = 3.0  # differences of neighbouring frames are about a third of the colours' own deviation
_BATCH = 64

Clips = Tensor | np.ndarray


class FeatureNet(nn.Module):
    """(B, T, H, W, 3) uint8 -> (B, 96) float32, standardised. 261 k parameters, 2 ms a clip on one core."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: tuple[int, int, int] = (17, 32, 32)) -> None:
        super().__init__()
        self.size = size  # frames, height, width it was made for: elsewhere its features mean something else
        self.convs = nn.ModuleList(
            nn.Conv3d(c_in, c_out, 3, stride, padding=1) for c_in, c_out, stride in zip((9, *WIDTHS), WIDTHS, _STRIDES)
        )
        self.register_buffer("mean", torch.zeros(WIDTHS[-1]))
        self.register_buffer("std", torch.ones(WIDTHS[-1]))

    def forward(self, clips: Tensor) -> Tensor:
        return self.of(with_differences(clips))

    def of(self, x: Tensor) -> Tensor:
        """The features of clips that have their differences already."""
        for conv in self.convs:
            x = functional.silu(conv(x))
        return (x.mean(dim=(2, 3, 4)) - self.mean) / self.std


def with_differences(clips: Tensor) -> Tensor:
    """(B, 9, T, H, W) float32: colours about 0, their first and their second differences in time (0 where there are none)."""
    # In the memory order of the clips, colours last: that is how the bytes come, and the convolutions are quicker so.
    out = torch.zeros(*clips.shape[:4], 9, device=clips.device)
    first, second = out[..., 3:6], out[..., 6:]
    rgb = clips.float().div_(255).sub_(0.5)
    out[..., :3] = rgb
    torch.sub(rgb[:, 1:], rgb[:, :-1], out=first[:, 1:]).mul_(_DIFFERENCE_SCALE)
    second[:, 1:-1] = (rgb[:, 2:] - 2 * rgb[:, 1:-1] + rgb[:, :-2]).mul_(_DIFFERENCE_SCALE)
    return out.permute(0, 4, 1, 2, 3)


def features(clips: Clips, net: FeatureNet | None = None) -> Tensor:
    """The features (B, 96) float32 of clips (B, T, H, W, 3) uint8, by the shipped network if no other is given."""
    (out,) = features_by(clips, [shipped() if net is None else net])
    return out


def features_by(clips: Clips, nets: Sequence[FeatureNet]) -> list[Tensor]:
    """`features` by several networks of one size on one device, which share the differences in time."""
    net = nets[0]
    tensor = as_clips(clips)
    size = (tensor.shape[1], tensor.shape[2], tensor.shape[3])
    if size != net.size:
        raise UserError(
            f"the feature network was trained on clips of {_size_text(net.size)}, these are of {_size_text(size)}. "
            "Make them in that size, or train another network: python -m fewstep.toyworld.train_features --help"
        )
    device = net.mean.device
    parts: list[list[Tensor]] = []
    with torch.inference_mode():
        for some in tensor.split(_BATCH):
            x = with_differences(some.to(device))
            parts.append([one.of(x).cpu() for one in nets])
    return [torch.cat(column).clone() for column in zip(*parts, strict=True)]


def as_clips(clips: Clips) -> Tensor:
    """`clips` as a uint8 tensor (B, T, H, W, 3); UserError for anything else: the range of floats is unknown, 0..1 or -1..1."""
    tensor = clips if isinstance(clips, Tensor) else torch.from_numpy(np.ascontiguousarray(clips))
    if tensor.dtype != torch.uint8 or tensor.ndim != 5 or tensor.shape[-1] != 3 or len(tensor) == 0:
        raise UserError(f"clips must be uint8 of shape (B, T, H, W, 3), not {tensor.dtype} of shape {tuple(tensor.shape)}.")
    return tensor


def name(net: FeatureNet | None = None) -> str:
    """What to call a Frechet distance on these features, with the first digits of the weights' hash."""
    return f"toy Frechet (net {weights_hash(net)[:8]})"


def weights_hash(net: FeatureNet | None = None) -> str:
    """sha256 over size, weights and statistics: two networks with the same hash give comparable distances."""
    net = shipped() if net is None else net
    digest = hashlib.sha256(repr(net.size).encode())
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def shipped() -> FeatureNet:
    """The network whose weights come with the package."""
    return load(SHIPPED)


@functools.cache
def random_net() -> FeatureNet:
    """The untrained witness, standardised by the statistics that were stored beside the shipped weights."""
    tensors, metadata = read_weights(SHIPPED)
    net = untrained(_size(metadata))
    net.load_state_dict({key.removeprefix("random."): tensors[key] for key in ("random.mean", "random.std")}, strict=False)
    return net.eval().requires_grad_(False)


def untrained(size: tuple[int, int, int]) -> FeatureNet:
    """Random weights from a fixed seed (numpy's Philox, the same on every machine), not yet standardised."""
    net = FeatureNet(size)
    rng = np.random.Generator(np.random.Philox(key=20240))
    for conv in net.convs:
        assert isinstance(conv, nn.Conv3d) and conv.bias is not None
        fan_in = conv.weight[0].numel()
        draw = rng.standard_normal(tuple(conv.weight.shape)).astype(np.float32)
        with torch.no_grad():
            conv.weight.copy_(torch.from_numpy(draw) * (2 / fan_in) ** 0.5)
            conv.bias.zero_()
    return net.eval().requires_grad_(False)


def load(path: Path) -> FeatureNet:
    """The network that `train_features` wrote to `path`."""
    tensors, metadata = read_weights(path)
    net = FeatureNet(_size(metadata))
    net.load_state_dict({key: value.float() for key, value in tensors.items() if key.split(".")[0] in ("convs", "mean", "std")})
    return net.eval().requires_grad_(False)


def read_weights(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors and the metadata of a weights file; a missing file is a UserError that names the command to train it."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Make it with: python -m fewstep.toyworld.train_features --out {path}")
    return read_safetensors(path, "Train it again")


def _size(metadata: Mapping[str, str]) -> tuple[int, int, int]:
    frames, height, width = (int(metadata[key]) for key in ("frames", "height", "width"))
    return frames, height, width


def _size_text(size: tuple[int, ...]) -> str:
    return f"{size[0]} frames of {size[1]} x {size[2]}"
