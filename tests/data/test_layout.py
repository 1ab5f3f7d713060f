"""Names on disk: both forms are found, partners are matched by stem, and what is missing is told at once."""

from pathlib import Path

import pytest

from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout
from fewstep.errors import some
from fewstep.files import whole_file


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_flat_folders_of_cosmos(tmp_path: Path) -> None:
    touch(
        tmp_path, "videos/b.mp4", "videos/a.mp4", "videos/.c.mp4.partial", "videos/notes.txt", "metas/a.txt", "noise/a.pickle"
    )
    place = Layout.open(tmp_path)
    assert place.form == "flat"
    assert list(place.files(layout.VIDEOS)) == ["a", "b"]
    assert place.files(layout.NOISE) == {"a": tmp_path / "noise" / "a.pickle"}
    assert place.files(layout.PATH) == {}
    assert place.missing(layout.VIDEOS, ["a", "b"]) is None
    assert place.missing(layout.CAPTIONS, ["a", "b"]) == "1 of 2 lack metas/*.txt: b"
    assert place.file(layout.NOISE, "b") == tmp_path / "noise" / "b.pickle"
    assert place.file(layout.text("t5_xxl"), "b") == tmp_path / "t5_xxl" / "b.pickle"
    assert place.file(layout.control("seg", ".pickle"), "b") == tmp_path / "seg" / "b.pickle"


def test_a_folder_for_each_sample_as_fastgen_writes_it(tmp_path: Path) -> None:
    touch(tmp_path, "000001/latent.pth", "000000/latent.pth", "000000/path.pth", "000000/prompt.txt", "000000/video.mp4")
    place = Layout.open(tmp_path)
    assert place.form == "per_sample"
    assert list(place.files(layout.LATENTS)) == ["000000", "000001"]
    assert place.files(layout.CAPTIONS) == {"000000": tmp_path / "000000" / "prompt.txt"}
    assert place.missing(layout.PATH, ["000000", "000001"]) == "1 of 2 lack */path.safetensors: 000001"
    assert place.file(layout.PATH, "000001") == tmp_path / "000001" / "path.safetensors"


def test_all_that_is_missing_is_told_at_once_with_the_likely_reason(tmp_path: Path) -> None:
    stems = [f"clip_{n}" for n in range(9)]
    touch(
        tmp_path, *(f"videos/{stem}.mp4" for stem in stems), "noise/clip-0.pickle", "noise/clip-1.pickle", "noise/clip_8.pickle"
    )
    assert Layout.open(tmp_path).missing(layout.NOISE, stems) == (
        "8 of 9 lack noise/*.pickle: clip_0, clip_1, clip_2, clip_3, clip_4 and 3 more; "
        "it has files of other names: clip-0, clip-1"
    )
    assert some(["a", "b"]) == "a, b"


def test_two_files_for_one_sample_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "videos/a.mp4", "noise/a.pickle", "noise/a.safetensors")
    with pytest.raises(ValueError, match=r"two files for one sample \(.*a\.\w+, a\.\w+\) in noise: a\. Remove one"):
        Layout.open(tmp_path).files(layout.NOISE)


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none: no such folder\. Set data\.dataset_dir"):
        Layout.open(tmp_path / "none")
    touch(tmp_path, "pictures/a.png")
    with pytest.raises(ValueError, match=r"no data set\. It has neither videos/, images/ nor latents/.*it holds pictures"):
        Layout.open(tmp_path)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as beside:
        beside.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), whole_file(path) as beside:
        beside.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]
