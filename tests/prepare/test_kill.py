"""Every `fewstep prepare` command, killed with SIGKILL at random points and run again: as if nothing had happened.

Each runs in a copy of one process that has everything imported, so that it takes no seconds to start, and has never had a
second thread: a copy of the tests' own would wait for ever for locks that threads of OpenCV hold. A kill comes after some of
its writes.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from fewstep.data.files import cache, packs, video
from fewstep.data.folder.dataset import Folder
from fewstep.networks.encoders.codecs import Codec, codec_of
from fewstep.prepare import controls, latents, shards, text
from fewstep.toyworld import dataset
from fewstep.toyworld.physics import World

WORLD, NUM = World(num_frames=3), 4


class Words:
    dim, max_tokens, fingerprint = 4, 6, "words"

    def pooled(self, prompts: Sequence[str]) -> None:
        return None

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [[(zlib.crc32(word.encode()) % 100 + 1) / 8 for word in prompt.split()[:6]] for prompt in prompts]
        out = torch.zeros(len(prompts), 6, 4)
        for row, values in enumerate(rows):
            out[row, : len(values)] = torch.tensor(values)[:, None]
        return out, out[..., 0] != 0


def image_codec() -> Codec:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes: dict[str, Any] = {"block_out_channels": (4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
    return codec_of(AutoencoderKL(**blocks, **sizes))


COMMANDS: dict[str, Callable[[Path, Codec], int]] = {
    "toyworld": lambda out, codec: dataset.write(out / "new", NUM, 1, WORLD),
    "text": lambda out, codec: text.write(out, Words()).new,
    "text packed": lambda out, codec: text.write(out, Words(), form="packed").new,
    "latents": lambda out, codec: latents.write(Folder(str(out), text=None), codec, ahead=0).new,
    "controls edge": lambda out, codec: controls.write(out, controls.OfFrames("edge", "random")).new,
    "controls seg": lambda out, codec: controls.write(out, controls.OfFiles("seg", out / "files")).new,
    "shards": lambda out, codec: shards.write(out, str(out / "tars"), parts=["videos", "metas"], shard_bytes=1).new,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "set"
    dataset.write(out, NUM, 0, WORLD)
    (out / "seg").rename(out / "files")
    for name in ("edge", "depth", "vis", "keypoint"):
        shutil.rmtree(out / name)
    for path in sorted((out / "metas").iterdir()):
        path.write_text(f"{path.stem} {path.read_text()}")
    return out


@pytest.fixture(scope="module")
def codec() -> Codec:
    return image_codec()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_and_die(do: Callable[[], object], after: int, before_rename: bool) -> NoReturn:
    """Does it, and is killed right before or after it has finished `after` files."""
    num, replace = 0, Path.replace

    def counted(self: Path, target: Path) -> Path:
        nonlocal num
        if num == after and before_rename:
            os.kill(os.getpid(), signal.SIGKILL)
        out = replace(self, target)
        if num == after:
            os.kill(os.getpid(), signal.SIGKILL)
        num += 1
        return out

    Path.replace = counted  # type: ignore[method-assign]  # what every file is finished with (fewstep/files.py)
    try:
        do()
    finally:
        os._exit(0)


def serve() -> None:
    """For each line of the input a copy of this process, and a line with its exit code."""
    torch.set_num_threads(1)
    codec = image_codec()
    for line in sys.stdin:
        name, out, after, before_rename = json.loads(line)
        child = os.fork()
        if child == 0:
            run_and_die(partial(COMMANDS[name], Path(out), codec), after, before_rename)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()  # the end of its input is its end


def killed(server: subprocess.Popen[str], *order: object) -> bool:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    code = int(server.stdout.readline())
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("name", list(COMMANDS))
def test_killed_at_random_points_and_run_again_it_is_as_if_nothing_had_happened(
    source: Path, codec: Codec, server: subprocess.Popen[str], tmp_path: Path, name: str
) -> None:
    command, rng = COMMANDS[name], random.Random(name)
    whole = Path(shutil.copytree(source, tmp_path / "whole"))
    made = command(whole, codec)
    assert made == NUM
    wanted = content(whole)
    out = Path(shutil.copytree(source, tmp_path / "killed"))
    kills = 0
    for _ in range(2 if name == "toyworld" else 4):
        files = rng.randrange(9, 15) if name == "toyworld" else rng.randrange(4)  # a clip of the toy world is eight of them
        kills += killed(server, name, str(out), files, rng.random() < 0.5)
        for path in out.rglob("*"):  # what has its final name is whole
            if path.is_file() and not path.name.startswith("."):
                assert path.stat().st_size, path
                if path.suffix == ".mp4":
                    video.probe(path)
                if path.suffix == ".safetensors":
                    cache.read(path)
    assert kills
    assert command(out, codec) < NUM
    assert command(out, codec) == 0
    found = content(out)
    left = {key for key in found.keys() - wanted.keys() if Path(key).name.startswith(".")}  # a .partial that nobody reads
    assert {key: value for key, value in found.items() if key not in left} == wanted
    assert all(key.endswith(".partial") for key in left)
    if name == "latents":
        assert len(packs.open_packs(out / "latents")) == NUM


if __name__ == "__main__":
    serve()
