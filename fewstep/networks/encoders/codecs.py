"""Codecs: pixels to latents and back, over the autoencoders of diffusers.

    codec = open_codec("wan2.1-t2v-1.3b")            # a folder or hub id; of a whole pipeline, its vae/
    latents = codec.encode(pixels)                   # B 3 T H W in -1..1 -> B C t h w, about zero mean and unit spread
    pixels = codec.decode(latents)

Normalisation is z = scale (raw - mean) / std, each per channel, and for Cosmos per channel and latent frame (its first frame is
a picture of its own, with statistics of its own). `scale` is 1 but for Cosmos 1, whose EDM networks want a spread of 0.5.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fewstep import registry
from fewstep.errors import UserError
from fewstep.networks.files import hub
from fewstep.networks.files.folders import load
from fewstep.untrusted.text import fault_of, read_json
from fewstep.untrusted.torch_files import load_torch

FRAMES_AT_ONCE = 8  # pictures that an image autoencoder sees at once; they do not see each other


class Codec(Protocol):
    @property
    def module(self) -> nn.Module: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents B C t h w, about zero mean and unit spread, of pixels B 3 T H W in -1..1."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels B 3 T H W, about -1..1, of latents as `encode` gives them."""
        ...

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of a clip; refuses a clip that does not fit the codec."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies weights and settings: caches made under another fingerprint are not ours."""
        ...


@dataclass(frozen=True)
class Form:
    """What one class of autoencoders does to a clip."""

    channels: int
    time: int  # frames per latent frame, after the first, which stands alone
    space: int  # pixels per latent, along each side
    frames_step: int  # a clip has 1 + k * frames_step frames: upstream drops silently what is left over
    sees_time: bool = True  # false: an image autoencoder, to which frames are pictures

    def latents(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latents of a clip."""
        num = 1 + (frames - 1) // self.time if self.sees_time else frames
        return self.channels, num, height // self.space, width // self.space

    def pixels(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        """Frames, height and width of the clip that latents of this shape (C, t, h, w) decode to."""
        _, num, height, width = shape
        return 1 + (num - 1) * self.time if self.sees_time else num, height * self.space, width * self.space


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A codec over one of the autoencoders of diffusers. Encoding takes the mode of the posterior, never a sample."""

    module: nn.Module
    form: Form
    mean: Tensor  # 1 C n 1 1; n = 1, or one for each of the n latent frames a clip can have
    std: Tensor
    tile: int | None = None  # pixels

    def encode(self, pixels: Tensor) -> Tensor:
        num, _, frames, height, width = pixels.shape
        self.shape(frames, height, width)
        rows = _rows_at_once(pixels)
        raw = torch.cat([self._tiled(self._encode, some, enters_latents=True) for some in pixels.split(rows)])
        assert raw.shape[0] == num, raw.shape
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.float()
        mean, std = self._statistics(latents)
        rows = _rows_at_once(latents[:, :1].expand(-1, 3, -1, -1, -1), self.form.time * self.form.space**2)
        raw = (latents * std + mean).split(rows)
        return torch.cat([self._tiled(self._decode, some, enters_latents=False) for some in raw])

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        form, name = self.form, type(self.module).__name__
        if form.sees_time and (frames - 1) % form.frames_step:
            fits = frames - (frames - 1) % form.frames_step
            raise UserError(
                f"{name}: {frames} frames do not fit; it takes 1 + k * {form.frames_step}: {fits} or {fits + form.frames_step}"
            )
        if height % form.space or width % form.space:
            fit = " --width ".join(str(max(side - side % form.space, form.space)) for side in (height, width))
            raise UserError(
                f"{name}: {height} x {width} pixels do not fit; both sides must be multiples of {form.space}, "
                f"--height {fit} for instance"
            )
        shape = form.latents(frames, height, width)
        num = shape[1]
        if self.mean.shape[2] not in (1, num) and num > self.mean.shape[2]:
            most = 1 + (self.mean.shape[2] - 1) * form.time
            raise UserError(
                f"{name}: {frames} frames are more than its statistics know: {self.mean.shape[2]} latent frames, which are "
                f"{most} frames. Cut the clip into pieces of at most {most}"
            )
        return shape

    @property
    def fingerprint(self) -> str:
        """Of every weight, bit by bit, and of the settings. Costs one pass over the weights, once."""
        return self._fingerprint

    @cached_property  # no protocol has such a member
    def _fingerprint(self) -> str:
        config = {name: value for name, value in dict(self.module.config).items() if not name.startswith("_")}  # pyright: ignore[reportArgumentType, reportCallIssue]  # an attribute of a module
        settings = {"class": type(self.module).__name__, "tile": self.tile, **config}
        return fingerprint_of(self.module, settings, self.mean, self.std)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        num = like.shape[2]
        mean, std = (value[:, :, :num].to(like.device) for value in (self.mean, self.std))
        if mean.shape[2] not in (1, num):
            raise UserError(f"{num} latent frames are more than the {mean.shape[2]} whose statistics are known")
        return mean, std

    def _encode(self, pixels: Tensor) -> Tensor:
        return self._in_float32(pixels, lambda x: self.module.encode(x).latent_dist.mode())  # pyright: ignore[reportCallIssue]  # an attribute of a module

    def _decode(self, raw: Tensor) -> Tensor:
        return self._in_float32(raw, lambda z: self.module.decode(z).sample)  # pyright: ignore[reportCallIssue]  # an attribute of a module

    def _in_float32(self, x: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """In float32, whatever the module computes in; an image autoencoder is shown the frames as pictures."""
        weight = next(self.module.parameters())
        x = x.to(weight.device, weight.dtype)
        if self.form.sees_time:
            return ask(x).float()
        pictures = x.transpose(1, 2).flatten(0, 1)
        answers = torch.cat([ask(part).float() for part in pictures.split(FRAMES_AT_ONCE)])
        return answers.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def _tiled(self, ask: Callable[[Tensor], Tensor], x: Tensor, enters_latents: bool) -> Tensor:
        """`ask` tile by tile, each blended into its neighbours over a quarter of its side; whole where it fits into one tile.

        Not exact: the autoencoders' attention and group norms see one tile only. Memory is that of one tile and of the result.
        """
        if self.tile is None:
            return ask(x)
        space = self.form.space
        unit = space if enters_latents else 1  # of x, per latent
        side = max(self.tile // space, 4)  # in latents, as everything below
        overlap = side // 4
        height, width = x.shape[-2] // unit, x.shape[-1] // unit
        if height <= side and width <= side:
            return ask(x)
        cell = 1 if enters_latents else space  # of the result, per latent
        out: Tensor | None = None
        for top, tall in _spans(height, side, overlap):
            for left, wide in _spans(width, side, overlap):
                part = ask(x[..., top * unit : (top + tall) * unit, left * unit : (left + wide) * unit])
                down = _ramp(tall * cell, overlap * cell, top > 0, top + tall < height).to(part.device)
                across = _ramp(wide * cell, overlap * cell, left > 0, left + wide < width).to(part.device)
                if out is None:
                    out = part.new_zeros(*part.shape[:-2], height * cell, width * cell)
                out[..., top * cell : (top + tall) * cell, left * cell : (left + wide) * cell] += part * down[:, None] * across
        assert out is not None
        return out


def to_uint8(pixels: Tensor, whose: str) -> np.ndarray:
    """Frames B T H W 3 of pixels B 3 T H W in -1..1. Refuses values that are not finite, naming `whose` they are."""
    if not bool(pixels.isfinite().all()):
        raise UserError(
            f"{whose}: answers numbers that are not finite. Its weights or its codec's are damaged, or the precision is too "
            "small for them. None of these clips was written"
        )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy()


def _rows_at_once(like: Tensor, times: int = 1) -> int:
    """Real clips go one by one, to bound memory; of tiny ones as many together as make a small clip of 2^20 numbers."""
    return max(1, 2**20 // (like[0].numel() * times))


def _spans(size: int, side: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the tiles along one axis; each but the last reaches `overlap` into the next."""
    start = 0
    while True:
        length = min(side, size - start)
        yield start, length
        if start + length >= size:
            return
        start += side - overlap


def _ramp(size: int, overlap: int, has_before: bool, has_after: bool) -> Tensor:
    """Weights of one tile along an axis: 0, 1/n, .. into the neighbour before, and what that one lacks of 1 at the end."""
    weights, rise = torch.ones(size), torch.arange(overlap) / overlap
    if has_before:
        weights[:overlap] = rise
    if has_after:
        weights[-overlap:] = 1 - rise
    return weights


# ---- opening -------------------------------------------------------------------------------------------------------


def open_codec(
    address: str | Path,
    *,
    scale: float = 1.0,
    tile: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """The codec in a diffusers folder or hub id; of a pipeline its vae/. Frozen, in eval mode."""
    import diffusers

    config, subfolder = _config(str(address))
    name = _class_of(config, address)
    module = load(getattr(diffusers, name), str(address), subfolder, torch_dtype=dtype)
    folder = Path(address) / subfolder if subfolder else Path(address)
    return _around(module.to(device), _FORMS[name], scale, tile, folder / "mean_std.pt")


@lru_cache(maxsize=1)
def codec_beside(address: str | None, scale: float) -> Codec | None:
    """The codec in a folder, on the CPU, where a network in training leaves it room; None where there is none."""
    folder = Path(address or "")
    own = folder / "config.json"  # of a codec, or of a network alone
    is_codec = own.is_file() and read_json(own, "Copy that folder again").get("_class_name") in _FORMS
    if address is None or not (is_codec or (folder / "vae").is_dir()):
        return None
    return open_codec(address, scale=scale)


def form_of(address: str | Path) -> Form:
    """What the codec in a diffusers folder or hub id does to a clip; its weights are not read."""
    config, _ = _config(str(address))
    name = _class_of(config, address)
    with fault_of(f"{address}: config.json"):
        return _FORMS[name](config)[0]


def _class_of(config: Mapping[str, Any], address: str | Path) -> str:
    name = str(config.get("_class_name"))
    if name not in _FORMS:
        raise UserError(f"{address}: no codec of ours, its _class_name is {name}; known are {', '.join(sorted(_FORMS))}")
    return name


def codec_of(module: nn.Module, *, scale: float = 1.0, tile: int | None = None) -> Autoencoder:
    """The codec around an autoencoder of diffusers that is in memory; it is frozen by this."""
    import diffusers

    forms = (form for name, form in _FORMS.items() if isinstance(module, getattr(diffusers, name)))
    return _around(module, next(forms), scale, tile, None)


def _around(module: nn.Module, form_of: FormOf, scale: float, tile: int | None, statistics: Path | None) -> Autoencoder:
    with fault_of("config.json" if statistics is None else statistics.with_name("config.json")):
        form, mean, std = form_of(module.config)
    if statistics is not None and statistics.is_file() and module.config.latents_mean is None:  # pyright: ignore[reportAttributeAccessIssue]  # an attribute of a module
        mean, std = read_statistics(statistics, form.channels)
    return Autoencoder(module.eval().requires_grad_(False), form, mean, std / scale, tile)


def fingerprint_of(module: nn.Module, settings: dict[str, Any], *tensors: Tensor, sampled: int | None = None) -> str:
    """16 hex digits over the module's weights, its settings, and other tensors that its answers depend on.

    Every bit of each weight counts, or about `sampled` entries of it at even distances.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    items = [*sorted(module.state_dict().items()), *((f"+{i}", tensor) for i, tensor in enumerate(tensors))]
    for name, tensor in items:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        if sampled is not None:
            flat = flat[:: max(len(flat) // sampled, 1)]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _config(address: str) -> tuple[dict[str, Any], str | None]:
    """config.json of the codec at `address`, and the subfolder it is in."""
    folder = Path(address)
    if folder.is_dir():
        for subfolder in (None, "vae"):
            path = folder / (subfolder or "") / "config.json"
            if path.is_file():
                return read_json(path, "Copy that folder again"), subfolder
        raise UserError(f"{address}: neither config.json nor vae/config.json is in it, so that it is no codec of diffusers")
    hub.expect_id(address, "codec")
    from diffusers import AutoencoderKL

    errors: list[str] = []
    for subfolder in ("vae", None):
        try:
            return dict(AutoencoderKL.load_config(address, subfolder=subfolder)), subfolder  # pyright: ignore[reportArgumentType, reportCallIssue, reportReturnType]  # diffusers types it loosely
        except (OSError, ValueError) as error:
            errors.append(str(error).splitlines()[0])
    raise UserError(f"no codec at {address}: there is no such folder, and as a hub id: {errors[0]}")


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """mean and std of the original Cosmos tokenizers, beside whose weights they lie as mean_std.pt."""
    with fault_of(path):
        mean, std = load_torch(path)
        return mean.float().reshape(1, channels, -1, 1, 1), std.float().reshape(1, channels, -1, 1, 1)


def _listed(config: Any, channels: int, factor: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """mean and std as the config lists them, channel by channel, or channel and frame; `factor` divides the spread."""
    # Any: diffusers' FrozenDict, here and below
    both = (config.get("latents_mean") or [0.0] * channels, config.get("latents_std") or [1.0] * channels)
    mean, std = (torch.tensor(list(values), dtype=torch.float32).reshape(1, channels, -1, 1, 1) for values in both)
    return mean + shift, std / factor


def _wan(config: Any) -> tuple[Form, Tensor, Tensor]:
    halves = config["temperal_downsample"]  # upstream's spelling
    time = 2 ** sum(map(bool, halves))
    space = 2 ** len(halves) * (config.get("patch_size") or 1)
    # Upstream encodes one frame and then four at a time, whatever the ratio.
    return Form(config["z_dim"], time, space, max(time, 4)), *_listed(config, config["z_dim"])


def _cosmos(config: Any) -> tuple[Form, Tensor, Tensor]:
    time, channels = config["temporal_compression_ratio"], config["latent_channels"]
    return Form(channels, time, config["spatial_compression_ratio"], time), *_listed(config, channels)


def _cogvideox(config: Any) -> tuple[Form, Tensor, Tensor]:
    time, channels = int(config["temporal_compression_ratio"]), config["latent_channels"]
    space = 2 ** (len(config["block_out_channels"]) - 1)
    return Form(channels, time, space, time), *_listed(config, channels, config["scaling_factor"])


def _image(config: Any) -> tuple[Form, Tensor, Tensor]:
    channels, shift = config["latent_channels"], config.get("shift_factor") or 0.0
    space = 2 ** (len(config["block_out_channels"]) - 1)
    return Form(channels, 1, space, 1, sees_time=False), *_listed(config, channels, config["scaling_factor"], shift)


FormOf = Callable[[Any], tuple[Form, Tensor, Tensor]]  # the form, mean and deviation of latents by a class's configuration

_FORMS: dict[str, FormOf] = {
    "AutoencoderKL": _image,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLCosmos": _cosmos,
    "AutoencoderKLQwenImage": _wan,
    "AutoencoderKLWan": _wan,
}

registry.register("codec", "diffusers", open_codec)
