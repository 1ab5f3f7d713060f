"""Streaming of a causal student: does a chunk cost as much, and memory stay as it is, after many chunks? JSON on the last line.

    python benchmarks/streaming.py [--chunks 60] [--chunk 3 --span 21 --sink 0] [--layers 4 --width 192] [--out FILE]

A random student of Wan's class with an autoencoder of Wan's class, both small, by the iterator that `generate --stream` uses.
Once the window has filled, two things must stay: what is held (keys and values; all tensors of the process), and the cost of a
chunk. A second stream is started when the first has made its chunks, and once its window has filled they go on in turns: what
else the machine does, it does to both. The cost is CPU time on a CPU and wall time on a GPU; the figures that a user quotes, as
`generate --stream` prints them, are wall time.

    flat_cost      median over the turns: a chunk of the old stream over one of the young stream
    flat_memory    tensors held after a chunk: median of the last fifth of the chunks over that of the first fifth after the
                   window has filled
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common.interleaved import CLOCK, DEVICE, now

from fewstep.batch import Condition
from fewstep.diffusion import Cache, RectifiedFlow, Rng, StudentSampler
from fewstep.diffusion.by_chunk import ByChunk
from fewstep.inference.stream import Clock, frames_of
from fewstep.networks.causal import Causal, CausalSpec, KeyValueCache
from fewstep.networks.encoders.codecs import Autoencoder, codec_of
from fewstep.networks.families.wan.network import WanSpec

BOUND = 1.05
TURNS = 12


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("chunks", 60), ("chunk", 3), ("span", 21), ("sink", 0), ("layers", 4), ("width", 192), ("side", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    record = measure(options)
    print(json.dumps(record))
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Streams one clip and describes its chunks."""
    caches: list[KeyValueCache] = []
    network, codec = _network(options, caches), _codec()
    filling = sum(chunk.stop <= options.span for chunk in network.chunks(options.chunks * options.chunk))
    sampler = StudentSampler((1.0, 0.9375, 0.8333, 0.625)[: options.steps], RectifiedFlow(), by_chunk=ByChunk())
    cond = Condition(text=torch.randn(1, 16, 32, device=DEVICE))

    def stream(chunks: int, clock: Clock) -> Iterator[Any]:
        noise = torch.randn(1, 4, chunks * options.chunk, options.side, options.side, device=DEVICE)
        return frames_of(network, sampler, codec, cond, noise, Rng(0, rows=[0], device=DEVICE), clock=clock)

    clock, held, cached = Clock(), list[int](), list[int]()
    old, young = stream(options.chunks + TURNS, clock), stream(filling + TURNS, Clock())
    for _ in range(options.chunks):
        next(old)
        held.append(_tensor_bytes())
        cached.append(caches[0].num_bytes)
    figures = clock.figures(filling)
    for _ in range(filling):
        next(young)
    turns = [(_cost(old), _cost(young)) for _ in range(TURNS)]
    return {
        "chunks": len(held),
        "filling": filling,
        "flat_cost": round(statistics.median(late / early for late, early in turns), 4),
        "flat_memory": round(_growth(held[filling:]), 4),
        "flat_cache": round(_growth(cached[filling:]), 4),
        "bound": BOUND,
        "cost_of": CLOCK,
        "chunk_cost_s": [round(statistics.median(costs), 4) for costs in zip(*turns, strict=True)],
        "tensor_mib": round(held[-1] / 2**20, 2),
        "cache_mib": round(cached[-1] / 2**20, 3),
        "stream": figures,
        "device": torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "precision": "fp32",
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
    }


def _cost(frames: Iterable[Any]) -> float:
    """Of the next chunk of a stream."""
    before = now()
    next(iter(frames))
    return now() - before


def _growth(values: Sequence[float]) -> float:
    """Median of the last fifth over that of the first."""
    num = max(1, len(values) // 5)
    return statistics.median(values[-num:]) / statistics.median(values[:num])


def _network(options: argparse.Namespace, caches: list[KeyValueCache]) -> Causal:
    class Watched(Causal):
        """Notes its caches."""

        def new_cache(self, like: Tensor) -> Cache:
            cache = super().new_cache(like)
            assert isinstance(cache, KeyValueCache)
            caches.append(cache)
            return cache

    heads = options.width // 24
    spec = WanSpec(
        num_heads=heads, head_dim=24, num_layers=options.layers, ffn_dim=2 * options.width, text_dim=32, text_tokens=16,
        freq_dim=64, latent_channels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    built = CausalSpec(spec, options.chunk, options.span, options.sink).build()
    assert isinstance(built, Causal)
    built.module.to(DEVICE).eval()
    return Watched(built.inner, built.causality, built.attention)


def _codec() -> Autoencoder:
    from diffusers import AutoencoderKLWan

    small: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    small |= {"temperal_downsample": [False, True, True], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    torch.manual_seed(0)
    module: Any = AutoencoderKLWan(**small)  # Any: diffusers' stub of `to` forgets itself
    return codec_of(module.to(DEVICE))


def _tensor_bytes() -> int:
    """Of all tensors of the process, each storage once."""
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated()
    return sum({storage.data_ptr(): storage.nbytes() for storage in _storages()}.values())


def _storages() -> Iterator[torch.UntypedStorage]:
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):  # isinstance would ask modules that load when they are asked
            yield thing.untyped_storage()


if __name__ == "__main__":
    main()
