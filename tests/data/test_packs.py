"""Packs: rows come back bit by bit, are made once however often the writer is stopped, and never mix two origins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.data.files.packs import MAKING, Label, has_packs, open_packs, open_writer

ORIGIN = {"codec": "a", "dtype": "float16"}
LABELS = [Label(f"clip_{n // 2}", f"hash_{n // 2}", 8 * (n % 2), {"fps": 16.0 + n}) for n in range(10)]


def tensor(number: int) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(number)).half()


def fill(folder: Path, labels: list[Label] = LABELS, stop_at: int | None = None, pack_bytes: int = 500) -> int:
    """Rows made; the writer dies at one of them, as a killed process would."""
    with open_writer(folder, ORIGIN, pack_bytes=pack_bytes) as writer:
        writer.keep_only(labels)
        for label in labels:

            def make(label: Label = label) -> Tensor:
                if stop_at is not None and writer.new == stop_at:
                    raise KeyboardInterrupt
                return tensor(LABELS.index(label))

            writer.put(label, make)
    return writer.new


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_come_back_in_order_with_what_they_were_made_from(tmp_path: Path) -> None:
    assert not has_packs(tmp_path)
    assert fill(tmp_path, LABELS[::-1]) == 10
    assert has_packs(tmp_path) and len(list((tmp_path / "packs").glob("*.safetensors"))) > 2
    packs = open_packs(tmp_path, {"codec": "a"})
    assert list(packs.rows) == LABELS and len(packs) == 10 and packs.made_from == ORIGIN
    for number in range(10):
        assert torch.equal(packs.read(number), tensor(number)) and packs.shapes[number] == (2, 3, 4)
    assert packs.by_stem()["clip_3"] == [6, 7]
    packs.read(0).zero_()  # a copy: nobody can change the file through it
    assert torch.equal(open_packs(tmp_path).read(0), tensor(0))


def test_stopped_anywhere_and_run_again_it_has_the_same_bytes_and_made_each_row_once(tmp_path: Path) -> None:
    fill(tmp_path / "whole")
    for stop in range(10):
        folder = tmp_path / f"stopped_{stop}"
        with pytest.raises(KeyboardInterrupt):
            fill(folder, stop_at=stop)
        (folder / "packs" / MAKING).mkdir(exist_ok=True)
        (folder / "packs" / MAKING / ".clip_4.8.safetensors.partial").write_bytes(b"half")
        assert fill(folder) == 10 - stop
        assert content(folder) == content(tmp_path / "whole")
        assert fill(folder) == 0


def test_a_row_that_waited_and_was_packed_before_the_kill_is_not_packed_twice(tmp_path: Path) -> None:
    fill(tmp_path, pack_bytes=10**9)
    before = content(tmp_path)
    waiting = tmp_path / "packs" / MAKING / "clip_0.0.safetensors"
    waiting.parent.mkdir()
    save_file({"data": tensor(0)}, waiting)
    assert fill(tmp_path, pack_bytes=10**9) == 0
    assert content(tmp_path) == before


def test_rows_of_other_lengths_and_equal_content_share_a_pack(tmp_path: Path) -> None:
    texts = [torch.full((n, 3), float(n)).half() for n in (4, 1, 2)]
    labels = [Label("a", "x"), Label("b", "y"), Label("c", "z"), Label("d", "x")]
    with open_writer(tmp_path, ORIGIN, lengths_differ=True) as writer:
        for label, made in zip(labels, [*texts, texts[0]], strict=True):
            writer.put(label, lambda made=made: made)
    packs = open_packs(tmp_path)
    assert [packs.read(n).tolist() for n in range(4)] == [t.tolist() for t in [*texts, texts[0]]]
    assert packs.shapes == ((4, 3), (1, 3), (2, 3), (4, 3))
    (file,) = (tmp_path / "packs").glob("*.safetensors")
    assert load_file(file)["data"].shape == (7, 3)  # the text of a and d once


def test_rows_of_different_shapes_lie_in_packs_of_their_own(tmp_path: Path) -> None:
    with open_writer(tmp_path, ORIGIN) as writer:
        for number in range(4):
            writer.put(Label(f"{number}", f"{number}"), lambda number=number: torch.full((1 + number % 2, 2), float(number)))
    packs = open_packs(tmp_path)
    assert [tuple(packs.read(n).shape) for n in range(4)] == [(1, 2), (2, 2), (1, 2), (2, 2)]
    assert [packs.read(n)[0, 0].item() for n in range(4)] == [0, 1, 2, 3]


def test_clips_that_changed_or_are_gone_are_dropped_and_the_others_kept(tmp_path: Path) -> None:
    fill(tmp_path)
    changed = [Label("clip_0", "new", 0), *LABELS[1:6], *LABELS[8:]]
    with open_writer(tmp_path, ORIGIN) as writer:
        assert writer.keep_only(changed) == 3
        for label in changed:
            writer.put(label, lambda: torch.ones(2, 3, 4).half())
        assert writer.new == 1
    packs = open_packs(tmp_path)
    assert list(packs.rows) == changed
    assert torch.equal(packs.read(0), torch.ones(2, 3, 4).half())
    assert all(torch.equal(packs.read(n), tensor(LABELS.index(label))) for n, label in enumerate(changed) if n)


def test_another_origin_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ValueError, match=r"made from something else: codec is 'a', not 'b'\. Ask for what it was made from"):
        open_packs(tmp_path, {"codec": "b"})
    with pytest.raises(ValueError, match="codec is 'a', not 'b', dtype is 'float16', not 'left out'"):
        open_writer(tmp_path, {"codec": "b"}).__enter__()
    file = tmp_path / "packs" / "00000.safetensors"
    for change in ({"made_from": {"codec": "c"}}, {}):
        told = json.loads(__import__("safetensors").safe_open(file, "pt").metadata()["pack"]) | change
        save_file(load_file(file), tmp_path / "packs" / "00009.safetensors", {"pack": json.dumps(told)})
        with pytest.raises(ValueError, match="made from something else" if change else "holds two rows of clip_0"):
            open_packs(tmp_path)


def test_two_processes_do_not_write_at_once(tmp_path: Path) -> None:
    with open_writer(tmp_path, ORIGIN), pytest.raises(ValueError, match="another process writes here"):
        open_writer(tmp_path, ORIGIN).__enter__()
    with open_writer(tmp_path, ORIGIN):
        pass


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    told = r"clip_0: 1 of 2 numbers are not finite in torch\.float16"
    with pytest.raises(ValueError, match=told), open_writer(tmp_path, ORIGIN) as writer:
        writer.put(LABELS[0], lambda: torch.tensor([70000.0, 1.0]).half())
    assert not has_packs(tmp_path)


def index(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        told = json.loads(__import__("safetensors").safe_open(file, "pt").metadata()["pack"])
        change(told)
        save_file({"data": load_file(file)["data"].clone()}, file, {"pack": json.dumps(told)})

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b"not a safetensors file"),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"data": torch.zeros(2, 2)}, file),
        lambda file: save_file({"other": torch.zeros(2, 2)}, file, {"pack": "{}"}),
        index(lambda told: told["spans"].pop()),
        index(lambda told: told["spans"][0].__setitem__(1, 99)),
        index(lambda told: told["spans"][0].__setitem__(0, -1)),
        index(lambda told: told["rows"][0].__setitem__("more", 1)),
        index(lambda told: told.__setitem__("rows", 3)),
    ],
)
def test_a_damaged_pack_is_named(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    fill(tmp_path)
    spoil(tmp_path / "packs" / "00000.safetensors")
    with pytest.raises(ValueError, match=r"00000\.safetensors: (damaged|cannot be opened)"):
        open_packs(tmp_path)
