"""Shards give the very batches of the folder they were written from, on any store, and are not read when they are not whole."""

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from fewstep import cli
from fewstep.batch import Batch
from fewstep.data.controls import Edge, Keypoint, Seg
from fewstep.data.files import cache, video
from fewstep.data.files.arrays import write_pickle
from fewstep.data.files.packs import Label, open_writer
from fewstep.data.folder.dataset import Folder
from fewstep.data.shards import Shards
from fewstep.prepare import shards
from fewstep.prepare.summary import Summary
from fewstep.toyworld.dataset import stem_of
from fewstep.toyworld.dataset import write as write_toyworld
from fewstep.toyworld.physics import World

NUM = 5
SHAPE = (4, 3, 8, 8)
BYTES = 40_000  # one sample or two


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "set"
    write_toyworld(out, NUM, 2, World(num_frames=9))
    generator = torch.Generator().manual_seed(0)
    for index in range(NUM):
        stem = stem_of(index)
        write_pickle(out / "t5_xxl" / f"{stem}.pickle", [np.full((index + 2, 6), index + 1, dtype=np.float16)])
        write_pickle(out / "noise" / f"{stem}.pickle", torch.randn(SHAPE, generator=generator).numpy())
        latents, facts = torch.randn(SHAPE, generator=generator).half(), {"num_frames": 9, "fps": 16.0}
        cache.write(out / "latents" / f"{stem}.safetensors", {"latents": latents}, facts=facts)
    write_pickle(out / "negative.pickle", [np.full((3, 6), -1, dtype=np.float16)])
    return out


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "set", copy_function=shutil.copy2))


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("packed") / "out")
    assert shards.write(source, out, shard_bytes=BYTES) == Summary(NUM, 3, shards=3)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for name, value in {**vars(batch), **vars(batch.cond), **batch.cond.control}.items():
        out |= {name: value} if isinstance(value, torch.Tensor) else {}
    if batch.negative is not None and batch.negative.text is not None:
        out["negative"] = batch.negative.text
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"num_frames": 5, "sequence_interval": 2, "video_size": (24, 40), "resize": "crop", "control": Seg()},
        {"pairs": ("noise",), "control": Edge(), "negative": "negative.pickle"},
        {"x0": "latents", "pairs": ("noise",), "negative": "zeros"},
        {"control": Keypoint(), "text": None},
        {"control": Edge("random"), "control_from": "video"},
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_batches_are_those_of_the_folder(source: Path, packed: str, tmp_path: Path, changes: Any, cached: bool) -> None:
    wanted = replace(Folder(str(source), max_tokens=4), **changes).open()
    spec = replace(Shards(packed, max_tokens=4, cache_dir=str(tmp_path) if cached else None, ram_gib=0.0), **changes)
    found = spec.open()
    assert len(found) == len(wanted) and found.stems == wanted.stems and found.captions() == wanted.captions()
    index = torch.tensor([len(wanted) - 1, 0, 2])
    for _ in range(2):
        one, other = tensors(found.batch(index)), tensors(wanted.batch(index))
        assert one.keys() == other.keys() and len(one) > 2
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert bool(list(tmp_path.rglob("*.*"))) == cached
    assert spec.fields == replace(Folder(""), **changes).fields


def test_any_store_of_fsspec_will_do(source: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in fs.find("/bucket"):
        fs.rm(path)
    assert shards.write(source, "memory://bucket/set", parts=["videos", "metas"], shard_bytes=10**6).new == 1
    assert shards.write(source, "memory://bucket/set", parts=["videos", "metas"], shard_bytes=10**6).new == 0
    data = Shards("memory://bucket/set", text=None).open()
    wanted = Folder(str(source), text=None).open()
    assert torch.equal(tensors(data.batch(torch.tensor([3])))["x0"], tensors(wanted.batch(torch.tensor([3])))["x0"])
    with pytest.raises(ValueError, match=r"5 of 5 lack t5_xxl: .*; shards have metas, videos"):
        Shards("memory://bucket/set").open()


def test_the_tars_are_webdataset(source: Path, packed: str) -> None:
    seen: dict[str, dict[str, bytes]] = {}
    order: list[str] = []
    for path in sorted(Path(packed).glob("*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                key, part = entry.name.split(".", 1)  # as WebDataset splits names
                order += [key] if key not in order[-1:] else []
                content_of = tar.extractfile(entry)
                assert content_of is not None
                seen.setdefault(key, {})[part] = content_of.read()
    assert order == [stem_of(n) for n in range(NUM)]  # the members of a sample lie together
    assert seen[stem_of(1)]["videos.mp4"] == (source / "videos" / f"{stem_of(1)}.mp4").read_bytes()
    assert seen[stem_of(4)]["t5_xxl.pickle"] == (source / "t5_xxl" / f"{stem_of(4)}.pickle").read_bytes()


def test_a_rerun_writes_what_changed_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert shards.write(folder, str(out), shard_bytes=BYTES).new == 3
    before = content(out)
    assert shards.write(folder, str(out), shard_bytes=BYTES).new == 0
    assert content(out) == before
    (folder / "metas" / f"{stem_of(4)}.txt").write_text("another caption")
    assert shards.write(folder, str(out), shard_bytes=BYTES).new == 1
    assert Shards(str(out), text=None).open().captions()[4] == "another caption"
    for path in [*folder.rglob(f"{stem_of(3)}.*"), *folder.rglob(f"{stem_of(4)}.*")]:
        path.unlink()
    assert shards.write(folder, str(out), shard_bytes=BYTES) == Summary(3, 0, shards=2)
    assert sorted(path.name for path in out.glob("0*")) == ["000000.json", "000000.tar", "000001.json", "000001.tar"]
    assert len(Shards(str(out), text=None).open()) == 3
    with pytest.raises(ValueError, match=r"holds shards with parts .*, not .*'videos'.*Choose another --out"):
        shards.write(folder, str(out), parts=["videos"], shard_bytes=BYTES)


@pytest.mark.parametrize("stop", range(5))
def test_stopped_anywhere_it_is_not_read_and_the_next_run_finishes_it(
    folder: Path, packed: str, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, put = tmp_path / "out", 0, shards._put

    def dies(fs: Any, path: str, content: bytes) -> None:
        nonlocal calls
        if calls == stop:
            raise KeyboardInterrupt
        calls += 1
        put(fs, path, content)

    monkeypatch.setattr(shards, "_put", dies)
    with pytest.raises(KeyboardInterrupt):
        shards.write(folder, str(out), shard_bytes=BYTES)
    with pytest.raises((ValueError, FileNotFoundError), match=r"is not whole|no such file\. Write it"):
        Shards(str(out), text=None).open()
    monkeypatch.undo()
    if stop == 0:  # nothing is ours yet
        assert not list(out.glob("*.tar"))
    told = shards.write(folder, str(out), shard_bytes=BYTES)
    assert told.new == 3 - max(min(stop - 1, 3), 0)
    tars = {name: data for name, data in content(out).items() if name.endswith(".tar")}
    assert tars == {name: data for name, data in content(Path(packed)).items() if name.endswith(".tar")}
    before = content(out)
    assert shards.write(folder, str(out), shard_bytes=BYTES).new == 0
    assert content(out) == before


def test_packs_are_written_row_by_row(folder: Path, tmp_path: Path) -> None:
    made = {stem_of(n): torch.full(SHAPE, float(n)).half() for n in range(NUM)}
    shutil.rmtree(folder / "latents")
    with open_writer(folder / "latents", {"codec": "a"}) as writer:
        for stem, latents in made.items():
            writer.put(Label(stem, stem, 0, {"fps": 8.0, "num_frames": 9}), lambda latents=latents: latents)
    shards.write(folder, str(tmp_path / "out"))
    batch = Shards(str(tmp_path / "out"), x0="latents", text=None).open().batch(torch.tensor([3, 1]))
    assert batch.x0 is not None and batch.cond.fps is not None
    assert torch.equal(batch.x0, torch.stack([made[stem_of(3)], made[stem_of(1)]]).float()) and batch.cond.fps.tolist() == [
        8,
        8,
    ]
    with open_writer(folder / "latents", {"codec": "a"}) as writer:
        writer.put(Label(stem_of(0), "x", 8), lambda: torch.zeros(SHAPE).half())
    with pytest.raises(ValueError, match="its packs hold windows of clips"):
        shards.write(folder, str(tmp_path / "out"))


def test_what_cannot_be_written_is_told_before(folder: Path, tmp_path: Path) -> None:
    (folder / "edge" / f"{stem_of(2)}.mp4").unlink()
    shutil.copy(folder / "videos" / f"{stem_of(0)}.mp4", folder / "videos" / "a.b.mp4")
    with pytest.raises(ValueError) as told:
        shards.write(folder, str(tmp_path / "out"))
    for words in (f"2 of 6 lack edge: a.b, {stem_of(2)}", "1 names have a dot", "--parts"):
        assert words in str(told.value)
    with pytest.raises(ValueError, match="has no edges, vids; it holds depth, edge"):
        shards.write(folder, str(tmp_path / "out"), parts=["vids", "edges"])
    with pytest.raises(ValueError, match="no store that fsspec reaches here"):
        shards.write(folder, "nowhere://x")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "000000.tar").write_bytes(b"")
    (folder / "videos" / "a.b.mp4").unlink()
    with pytest.raises(ValueError, match="holds tars that this command did not write"):
        shards.write(folder, str(tmp_path / "theirs"), parts=["videos"])


def test_an_index_that_names_files_elsewhere_removes_none(folder: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "a" / "out", tmp_path / "victim.json"
    shards.write(folder, str(out))
    victim.write_text("{}")
    change(lambda told: told["shards"].append("../../victim"), "index.json")(out)
    with pytest.raises(ValueError, match="holds tars that this command did not write"):
        shards.write(folder, str(out))
    assert victim.read_text() == "{}"


def test_names_with_spaces_of_other_kinds_and_none_that_command_a_terminal(folder: Path, tmp_path: Path) -> None:
    name = "a\u00a0b\u200bc"
    for part in folder.iterdir():
        for file in part.glob(f"{stem_of(0)}.*"):
            file.rename(file.with_name(name + file.suffix))
    shards.write(folder, str(tmp_path / "out"))
    assert name in Shards(str(tmp_path / "out"), text=None).open().stems
    next((folder / "videos").glob("a*")).rename(folder / "videos" / "a\x1b[31mb.mp4")
    with pytest.raises(ValueError, match=r"1 names cannot be those of files in a shard: 'a\\x1b\[31mb'"):
        shards.write(folder, str(tmp_path / "other"), parts=["videos"])


def change(edit: Callable[[Any], object], name: str = "000000.json") -> Callable[[Path], None]:
    def spoil(out: Path) -> None:
        told = json.loads((out / name).read_text())
        edit(told)
        (out / name).write_text(json.dumps(told))

    return spoil


def first(told: Any) -> Any:
    return told["samples"][0]["members"]["videos"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: (out / "000001.tar").write_bytes(b"x" * 200_000), "is not what the index says"),
        (lambda out: (out / "000001.tar").write_bytes(b""), "is not what the index says"),
        (lambda out: (out / "000001.tar").unlink(), "no such file, but the index has it"),
        (lambda out: (out / "000001.json").unlink(), "no such file. Write it again"),
        (lambda out: (out / "index.json").write_text("{"), "damaged"),
        (change(lambda told: told.pop("parts"), "index.json"), "damaged"),
        (change(lambda told: told["shards"].append("../x"), "index.json"), "must be a plain file name"),
        (change(lambda told: told["shards"].pop(), "index.json"), "says 5 samples, its shards hold 3"),
        (change(lambda told: told.__setitem__("format", 9), "index.json"), "format 9"),
        (change(lambda told: told["samples"][0].__setitem__("stem", "../../etc/x")), "must be a plain file name"),
        (change(lambda told: first(told).__setitem__("suffix", "/../x")), "damaged"),
        (change(lambda told: first(told).__setitem__("offset", -5)), "damaged"),
        (change(lambda told: first(told).__setitem__("size", "many")), "damaged"),
        (
            change(lambda told: first(told).__setitem__("header", [2**22, 16.0, 32, 32])),
            "says, 4,194,[0-9]+ frames in",
        ),
        (change(lambda told: told["samples"].append(told["samples"][0])), "two samples called"),
        (change(lambda told: first(told).__setitem__("header", [7, 16.0, 32, 32])), "differ from the others in num_frames"),
    ],
)
def test_damage_is_named(packed: str, tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    spoil(out)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        data = Shards(str(out), text=None).open()
        for number in range(len(data)):
            data.batch(torch.tensor([number]))


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "shards", str(folder), "--out", str(tmp_path / "out"), "--parts", "videos,metas"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 5 samples in 1 shards, 1 of them new\n"
    assert cli.main([*words, "--shard-mib", "0"]) == 2
    assert "'--shard-mib': 0: the value should be greater than or equal to 1" in capsys.readouterr().err
    video.probe(folder / "videos" / f"{stem_of(0)}.mp4")
