"""What leads a clip: texts, labels, first frames, pictures beside the latents, control videos - as the Condition of a network.

The arguments say what (request.py); here files are read and encoded. Of a long clip each chunk has its own (chunks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import choices
from fewstep.data import controls
from fewstep.data.files import arrays, video
from fewstep.errors import UserError
from fewstep.inference.chunks import Chunk
from fewstep.inference.model import text_encoder_address
from fewstep.inference.request import ClipRequest, GenerateRequest
from fewstep.networks.contract import Beginning, FirstFrames, Network
from fewstep.networks.encoders.codecs import Autoencoder, to_uint8
from fewstep.networks.encoders.vision import ClipVision
from fewstep.networks.files.pipeline import PipelineFolder


@dataclass(frozen=True)
class Shot:
    """Frames, size and rate of every clip of one command."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class Text:
    embedding: Tensor  # 1 N D
    mask: Tensor | None
    pooled: Tensor | None = None


def texts_of(
    clips: Sequence[ClipRequest], request: GenerateRequest, folder: Path | None, device: torch.device
) -> Mapping[str | Path | None, Text]:
    """Every text that will be needed, by itself or by its file. The encoder, larger than many a network, is let go.

    None stands for a negative prompt that is not given: the empty text, and zeros where the pipeline has them.
    folder: the model's, whose text encoder is taken where the request names none.
    """
    from fewstep.networks.encoders.text import open_text_encoder

    clips = [clip for clip in clips if clip.label is None]
    files = {path for clip in clips for path in (clip.embedding, clip.negative_embedding) if path is not None}
    texts: dict[str | Path | None, Text] = {path: _embedded(path, request.max_tokens, device) for path in files}
    todo = {clip.prompt for clip in clips if clip.embedding is None}
    todo |= {prompt for clip in clips for _, prompt in clip.switches}
    is_guided = request.published_guidance or request.sampling.guidance not in (None, 1.0)
    is_guided = is_guided or request.sampling.guidance_low is not None
    alone = [clip for clip in clips if clip.negative_embedding is None and clip.embedding is None]
    negatives = {clip.negative for clip in alone} if is_guided else set[str | None]()
    todo |= {text or "" for text in negatives}
    if not todo:
        return texts
    address = text_encoder_address(request.text_encoder, folder, request.model, "--text-encoder, or --embedding FILE")
    encoder = open_text_encoder(address, max_tokens=request.max_tokens, device=device)
    prompts = sorted(todo)
    embeddings, masks = encoder.encode(prompts)
    pooled = encoder.pooled(prompts)
    for i, prompt in enumerate(prompts):
        texts[prompt] = Text(
            embeddings[i : i + 1].to(device),
            masks[i : i + 1].to(device) if encoder.uses_mask else None,
            None if pooled is None else pooled[i : i + 1].to(device),
        )
    if None in negatives:
        has_zeros = PipelineFolder(str(folder or address)).has_zeros_for_no_prompt
        texts[None] = _zeros(texts[""]) if has_zeros else texts[""]
    return texts


def _zeros(text: Text) -> Text:
    pooled = None if text.pooled is None else torch.zeros_like(text.pooled)
    return Text(torch.zeros_like(text.embedding), text.mask, pooled)


def _embedded(path: Path, num_tokens: int | None, device: torch.device) -> Text:
    """The embedding in a file, cut or padded with zeros to `num_tokens`."""
    pooled = arrays.read(path).get("pooled")
    embedding = arrays.read_one(path, "text").float()
    embedding = embedding[0] if embedding.ndim == 3 else embedding
    if embedding.ndim != 2:
        raise UserError(f"{path}: an embedding has shape (tokens, channels), not {tuple(embedding.shape)}")
    text = _of_length(embedding[None].to(device), len(embedding) if num_tokens is None else num_tokens)
    return Text(text, None, None if pooled is None else pooled[None].float().to(device))


def _of_length(text: Tensor, num_tokens: int) -> Tensor:
    """B N D or B N, cut or padded with zeros to `num_tokens`."""
    sides = (0, 0) * (text.ndim - 2)
    return torch.nn.functional.pad(text[:, :num_tokens], (*sides, 0, max(num_tokens - text.shape[1], 0)))


@dataclass(frozen=True)
class Parts:
    """What the conditions of every clip of one command are made with."""

    network: Network  # may lie on torch's meta device: only its `begin` and its traits are used
    codec: Autoencoder
    texts: Mapping[str | Path | None, Text]
    device: torch.device
    pictures: ClipVision | None = None  # for networks that read features of their picture

    @property
    def image_features(self) -> Callable[[Tensor], Tensor] | None:
        encoder = self.pictures
        if encoder is None:
            return None
        return lambda picture: encoder.encode(to_uint8(picture[:, :, None], "the first frame")[:, 0]).to(self.device)


@dataclass(frozen=True)
class Footage:
    """The pixels that one clip is made from, uint8 T H W 3 and whole but for `begins`."""

    begins: Tensor | None  # 1 3 T H W in -1..1, the frames that are given
    controls: Mapping[str, np.ndarray]
    origin: np.ndarray | None = None  # the video that is noised and sampled anew


def footage(request: ClipRequest, device: torch.device, shot: Shot, noises_input: bool = False) -> Footage:
    """Reads the files of a clip. noises_input: where --input gives no first frames, it is the video that is noised."""
    begins = None
    if request.num_input_frames:
        assert request.source is not None
        begins = _tensor(_frames(request.source, shot, request.num_input_frames), device)
    origin = None
    if noises_input and request.source is not None and is_origin(request):
        origin = _frames(request.source, shot, shot.num_frames)
    return Footage(begins, {name: _control_frames(name, request, shot) for name in request.control}, origin)


def is_origin(request: ClipRequest) -> bool:
    """Whether the clip's --input can be noised and sampled anew: it does not give first frames."""
    return request.source is not None and not request.num_input_frames


def conditions(
    request: ClipRequest, parts: Parts, shot: Shot, latent_shape: tuple[int, int, int, int], films: Footage, chunk: Chunk
) -> tuple[Condition, Condition | None]:
    """What leads one chunk (of a short clip, the only one), and what guidance pushes away from."""
    device = parts.device
    cond = Condition(fps=torch.tensor([shot.fps], device=device))
    if request.label is not None:
        cond = replace(cond, label=torch.tensor([request.label], device=device))
        return cond, replace(cond, label=torch.full_like(torch.tensor([0], device=device), -1))
    text = parts.texts[request.embedding or request.prompt]
    cond = replace(cond, text=text.embedding, text_mask=text.mask, pooled=text.pooled)
    if films.begins is not None:
        beginning = Beginning(films.begins, chunk.num_frames, latent_shape[1], parts.codec, parts.image_features)
        cond = parts.network.begin(cond, beginning)
    if request.control:
        signals = {name: _tensor(chunk.of(frames), device) for name, frames in films.controls.items()}
        cond = replace(cond, control={name: parts.codec.encode(frames) for name, frames in signals.items()})
    return cond, _negative(request, parts.texts, cond)


def origin(parts: Parts, films: Footage, chunk: Chunk) -> Tensor | None:
    """Latents of the chunk's part of the video that is noised; None where there is none."""
    return None if films.origin is None else parts.codec.encode(_tensor(chunk.of(films.origin), parts.device))


def _negative(clip: ClipRequest, texts: Mapping[str | Path | None, Text], cond: Condition) -> Condition | None:
    assert cond.text is not None
    if clip.embedding is not None and clip.negative_embedding is None:  # how Cosmos 1 drops text
        text = _zeros(texts[clip.embedding])
    else:
        text = texts.get(clip.negative_embedding or clip.negative)
    if text is None:
        return None
    num = cond.text.shape[1]
    mask = None if text.mask is None else _of_length(text.mask, num)
    return replace(cond, text=_of_length(text.embedding, num), text_mask=mask, pooled=text.pooled)


def check_given(num: int, window: int, codec: Autoencoder, first_frames: FirstFrames, option: str) -> None:
    """Refuses a number of given frames that the codec or the network cannot be shown."""
    time = codec.form.time if codec.form.sees_time else 1
    if (num - 1) % time:
        raise UserError(f"{option} {num}: this codec takes 1 + k * {time}, {num - (num - 1) % time} for instance")
    if num >= window:
        raise UserError(f"{option} {num}: nothing is left to be made of {window} frames")
    if num > 1 and first_frames == "picture":
        raise UserError(f"{option} {num}: this network begins with one picture, 1")


def with_controls_of(request: ClipRequest, network: Network) -> Network:
    """The network, whose controls count what the request says."""
    weights = {name: control.weight for name, control in request.control.items()}
    return network.with_control_weights(weights) if weights else network


def is_made_from_frames(control: str) -> bool:
    """Whether the control of this name can be made from a video."""
    kind = choices("control").get(control)
    return kind is not None and callable(kind())


def _control_frames(name: str, request: ClipRequest, shot: Shot) -> np.ndarray:
    control, kind = request.control[name], choices("control").get(name)
    if control.source is not None and kind is not None and control.source.suffix == kind.suffix != ".mp4":
        return kind().read(control.source, controls.Span(0, shot.num_frames), (shot.height, shot.width))  # painted here
    if control.source is not None:
        return _frames(control.source, shot, shot.num_frames)
    assert request.source is not None, name
    frames = _frames(request.source, shot, shot.num_frames)
    settings = {} if control.preset is None else {"preset": control.preset}
    return controls.made_of(choices("control")[name](**settings), frames, request.seed)


def _frames(path: Path, shot: Shot, num: int) -> np.ndarray:
    """uint8 T H W 3: the first `num` frames, resized; a picture is a clip of one frame that stands still."""
    size = (shot.height, shot.width)
    if video.is_picture(path):
        return np.repeat(video.read(path, size=size).frames, num, 0)
    return video.read(path, 0, num, size=size).frames


def _tensor(frames: np.ndarray, device: torch.device) -> Tensor:
    """1 3 T H W in -1..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(device).float() / 127.5 - 1
