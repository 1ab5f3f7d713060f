"""`fewstep generate` on several processes makes the files of one; parts that are offloaded change no frame."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import main as cli
from fewstep.data.files import cache
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec

sys.path.insert(0, str(Path(__file__).parent))
from generating import SIZE, made


def test_processes_divide_the_clips_and_make_what_one_makes(student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--seed", "7"]
    assert made(tmp_path / "one", *asked) == 3
    assert [made(tmp_path / "two", *asked, rank=rank, size=2) for rank in (0, 1)] == [2, 1]
    for i in range(3):
        name = f"p_{i:04d}.mp4"
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    alone = [str(student), "--prompt", "rolls", "--seed", "9"]  # the third's seed
    made(tmp_path / "alone", *alone)
    assert (tmp_path / "alone" / "output.mp4").read_bytes() == (tmp_path / "one" / "p_0002.mp4").read_bytes()


def on_processes(num: int, *commands: list[str]) -> list[str]:
    """Runs these commands on `num` processes, one after the other; what each process printed."""
    code = (
        "import os, sys, torch; torch.set_num_threads(1); from fewstep.cli import main\n"
        f"for port, words in {list(zip(free_ports(len(commands)), commands, strict=True))!r}:\n"
        "    os.environ['MASTER_PORT'] = str(port)\n"  # gloo cannot meet a second time under the same address
        "    code = main(words)\n"
        "    if code:\n"
        "        sys.exit(code)\n"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(num), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num, "\n".join(said)
    return said


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def assert_same_files(root: Path, folder: str, num: int = 3) -> None:
    assert sorted(path.name for path in (root / folder).glob("*.mp4")) == [f"p_{i:04d}.mp4" for i in range(num)]
    for path in (root / "one").glob("*.mp4"):
        assert (root / folder / path.name).read_bytes() == path.read_bytes(), (folder, path.name)


def test_two_processes_divide_the_clips_the_weights_or_the_tokens_and_make_the_same_files(
    student: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--quality", "lossless"]
    assert made(tmp_path / "one", *asked[:-2]) == 3
    ways = {"divided": (), "sharded": ("--shard",), "together": ("--context", "2")}
    words = [["generate", *asked, *how, "--device", "cpu", "--out", str(tmp_path / name)] for name, how in ways.items()]
    said = on_processes(2, *words)
    for folder in ways:
        assert_same_files(tmp_path, folder)
    assert [text.count(" of 1: ") + text.count(" of 2: ") for text in said] == [4, 2]  # each file by one process, once
    assert [text.count(" of 3: ") for text in said] == [3, 0]  # those that two made together


@pytest.mark.slow
def test_four_processes_divide_clips_and_weights_over_pairs_that_share_tokens(student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--quality", "lossless"]
    assert made(tmp_path / "one", *asked[:-2]) == 3
    ways = {"together": (), "sharded": ("--shard",)}
    options = ("--context", "2", "--device", "cpu", "--out")
    said = on_processes(4, *(["generate", *asked, *how, *options, str(tmp_path / name)] for name, how in ways.items()))
    for folder in ways:
        assert_same_files(tmp_path, folder)
    assert [text.count(" of 1: ") + text.count(" of 2: ") for text in said] == [4, 0, 2, 0]


@pytest.mark.slow
def test_two_processes_that_share_tokens_make_the_pairs_of_one(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a ball\na red ball\nrolls\n")
    command = ["pairs", str(teacher), "--prompts", str(tmp_path / "p.txt"), *SIZE, "--num-steps", "4", "--path-times", "2"]
    command += ["--batch-size", "2", "--device", "cpu", "--verify", "2", "--out"]
    assert cli([*command, str(tmp_path / "one")]) == 0
    said = on_processes(2, [*command, str(tmp_path / "together"), "--context", "2"])
    assert "3 pairs made" in said[0]
    one, together = (sorted(path for path in (tmp_path / f).rglob("*.safetensors")) for f in ("one", "together"))
    assert [path.name for path in one] == [path.name for path in together] and len(one) >= 3
    for path, other in zip(one, together, strict=True):
        tensors = [cache.read(file).tensors for file in (path, other)]
        for name, tensor in tensors[0].items():
            assert float((tensors[1][name] - tensor).abs().max()) <= 1e-5 * float(tensor.abs().max())


def test_offloaded_parts_are_in_memory_for_their_stage_only_and_change_no_frame(student: Path, tmp_path: Path) -> None:
    """Bytes of all live parameters, counted whenever one of the three parts is called."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    (tmp_path / "p.txt").write_text("a ball\na red ball\n")
    asked = [str(student), "--prompts", str(tmp_path / "p.txt"), "--num-frames", "17", "--overlap", "5"]  # three chunks
    parts = {
        "CosmosTransformer3DModel": "network",
        "CosmosEncoder3d": "codec",
        "CosmosDecoder3d": "codec",
        "WordsModel": "text",
    }

    def bytes_in_memory() -> int:
        """Of what was made since the last `gc.freeze`: what is frozen is not among the objects that are gone through."""
        live = [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]
        return sum(item.numel() * item.element_size() for item in live if not item.is_meta)

    def peaks(*options: str) -> dict[str, int]:
        seen: dict[str, int] = {}
        calls = dict.fromkeys(parts, 0)

        def look(module: torch.nn.Module, _: Any) -> None:
            name = type(module).__name__
            part = parts.get(name)
            if part is not None and calls[name] < 2:  # looking takes long
                calls[name] += 1
                seen[part] = max(seen.get(part, 0), bytes_in_memory())

        gc.collect()
        gc.freeze()
        handle = register_module_forward_pre_hook(look)
        try:
            made(tmp_path / "".join(options or ["plain"]), *asked, *options)
        finally:
            handle.remove()
            gc.unfreeze()
        return seen

    sizes = {
        "network": sum(p.numel() * p.element_size() for p in open_model(student).network.module.parameters()),
        "codec": sum(p.numel() * p.element_size() for p in open_codec(student).module.parameters()),
    }
    plain, network, every = peaks(), peaks("--offload_diffusion_transformer"), peaks("--offload")
    assert plain["network"] == plain["codec"] == sizes["network"] + sizes["codec"]
    assert network == {**plain, "codec": sizes["codec"]}
    assert every == {**sizes, "text": plain["text"]}
    assert plain["text"] < min(sizes.values())  # the text encoder alone
    for i in range(2):
        files = {(tmp_path / folder / f"p_{i:04d}.mp4").read_bytes() for folder in ("plain", "--offload")}
        assert len(files) == 1
