"""Readers of untrusted files on damaged and made-up input: a value or one ValueError, no code, no memory beyond a bound.

Each reader is fuzzed in a process of its own, so that a crash of a C library is seen and not suffered. After everything is
imported, an audit hook notes any import, program, socket or file written by what a file says, and the memory that may still be
taken is limited: a reader that believes a header runs into MemoryError, which is no ValueError. How often: FEWSTEP_FUZZ.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Shares of the inputs: what is most exposed gets most.
TARGETS = {"pickle": 6, "rle": 4, "mp4": 4, "captions": 2, "keypoint": 1.5, "safetensors": 1.5, "npy": 1}
MARGIN = 1 << 30  # bytes of memory a reader may take


def run(total: int) -> dict[str, dict[str, Any]]:
    """Fuzzes each reader with its share of `total` inputs, in another process; what was counted."""
    wanted = {target: round(total * share / sum(TARGETS.values())) for target, share in TARGETS.items()}
    words = [sys.executable, __file__, json.dumps(wanted)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    told = {one["target"]: one for one in map(json.loads, done.stdout.splitlines())}
    assert told.keys() == TARGETS.keys()
    for target, one in told.items():
        assert one["num"] >= 0.9 * wanted[target] and one["forbidden"] == [] and one["good"] and one["refused"], one
    return told


def test_a_value_or_one_clear_error() -> None:
    run(500)


@pytest.mark.slow
def test_twenty_thousand_inputs() -> None:
    told = run(int(os.environ.get("FEWSTEP_FUZZ", "20000")))
    print(json.dumps(list(told.values()), indent=1))


# ---- in the other process -------------------------------------------------------------------------------------------


def mutated(draw: Any, st: Any, seeds: list[bytes]) -> bytes:
    """An honest file with some bytes changed, cut, repeated or put in; or bytes of no file at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["set", "set", "flip", "number", "insert", "cut", "end", "repeat"]))
        if not data:
            break
        if how == "set":
            data[place] = draw(st.integers(0, 255))
        elif how == "flip":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":  # sizes and counts are four bytes somewhere
            number = draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**24, 65535, 0x7FFF0000]))
            data[place : place + 4] = number.to_bytes(4, draw(st.sampled_from(["big", "little"])))
        elif how == "insert":
            data[place:place] = draw(st.binary(max_size=20))
        elif how == "cut":
            del data[place : place + draw(st.integers(1, 40))]
        elif how == "end":
            del data[place:]
        else:
            data[place:place] = data[place : place + draw(st.integers(1, 60))]
    return bytes(data)


def seeds_of(target: str, home: Path) -> list[bytes]:
    from fewstep.data.files import cache, masks, video

    draw = np.random.default_rng(0)
    if target == "pickle":
        values = [
            [draw.normal(size=(7, 6)).astype(np.float16)],
            draw.normal(size=(4, 3, 8, 8)).astype(np.float32),
            {"a": [1, 2.5, "text", b"bytes", None, True, (1, {2})], 3: np.arange(5)},
        ]
        return [pickle.dumps(value, protocol=protocol) for value in values for protocol in (0, 2, 4)]
    if target == "rle":
        ball = np.zeros((5, 12, 12), bool)
        ball[1:4, 3:9, 2:7] = True
        masks.write(home / "a.pickle", [("ball", ball), ("none", np.zeros_like(ball)), ("all", ~np.zeros_like(ball))])
        return [(home / "a.pickle").read_bytes()]
    if target == "keypoint":
        body = draw.random((133, 3)).astype(np.float32)
        people = {n: [{"body-keypoints": body, "hand-keypoints": body[91:]}] * (n % 2) for n in range(3)}
        return [pickle.dumps(people, protocol=4)]
    if target == "mp4":
        frames = draw.integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
        found: list[bytes] = []
        for quality in ("lossless", 30):
            video.write(home / "a.mp4", frames, 8, quality)  # type: ignore[arg-type]
            found.append((home / "a.mp4").read_bytes())
        return found
    if target == "safetensors":
        import torch

        cache.write(home / "a.safetensors", {"latents": torch.zeros(4, 3, 4, 4)}, made_from={"codec": "x"}, facts={"fps": 8})
        return [(home / "a.safetensors").read_bytes()]
    if target == "npy":
        kept = io.BytesIO()
        np.save(kept, draw.normal(size=(4, 3, 4, 4)).astype(np.float32))
        return [kept.getvalue()]
    return [b"A ball rolls to the left.", "caf\u00e9 \u2603".encode(), "\ufeffbom".encode(), b"\xff\xfea\x00", b"   \n"]


def reader_of(target: str, home: Path) -> Callable[[bytes], object]:
    from fewstep.data.files import arrays, cache, keypoints, masks, video
    from fewstep.data.folder import parts, samples
    from fewstep.data.folder.layout import Layout

    def at(name: str, data: bytes) -> Path:
        path = home / name
        path.write_bytes(data)
        return path

    def read_rle(data: bytes) -> object:
        return [
            mask.frames([0, mask.shape[0] - 1])
            for mask in masks.read(at("m.pickle", data))
            if mask.shape[1] * mask.shape[2] < 1e7
        ]

    def read_mp4(data: bytes) -> object:
        path = at("v.mp4", data)
        header = video.probe(path)
        small = header.num_frames < 100 and header.height * header.width < 1e6
        return [f.shape for f in video.stream(path, (8, 8))], video.read(path).frames.shape if small else None

    def read_caption(data: bytes) -> object:
        at("metas/a.txt", data)
        texts, problems = samples.captions_of(Layout(home), ["a"])
        if problems:
            raise ValueError(problems[0])
        return texts["a"]

    def read_pickle(data: bytes) -> object:
        path = at("n.pickle", data)
        return arrays.read(path), parts.noise(path)

    (home / "metas").mkdir(exist_ok=True)
    return {
        "pickle": read_pickle,
        "rle": read_rle,
        "keypoint": lambda data: keypoints.draw(keypoints.read(at("k.pickle", data), range(3)), 24, 32),
        "mp4": read_mp4,
        "safetensors": lambda data: cache.read(at("c.safetensors", data)),
        "npy": lambda data: parts.noise(at("n.npy", data)),
        "captions": read_caption,
    }[target]


# Not "compile", which numpy's literal parser makes, nor "code.__new__", of Cython's tracebacks: neither runs anything.
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen", "pty.spawn", "ctypes.dlopen"),
    *("exec", "import", "marshal.loads", "socket.", "urllib.Request"),
    *("os.remove", "os.rename", "os.mkdir", "shutil."),
)


def fuzz(wanted: dict[str, int], home: Path) -> None:
    import torch

    jobs = {target: (seeds_of(target, home), reader_of(target, home)) for target in wanted}
    for seeds, read in jobs.values():  # everything that is imported late is imported now
        for data in [*seeds, seeds[0][:-3], b""]:
            with contextlib.suppress(ValueError):
                read(data)
    torch.zeros(1)
    codecs.lookup("raw_unicode_escape")  # imported by Python itself for the first text of protocol 0
    forbidden, listening = list[str](), [False]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not listening[0]:
            return
        if event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+") and str(home) not in str(args[0]):
            forbidden.append(f"writes {args[0]}")
        elif event.startswith(FORBIDDEN) and not (event == "import" and str(args[0]) in sys.modules):
            forbidden.append(f"{event} {str(args[0])[:80]}")

    sys.addaudithook(hook)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MARGIN, taken + MARGIN))
    for target, (seeds, read) in jobs.items():
        counts = attacked(wanted[target], seeds, read, listening)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"target": target} | counts | {"forbidden": forbidden[:5], "peak_mib": peak // 1024}), flush=True)
        forbidden.clear()


def attacked(num: int, seeds: list[bytes], read: Callable[[bytes], object], listening: list[bool]) -> dict[str, int]:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    counts = {"num": 0, "good": 0, "refused": 0}

    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def attack(data: Any) -> None:
        value = mutated(data.draw, st, seeds)
        counts["num"] += 1
        listening[0] = True
        try:
            read(value)
            counts["good"] += 1
        except ValueError:
            counts["refused"] += 1
        finally:
            listening[0] = False

    attack()
    return counts


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        fuzz(json.loads(sys.argv[1]), Path(place))
