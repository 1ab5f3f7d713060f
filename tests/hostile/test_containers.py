"""Hand-made files of arrays: headers that claim much, name something twice, or have a type that is not read here."""

from __future__ import annotations

import json
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from fewstep.cli import main
from fewstep.data.files import arrays, packs
from fewstep.data.folder.dataset import Folder
from fewstep.errors import UserError
from fewstep.inference.pair_prompts import prepared_window
from fewstep.untrusted.torch_files import load_torch


def npy(descr: str, shape: str = "(4,)") -> bytes:
    return raw_npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}") + bytes(64)


def raw_npy(header: str) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("('<f4',)"), "cannot be opened: tuple index out of range"),
        (npy("()"), "cannot be opened"),
        (raw_npy("-" * 9000 + "1"), "cannot be opened"),  # RecursionError or MemoryError of Python's parser
        (npy("'|S0'", "(4294967296,)"), r"holds \|S0 values, not an array of numbers"),  # took 4 GiB and 26 s
        (npy("'<f16'"), "holds float128 values"),
        (npy("'<c8'"), "holds complex64 values"),
        (npy("[('a', '<f4')]"), "holds .* values"),
        (npy("'<f4'", "(4294967296, 4294967296)"), "cannot be opened"),
    ],
)
def test_a_header_of_npy_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file}: {message}") as error:
        arrays.read(file)
    assert "\n" not in str(error.value)


def test_npy_of_the_other_byte_order(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=">f4").reshape(2, 3))
    assert arrays.read_one(tmp_path / "x.npy").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("name", "message"),
    [("archive/data/0", "two entries of one name"), ("archive/data.pkl", "two entries"), ("other/data.pkl", "2 data.pkl")],
)
def test_a_torch_archive_that_can_be_read_in_two_ways(name: str, message: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "archive.pt")
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "archive.pt", "a") as archive:
        warnings.simplefilter("ignore")  # of zipfile, about the name
        archive.writestr(name, bytes(8))
    with pytest.raises(UserError, match=message):
        load_torch(tmp_path / "archive.pt")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"net.a": torch.ones(2, dtype=torch.complex64)}, "net.a is of type torch.complex64, which is not written here"),
        ({"net.a": torch.ones(2, dtype=torch.uint16)}, "net.a is of type torch.uint16"),
        ({"net.a": torch.ones(2), "net.\x1b[31m\nfewstep: well": torch.ones(2)}, r"called 'net.\\x1b\[31m\\nfewstep: well'"),
        ({}, "holds no tensors"),
    ],
)
def test_weights_that_cannot_be_converted(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tensors, tmp_path / "w.pt")
    assert main(["convert", str(tmp_path / "w.pt"), str(tmp_path / "x.safetensors")]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fewstep: ")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert not (tmp_path / "x.safetensors").exists()


def test_safetensors_without_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.safetensors").write_bytes(save({}))
    assert main(["convert", str(tmp_path / "w.safetensors"), str(tmp_path / "x.pt")]) == 1
    assert "w.safetensors' holds no tensors" in capsys.readouterr().err


def packed(root: Path, facts: dict[str, Any] | None = None, data: torch.Tensor | None = None, **changes: Any) -> Folder:
    """Packed latents of one clip that was padded to 32 x 32 before it was encoded, with changes to what they say."""
    place = root / "latents" / "packs"
    place.mkdir(parents=True)
    origin = {"part": "videos", "video_size": "32x32", "resize": "pad"} | changes.pop("made_from", {})
    whole = {"num_frames": 1.0, "height": 16.0, "width": 32.0} | (facts or {})
    row = {"stem": "clip", "content": "x", "facts": {key: value for key, value in whole.items() if value is not None}}
    header = {"made_from": origin, "rows": [row | changes], "spans": [[0, 1]], "lengths_differ": False}
    header |= {"rows": [], "spans": []} if changes.get("rows") == [] else {}
    tensors = {"data": torch.ones(1, 4, 1, 4, 4) if data is None else data}
    save_file(tensors, place / "00000.safetensors", {"pack": json.dumps(header)})
    return Folder(str(root), x0="latents", text=None, negative=None, num_frames=1)


def test_honest_packs_of_padded_clips(tmp_path: Path) -> None:
    padding = packed(tmp_path).open().batch(torch.tensor([0])).cond.padding
    assert padding is not None and padding.sum() == 32 * 16
    assert packs.open_packs(tmp_path / "latents").video_size() == (32, 32)


@pytest.mark.parametrize(
    "changes",
    [
        *({"facts": {"num_frames": value}} for value in (float("nan"), float("inf"), -1.0, 1e300)),
        *({"facts": {"height": value}} for value in (float("nan"), 0.0, -4.0, 1e15, None)),
        *({"facts": {"stride": value}} for value in (float("nan"), -1.0)),
        *({"made_from": {"video_size": size}} for size in ("axb", "32", "own x own", "0x0", "1000000000x1000000000", "1x2x3")),
        *({"stem": stem} for stem in ("../../x", "/etc/passwd", "a\nfewstep: well", "", ".hidden")),
        *({"start": start} for start in (-1, 2**64)),
        {"data": torch.ones(())},
        {"data": torch.ones(0, 4, 1, 4, 4)},
        {"rows": []},
    ],
    ids=str,
)
def test_packs_that_say_what_cannot_be(changes: dict[str, Any], tmp_path: Path) -> None:
    """Each was a traceback, in one reader or the other, or was believed."""
    spec = packed(tmp_path, **changes)
    with pytest.raises(UserError, match="^" + str(tmp_path / "latents")):
        spec.open()  # reads the first sample
    with pytest.raises(UserError, match="^" + str(tmp_path / "latents")):
        from fewstep.data.folder.layout import Layout

        prepared_window(Layout(tmp_path), None)
        packs.open_packs(tmp_path / "latents").video_size()
        raise UserError(f"{tmp_path / 'latents'}: fine for this reader")


def test_check_data_names_what_is_wrong_with_the_only_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed(tmp_path, stem="../../x")
    assert main(["check", "data", str(tmp_path), "--threads", "1"]) == 1
    assert "rows.0.stem: must be a plain file name, without / and without . at its start, got '../../x'" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_video_whose_index_lists_key_frames_alone(tmp_path: Path) -> None:
    import av

    from fewstep.data.files import video

    with av.open(str(tmp_path / "x.mp4"), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    for reader in (video.probe, video.read, lambda path: list(video.stream(path))):  # none takes the key frames for all of them
        with pytest.raises(UserError, match=r"does not list its frames\. Convert it: ffmpeg -i x\.mp4"):
            reader(tmp_path / "x.mp4")
