"""How long a clip takes on the machine at hand, stage by stage, and what the network calls of it are.

    text       the prompt through the text encoder, where one lies beside the model; null without one
    denoise    noise to latents: every network call
    decode     latents to pixels
    end_to_end their sum

Each stage runs once to warm up and then `repeats` times, waiting for the device before and after. "Frames per second" is
ambiguous, so it has two names: frames_per_s_denoise_only and frames_per_s_end_to_end. Loading and writing files do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fewstep.batch import Batch
from fewstep.diffusion import Rng
from fewstep.diffusion.sampling import Sampler
from fewstep.inference.model import Model
from fewstep.networks.encoders.codecs import Codec
from fewstep.parallel import peak_memory_gib


def measure(
    model: Model, sampler: Sampler, codec: Codec, batch: Batch, prompt: str, repeats: int, device: str
) -> dict[str, Any]:
    """Seconds of each stage of one clip: median, 5th and 95th percentile; network calls, frame rates, peak memory."""
    assert batch.x0 is not None
    frames = batch.x0.shape[2]
    rng = Rng(0, 0, torch.zeros(1, dtype=torch.long), device)
    noise = rng.normal(codec.shape(*batch.x0.shape[2:]))
    control = {name: codec.encode(pixels) for name, pixels in batch.cond.control.items()}
    cond = replace(batch.cond, control=control)
    negative = None if batch.negative is None else replace(batch.negative, control=control)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        text = _text(model, prompt, device)
        seconds = {} if text is None else {"text": _timed(text, repeats, device)}
        seconds["denoise"] = _timed(lambda: sampler(model.network, noise, cond, rng, negative), repeats, device)
        latents = sampler(model.network, noise, cond, rng, negative)
        seconds["decode"] = _timed(lambda: codec.decode(latents), repeats, device)
    seconds["end_to_end"] = [sum(row) for row in zip(*seconds.values(), strict=True)]
    stages = {name: _percentiles(values) for name, values in seconds.items()}
    return {
        "network_calls": sampler.num_calls,  # guidance counts twice, a last clean denoising step once
        "repeats": repeats,
        "seconds": stages,
        "clips_per_s_end_to_end": 1 / stages["end_to_end"]["median"],
        "frames_per_s_denoise_only": frames / stages["denoise"]["median"],
        "frames_per_s_end_to_end": frames / stages["end_to_end"]["median"],
        "frames": frames,
        "size": list(batch.x0.shape[3:]),
        "peak_memory_gib": peak_memory_gib(device),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads",
        "has_text": text is not None,
    }


def _text(model: Model, prompt: str, device: str) -> Callable[[], object] | None:
    from fewstep.networks.encoders.text import open_text_encoder

    if model.folder is None or not (model.folder / "text_encoder").is_dir():
        return None
    encoder = open_text_encoder(str(model.folder), device=device)
    return lambda: encoder.encode([prompt])


def _timed(stage: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each repetition, after one to warm up."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    out: list[float] = []
    for _ in range(1 + repeats):
        wait()
        began = time.perf_counter()
        stage()
        wait()
        out.append(time.perf_counter() - began)
    return out[1:]


def _percentiles(values: list[float]) -> dict[str, float]:
    low, high = np.quantile(values, [0.05, 0.95])
    return {"median": statistics.median(values), "p5": float(low), "p95": float(high)}
