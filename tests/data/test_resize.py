"""Resized frames against the arithmetic of their planes in floating point: BT.601, then a bicubic widened against aliasing."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fewstep.data.files import video

HEIGHT, WIDTH = 176, 320


def natural(height: int, width: int) -> NDArray[np.uint8]:
    """A picture with the spectrum of a photograph: detail in its light, little in its colours."""
    rng = np.random.default_rng(0)

    def texture(sizes: tuple[int, ...], strength: float) -> NDArray[np.float64]:
        shape = [(n, rng.normal(size=(height // n + 2, width // n + 2))) for n in sizes]
        return sum(
            strength * n / max(sizes) * cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC) for n, field in shape
        )

    light, blue, red = 128 + texture((4, 8, 16, 32), 35), texture((32, 64), 20), texture((32, 64), 20)
    rgb = np.stack([light + 1.4 * red, light - 0.34 * blue - 0.71 * red, light + 1.77 * blue], -1)
    return np.asarray(np.clip(rgb, 0, 255), dtype=np.uint8)


def exact(path: Path) -> NDArray[np.float64]:
    """The first frame in RGB, from its planes: colours lie on the left of every second column, between two rows."""
    with av.open(str(path)) as container:
        planes = next(container.decode(video=0)).to_ndarray()
    light = planes[:HEIGHT].astype(np.float64)
    places = np.meshgrid(np.arange(WIDTH, dtype=np.float32) / 2, (np.arange(HEIGHT, dtype=np.float32) - 0.5) / 2)
    half = planes[HEIGHT:].reshape(2, HEIGHT // 2, WIDTH // 2).astype(np.float32)
    blue, red = (cv2.remap(c, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float64) for c in half)
    y, u, v = (light - 16) * 255 / 219, (blue - 128) * 255 / 224, (red - 128) * 255 / 224
    return np.clip(np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1), 0, 255)


def bicubic(picture: NDArray[np.float64], size: video.Size) -> NDArray[np.float64]:
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
    made = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)[0]
    return made.permute(1, 2, 0).clamp(0, 255).numpy()


@pytest.mark.parametrize(
    ("size", "error", "bias"),
    [
        ((88, 160), 0.5, 0.2),  # in planes of RGB
        ((44, 80), 0.6, 0.2),
        ((87, 161), 0.5, 0.2),
        ((352, 640), 1.5, 1.3),  # in the file's own format: ffmpeg's own conversion at one size is 1 of 255 too dark
        ((168, 304), 1.5, 1.3),
    ],
)
def test_frames_of_a_video_are_those_of_exact_arithmetic(tmp_path: Path, size: video.Size, error: float, bias: float) -> None:
    frames = np.repeat(natural(HEIGHT, WIDTH)[None], 3, 0)
    video.write(tmp_path / "a.mp4", frames, 16, quality=10)
    wanted = bicubic(exact(tmp_path / "a.mp4"), size)
    found = video.read(tmp_path / "a.mp4", size=size).frames[0]
    assert found.shape == (*size, 3)
    assert np.abs(found - wanted).mean() < error
    assert abs((found - wanted).mean()) < bias


@pytest.mark.parametrize("size", [(88, 160), (170, 310), (33, 65)])
def test_frames_of_a_lossless_video_are_bicubic(tmp_path: Path, size: video.Size) -> None:
    frames = np.repeat(natural(HEIGHT, WIDTH)[None], 2, 0)
    video.write(tmp_path / "a.mp4", frames, 16, quality="lossless")
    difference = np.abs(video.read(tmp_path / "a.mp4", size=size).frames[1] - bicubic(frames[1].astype(np.float64), size))
    assert difference.mean() < 0.5 and difference.max() < 8
