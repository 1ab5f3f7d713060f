"""What the data road costs beside what cannot be left out. The last line is one JSON object.

    python benchmarks/data.py [--runs 7]

`decode`   a window of a clip, resized: bare PyAV decoding of the same frames to arrays / ours. In one process, in turns, with
           the threads that ours uses; the best of `runs` each, in seconds and in seconds of CPU
`latents`  a batch of cached latents against the same batch decoded and encoded, on toy clips with a tiny Wan autoencoder
`wait`     the share of a step that waits for data: cached latents of toy clips, batches of 8, steps of 50 ms of work

The first value is that of `decode` by CPU, the worst over its clips: it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
from numpy.typing import NDArray

import fewstep
from fewstep.data.files import video
from fewstep.data.folder.dataset import Folder
from fewstep.data.loader import Batches, Loader
from fewstep.networks.encoders.codecs import codec_of
from fewstep.prepare import latents
from fewstep.toyworld.dataset import write as write_toyworld

START, COUNT = 8, 17
# name: size of the file, size wanted
CLIPS: dict[str, tuple[video.Size, video.Size | None]] = {
    "720p as it is": ((704, 1280), None),
    "720p to 480 x 832": ((704, 1280), (480, 832)),
    "720p to 256 x 448": ((704, 1280), (256, 448)),
    "800 x 1360 to 704 x 1280": ((800, 1360), (704, 1280)),
    "toy as it is": ((32, 32), None),
}
BOUNDS = {"decode": 0.9, "latents": 10.0, "wait": 0.02}
STEP_S, BATCH, NUM = 0.050, 8, 32


def natural(height: int, width: int, num: int) -> NDArray[np.uint8]:
    """A camera that moves over a picture with the spectrum of a photograph, and the grain of one."""
    rng, tall, wide = np.random.default_rng(0), height + num, width + 2 * num

    def texture(sizes: tuple[int, ...], strength: float) -> NDArray[np.float64]:
        out = np.zeros((tall, wide))
        for size in sizes:
            field = rng.normal(size=(tall // size + 2, wide // size + 2))
            out += strength * size / max(sizes) * cv2.resize(field, (wide, tall), interpolation=cv2.INTER_CUBIC)
        return out

    light, blue, red = 128 + texture((4, 8, 16, 32, 64, 128), 35), texture((128, 256), 20), texture((128, 256), 20)
    rgb = np.stack([light + 1.4 * red, light - 0.34 * blue - 0.71 * red, light + 1.77 * blue], -1)
    frames = [rgb[t : t + height, 2 * t : 2 * t + width] + rng.normal(0, 3, (height, width, 1)) for t in range(num)]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def bare(path: Path) -> list[NDArray[Any]]:
    """The frames as PyAV gives them, with the threads that `video.read` asks for, and nothing checked."""
    frames: list[NDArray[Any]] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1 if stream.width * stream.height < 256 * 256 else 0
        stream.thread_type = "AUTO"
        for place, frame in enumerate(container.decode(stream)):
            if place >= START:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == COUNT:
                break
    return frames


def best(runs: int, **does: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """The least seconds, and the least seconds of CPU, of each; in turns, so that both see the same machine."""
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in does}
    for _ in range(runs):
        for name, do in does.items():
            wall, cpu = time.perf_counter(), time.process_time()
            do()
            took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: (min(wall for wall, _ in times), min(cpu for _, cpu in times)) for name, times in took.items()}


def decode(folder: Path, runs: int) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name, (size, wanted) in CLIPS.items():
        path = folder / f"{size[0]}x{size[1]}.mp4"
        if not path.is_file():
            video.write(path, natural(*size, START + COUNT + 4), 24, quality="lossless" if size == (32, 32) else 18)
        times = 20 if size == (32, 32) else 1  # a toy clip is too short for the clock

        def ours(path: Path = path, wanted: video.Size | None = wanted, times: int = times) -> None:
            for _ in range(times):
                video.read(path, START, COUNT, size=wanted)

        def theirs(path: Path = path, times: int = times) -> None:
            for _ in range(times):
                bare(path)

        took = best(runs, bare=theirs, ours=ours)
        wall, cpu = (took["bare"][n] / took["ours"][n] for n in (0, 1))
        parts[name] = {"by_cpu": round(cpu, 3), "by_time": round(wall, 3)}
        parts[name]["bare_cpu_ms_per_frame"] = round(1e3 * took["bare"][1] / COUNT / times, 3)
        print(f"decode, {name}: {parts[name]}", file=sys.stderr, flush=True)
    return parts


def cached(folder: Path, runs: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    write_toyworld(folder, NUM, 0)
    sizes: dict[str, Any] = {"base_dim": 8, "z_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics: dict[str, Any] = {"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    codec = codec_of(AutoencoderKLWan(**sizes, **statistics, temperal_downsample=[False, True, True]))
    pixels = Folder(str(folder), text=None, ram_gib=0.0)  # nothing stays in memory: it is reading that is measured
    latents.write(pixels, codec)
    there, coded = pixels.open(), Folder(str(folder), text=None, x0="latents", ram_gib=0.0).open()
    index = torch.arange(BATCH)

    def encode() -> None:
        found = there.batch(index).x0
        assert found is not None
        with torch.inference_mode():
            codec.encode(found)

    def read() -> None:
        for first in range(0, NUM, BATCH):
            coded.batch(index + first)

    took = best(runs, encode=encode, read=read)
    read_s = tuple(value / (NUM // BATCH) for value in took["read"])
    return {
        "value": round(took["encode"][1] / read_s[1], 1),
        "by_time": round(took["encode"][0] / read_s[0], 1),
        "encode_ms": round(1e3 * took["encode"][1], 2),
        "read_ms": round(1e3 * read_s[1], 3),
    }


def waiting(folder: Path, runs: int) -> dict[str, Any]:
    data, steps = Folder(str(folder), text=None, x0="latents").open(), 20
    weight, shares = torch.randn(256, 256), list[float]()
    for run in range(runs):
        with Batches(
            data, [torch.arange(BATCH)], BATCH, seed=run, end=BATCH * (steps + 1), loader=Loader(num_workers=2)
        ) as batches:
            batches.take(0, 0)
            batches.metrics()  # the first batch has nobody who could have read it ahead
            for step in range(1, steps + 1):
                batches.take(step * BATCH, 0)
                end = time.perf_counter() + STEP_S
                while time.perf_counter() < end:
                    torch.mm(weight, weight)
            shares.append(batches.metrics()["data/wait_share"])
    return {"value": round(min(shares), 5), "spread": [round(min(shares), 5), round(max(shares), 5)], "step_ms": 1e3 * STEP_S}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=7)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        clips = decode(Path(place), wanted.runs)
        encoded = cached(Path(place) / "set", wanted.runs)
        wait = waiting(Path(place) / "set", wanted.runs)
    print(f"latents: {encoded}\nwait: {wait}", file=sys.stderr)
    ratios = [part["by_cpu"] for part in clips.values()]
    result = {
        "name": "data_road",
        "value": min(ratios),
        "unit": "bare PyAV decoding / decoding, window and resize, in seconds of CPU",
        "bound": BOUNDS["decode"],
        "better": "higher",
        "runs": wanted.runs,
        "spread": [min(ratios), max(ratios)],
        "device": f"{platform.machine()} cpu, {os.cpu_count()} cores",
        "versions": {
            "fewstep": fewstep.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "av": av.__version__,
        },
        "parts": {
            "decode": clips,
            "latents": encoded | {"bound": BOUNDS["latents"], "better": "higher", "unit": "encoding on the fly / reading, CPU"},
            "wait": wait | {"bound": BOUNDS["wait"], "better": "lower", "unit": "share of the time"},
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
