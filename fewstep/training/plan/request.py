"""What a `plan` command asks for. Reading it imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.config import ConfigError

GPUS = {  # GiB that the driver reports, most of which a process can have
    "h100": 79.6, "a100": 79.2, "a100-40": 39.4, "h200": 139.8, "b200": 178.4, "l40s": 44.4, "a6000": 47.5, "l4": 22.0,
    "rtx4090": 23.5, "rtx5090": 31.4,
}  # fmt: skip
HERE = "here"  # the GPU of this machine, or the memory of one without


@dataclass(frozen=True)
class PlanRequest:
    """The GPUs, and the shapes of a batch where there are no data yet."""

    gpus: int = 1
    gpu: str = "h100"  # a name of GPUS, GiB, or HERE
    shape: tuple[int, ...] | None = None  # of latents, C T H W
    text: tuple[int, int] | None = None  # tokens, channels

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"gpus={self.gpus}: at least 1")
        if self.gpu != HERE:
            memory_of(self.gpu)


def split_words(words: Sequence[str]) -> tuple[list[str], PlanRequest]:
    """The words of the run, and the request that the others make. Raises ConfigError."""
    rest: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in ("gpus", "gpu", "shape", "text"):
            values[name] = value
        else:
            rest.append(word)
    gpus = values.get("gpus", "1")
    if not gpus.isdecimal():
        raise ConfigError(f"gpus={gpus}: give a number")
    shape = _sizes("shape", values["shape"]) if "shape" in values else None
    text = _sizes("text", values["text"]) if "text" in values else None
    if text is not None and len(text) != 2:
        raise _wrong_sizes("text", values["text"])
    return rest, PlanRequest(int(gpus), values.get("gpu", "h100"), shape, None if text is None else (text[0], text[1]))


def memory_of(gpu: str) -> float:
    """GiB of a GPU, by name or as a number."""
    if gpu.lower() in GPUS:
        return GPUS[gpu.lower()]
    try:
        return float(gpu)
    except ValueError:
        raise ConfigError(f"gpu={gpu}: give GiB, or one of {', '.join(GPUS)}, {HERE}") from None


def _sizes(name: str, text: str) -> tuple[int, ...]:
    words = text.lower().split("x")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise _wrong_sizes(name, text)
    return tuple(map(int, words))


def _wrong_sizes(name: str, text: str) -> ConfigError:
    example = "512x1024 (tokens, channels)" if name == "text" else "16x16x88x160 (C T H W of latents)"
    return ConfigError(f"{name}={text}: sizes are written as {example}")
