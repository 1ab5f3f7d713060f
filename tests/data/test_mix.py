"""Several sources by weight, and clips of several sizes: what comes next follows from the position alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.config import ConfigError, check, choices, parse
from fewstep.data.controls import Depth, Edge, Vis
from fewstep.data.files import video
from fewstep.data.files.sizes import BUCKETS_720, fit, nearest_shape
from fewstep.data.folder.dataset import Folder
from fewstep.data.mix import Mix, Source, by_control
from fewstep.data.order import interleaved, shares


def pictures(seed: int, num: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def clips(root: Path, num: int, size: tuple[int, int] = (16, 24), frames: int = 3, first: int = 0) -> Path:
    for index in range(first, first + num):
        video.write(root / "videos" / f"c{index:03d}.mp4", pictures(index, frames, *size), 8, "lossless")
    return root


# ---- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "block"), [((3, 1), 1), ((2, 5, 1), 4), ((1, 1), 7), ((750, 250), 1)])
def test_sources_interleave_without_gap_or_repeat(blocks: tuple[int, ...], block: int) -> None:
    total = 3 * sum(blocks) * block
    source, place = interleaved(torch.arange(total), blocks, block, seed=1)
    for number, share in enumerate(blocks):
        assert torch.equal(place[source == number], torch.arange(3 * share * block))  # in order, from 0, none left out
    for start in range(0, total, block):
        assert len(source[start : start + block].unique()) == 1
    some = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:50]
    again = interleaved(some, blocks, block, seed=1)
    assert torch.equal(again[0], source[some]) and torch.equal(again[1], place[some])
    assert not torch.equal(interleaved(torch.arange(total), blocks, block, seed=2)[0], source) or min(blocks) == max(blocks)


def test_shares_are_whole_and_right() -> None:
    assert shares((3.0, 1.0), 1000) == (750, 250)
    assert shares((1.0, 1.0, 1.0), 1000) == (334, 333, 333)
    assert shares((1e-9, 1.0), 1000)[0] == 1
    assert sum(shares((0.2, 0.5, 0.31), 1000)) == 1000


def test_a_mix_draws_by_weight_and_each_source_keeps_its_epochs(tmp_path: Path) -> None:
    one, two = clips(tmp_path / "one", 5), clips(tmp_path / "two", 3, first=100)
    spec = Mix((Source(Folder(str(one), text=None), 3.0), Source(Folder(str(two), text=None), 1.0)))
    assert check(spec) == [] and choices("data")["mix"] is Mix and spec.fields == {"x0"}
    data = spec.open()
    assert len(data) == 8
    order = data.samples_at(torch.arange(4000), seed=0)
    first = order[order < 5]
    assert len(first) == 3000
    for epoch in range(len(first) // 5):
        assert sorted(first[epoch * 5 : (epoch + 1) * 5].tolist()) == [0, 1, 2, 3, 4]
    index = torch.tensor([6, 0, 7, 4, 0])
    batch = data.batch(index)
    alone = [Folder(str(root), text=None).open() for root in (one, two)]
    assert batch.index is not None and torch.equal(batch.index, index) and batch.x0 is not None
    for row, number in enumerate(index.tolist()):
        wanted = alone[number >= 5].batch(torch.tensor([number % 5])).x0
        assert wanted is not None and torch.equal(batch.x0[row], wanted[0])


def test_sources_of_different_shape_take_turns(tmp_path: Path) -> None:
    one, two = clips(tmp_path / "one", 5), clips(tmp_path / "two", 3, size=(24, 16))
    sources = (Source(Folder(str(one), text=None)), Source(Folder(str(two), text=None)))
    with pytest.raises(ValueError, match=r"sources differ in the shape of x0 .*Set data\.block"):
        Mix(sources).open().batch(torch.tensor([0, 6]))
    data = Mix(sources, block=4).open()
    order = data.samples_at(torch.arange(400), seed=0).reshape(-1, 4)
    sizes = {tuple(data.batch(row).x0.shape[-2:]) for row in order}  # type: ignore[union-attr]
    assert sizes == {(16, 24), (24, 16)}


def test_every_batch_has_one_control_and_all_come_equally_often(tmp_path: Path) -> None:
    place = clips(tmp_path, 4)
    for name in ("edge", "depth"):
        for file in (place / "videos").glob("*.mp4"):
            video.write(place / name / file.name, pictures(int(file.stem[1:]) + (50 if name == "edge" else 90), 3, 16, 24), 8)
    spec = by_control(Folder(str(place), text=None), (Edge(), Depth()), block=6)
    data = spec.open()
    order = data.samples_at(torch.arange(6000), seed=0)  # type: ignore[attr-defined]
    for batch in order[:60].split(3):  # samples 0 .. 3 have edges, 4 .. 7 depth
        assert list(data.batch(batch).cond.control) == (["edge"] if batch[0] < 4 else ["depth"])
    assert int((order < 4).sum()) == 3000
    pairs = by_control(Folder("pairs", x0="latents", pairs=("noise",)), (Edge(), Vis()), 4)
    assert isinstance(pairs, Mix) and [getattr(s.data, "dataset_dir", "") for s in pairs.sources] == ["pairs/edge", "pairs/vis"]
    assert by_control(Folder("pairs", pairs=("noise",)), (Edge(),), 4) == Folder("pairs", pairs=("noise",), control=Edge())


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    good = Folder(str(clips(tmp_path / "a", 1)), text=None)
    for spec, words in (
        (Mix(), "sources: is empty"),
        (Mix((Source(good, 0.0),)), "weight: must be above 0"),
        (Mix((Source(good), Source(Folder("x", pairs=("noise",))))), "do not both have noise"),
    ):
        with pytest.raises((ConfigError, ValueError), match=words):
            check(spec)


def test_a_mix_is_written_in_a_configuration(tmp_path: Path) -> None:
    written = {
        "sources": [
            {"data": {"kind": "folder", "dataset_dir": "a", "text": None}, "weight": 3},
            {"data": {"kind": "folder", "dataset_dir": "b", "num_frames": 17}},
        ]
    }
    assert parse(Mix, written) == Mix((Source(Folder("a", text=None), 3.0), Source(Folder("b", num_frames=17))))


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_transfer1s_buckets() -> None:
    for source, wanted in (
        ((720, 1280), (704, 1280)), ((1080, 1920), (704, 1280)), ((480, 640), (704, 960)), ((512, 512), (960, 960)),
        ((640, 480), (960, 704)), ((1920, 1080), (1280, 704)), ((300, 2000), (704, 1280)),
    ):  # fmt: skip
        assert BUCKETS_720[nearest_shape(source, BUCKETS_720)] == wanted


def test_padding_keeps_the_whole_picture_and_mirrors_it() -> None:
    fitted = fit((20, 40), (30, 40), "pad")
    assert fitted.scaled == (20, 40)
    frames = pictures(0, 2, 20, 40)
    made = fitted(frames)
    assert np.array_equal(made[:, 5:25], frames)
    assert np.array_equal(made[:, 4], frames[:, 1]) and np.array_equal(made[:, 25], frames[:, 18])  # numpy's "reflect"
    mask = fitted.padding()
    assert mask[:5].all() and mask[25:].all() and not mask[5:25].any()
    wide = fit((10, 40), (90, 40), "pad")  # more margin than picture: its edge goes on
    assert np.array_equal(wide(pictures(1, 1, 10, 40))[:, 0], pictures(1, 1, 10, 40)[:, 0])
    assert fit((100, 200), (704, 1280), "pad").scaled == (640, 1280)
    assert fit((100, 200), (704, 1280), "crop").scaled == (704, 1408)
    assert fit((100, 200), (704, 1280), "stretch").scaled == (704, 1280)
    assert not fit((100, 200), (704, 1280), "crop").padding().any()


def test_clips_of_many_sizes_come_in_buckets(tmp_path: Path) -> None:
    """Every batch is of one bucket, the whole picture is in it, its control beside it, and each clip comes once per epoch."""
    root = tmp_path / "set"
    for number, size in enumerate([(16, 24), (18, 26), (24, 16), (16, 28), (32, 20), (16, 24), (20, 20)]):
        clips(root, 1, size, first=number)
    spec = Folder(
        str(root), text=None, buckets=((16, 32), (32, 16)), bucket_block=2, resize="pad", control=Edge(), control_from="video"
    )
    data = spec.open()
    order = data.samples_at(torch.arange(800), seed=0)
    for pair in order[:40].reshape(-1, 2):
        batch = data.batch(pair)
        assert batch.x0 is not None and batch.cond.padding is not None
        assert batch.x0.shape[-2:] == batch.cond.padding.shape[-2:] == batch.cond.control["edge"].shape[-2:]
        assert tuple(batch.x0.shape[-2:]) in spec.buckets
    wide = {0, 1, 3, 5, 6}  # of two shapes equally near, the first
    for group in (wide, {2, 4}):
        mine = torch.tensor([n for n in order.tolist() if n in group])
        for epoch in range(len(mine) // len(group)):
            assert Counter(mine[epoch * len(group) : (epoch + 1) * len(group)].tolist()) == Counter(group)
    counts = Counter(order.tolist())
    assert max(counts.values()) <= 1.5 * min(counts.values())
    with pytest.raises(ValueError, match=r"2 buckets cannot be in one batch\. Set data\.bucket_block"):
        data.batch(torch.tensor([0, 2]))
    # a clip that is in the shape of its bucket already is as it was, and the mask says so
    exact = Folder(str(clips(tmp_path / "b", 1, (16, 32))), text=None, buckets=((16, 32), (32, 16)), resize="pad").open()
    batch = exact.batch(torch.tensor([0]))
    assert batch.x0 is not None and batch.cond.padding is not None and not batch.cond.padding.any()
    back = ((batch.x0[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(back, pictures(0, 3, 16, 32))


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    (tmp_path / "edge").mkdir()
    for number in range(3):
        Image.fromarray(pictures(number, 1, 16, 24)[0]).save(tmp_path / "images" / f"p{number}.png")
        Image.fromarray(pictures(9 - number, 1, 16, 24)[0]).save(tmp_path / "edge" / f"p{number}.png")
    data = Folder(str(tmp_path), text=None, control=Edge()).open()
    batch = data.batch(torch.tensor([2, 0]))
    assert batch.x0 is not None and batch.x0.shape == (2, 3, 1, 16, 24) and batch.cond.fps is None
    back = ((batch.x0[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(back, pictures(2, 1, 16, 24))
    shown = ((batch.cond.control["edge"][0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(shown, pictures(7, 1, 16, 24))
    with pytest.raises(ValueError, match="shorter than a window of 5 frames"):
        Folder(str(tmp_path), text=None, num_frames=5).open()
    (tmp_path / "images" / "p1.png").write_bytes((tmp_path / "images" / "p1.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"p1\.png: cannot be opened"):
        Folder(str(tmp_path), text=None).open().batch(torch.tensor([1]))


def test_videos_and_pictures_in_one_folder_are_refused(tmp_path: Path) -> None:
    clips(tmp_path, 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="data=mix"):
        Folder(str(tmp_path), text=None).open()


def test_bad_clips_are_left_out_up_to_a_limit(tmp_path: Path) -> None:
    root = clips(tmp_path, 6)
    whole = (root / "videos/c001.mp4").read_bytes()
    (root / "videos/c001.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"c001\.mp4"):
        Folder(str(root), text=None).open()
    data = Folder(str(root), text=None, max_bad=2).open()
    assert len(data) == 5 and list(data.left_out) == ["c001"] and "cut off" in data.left_out["c001"]
