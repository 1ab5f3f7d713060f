"""Every documented mistake has its name: `fewstep check data` tells it, and no batch is ever made of it.

One table; each row spoils a good data set of pairs in one way, and says what the check and what training must say.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.data.check.survey import survey
from fewstep.data.controls import Edge, Keypoint, Seg
from fewstep.data.files import cache, masks, video
from fewstep.data.files.arrays import write_pickle
from fewstep.data.folder.dataset import Folder
from fewstep.toyworld.dataset import write
from fewstep.toyworld.physics import World

WORLD = World(num_frames=9)
SHAPE = (4, 3, 8, 8)  # latents C T H W of 9 frames of 32 x 32
FIRST, LAST = "clip_000000", "clip_000002"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good") / "set"
    write(out, 3, 5, WORLD)
    generator = np.random.default_rng(0)
    for path in sorted((out / "videos").iterdir()):
        write_pickle(out / "t5_xxl" / f"{path.stem}.pickle", [generator.normal(size=(7, 6)).astype(np.float16)])
        write_pickle(out / "noise" / f"{path.stem}.pickle", generator.normal(size=SHAPE).astype(np.float32))
    return out


@pytest.fixture
def toy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "set"))


def remove(name: str) -> Spoil:
    return lambda root: (root / name).unlink()


def array(name: str, value: Any) -> Spoil:
    return lambda root: write_pickle(root / name, value)


def put(name: str, content: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(content)


def cut(name: str, share: float) -> Spoil:
    def spoil(root: Path) -> None:
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: int(share * len(whole))])

    return spoil


def recut(name: str, change: Callable[[np.ndarray], np.ndarray], fps: float = 16) -> Spoil:
    return lambda root: video.write(root / name, change(video.read(root / name).frames), fps, "lossless")


def sound_only(root: Path) -> None:
    import av

    with av.open(str(root / f"videos/{LAST}.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def dropped_frames(root: Path) -> None:
    """A variable rate: as a phone writes."""
    from fractions import Fraction

    import av

    frames = video.read(root / f"videos/{LAST}.mp4").frames
    with av.open(str(root / f"videos/{LAST}.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        for place, pixels in zip((0, 1, 2, 5, 6, 11, 12, 13, 14), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = place, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def renamed(root: Path) -> None:
    """A WebM with the suffix of mp4: its index has the key frames, the first one here."""
    import av

    frames = video.read(root / f"videos/{LAST}.mp4").frames
    with av.open(str(root / f"videos/{LAST}.mp4"), "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def turned(root: Path) -> None:
    """A phone held upright writes its pictures on their side, and a mark that turns them."""
    import av

    frames = video.read(root / f"videos/{LAST}.mp4").frames
    with av.open(str(root / f"videos/{LAST}.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.set_display_rotation(-90)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def masks_of_the_prose(root: Path) -> None:
    """The layout that the documentation beside the format describes: bytes for data, (H, W) for the shape."""
    row = {"phrase": "cup", "segmentation_mask_rle": {"data": b"0100", "mask_shape": (32, 32)}}
    write_pickle(root / f"seg/{LAST}.pickle", [row])


def one_frame_without_entry(root: Path) -> None:
    body = np.zeros((133, 3), dtype=np.float16)
    write_pickle(
        root / f"keypoint/{LAST}.pickle",
        {n: [{"body-keypoints": body, "hand-keypoints": body[91:]}] for n in range(9) if n != 4},
    )


class Hostile:
    def __init__(self, root: Path):
        self.root = root

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"mkdir '{self.root}/hacked'",)


def hostile(root: Path) -> None:
    (root / f"noise/{LAST}.pickle").write_bytes(pickle.dumps([Hostile(root)]))


NOISE, TEXT, KEY = {"pairs": ("noise",)}, {"text": "t5_xxl"}, {"control": Keypoint()}
EDGE, SEG = {"control": Edge()}, {"control": Seg()}
RANDOM = np.random.default_rng(1)
HUGE = (  # a header of numpy that claims 10^18 numbers
    b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x0c_reconstruct\x93\x8c\x05numpy\x8c\x07ndarray\x93K\x00\x85C\x01b\x87R"
    b"(K\x01\x8a\x08\x00\x00d\xa7\xb3\xb6\xe0\x0d\x85\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f4\x89\x88\x87R(K\x03\x8c\x01<NNNJ"
    b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x04\x00\x00\x00\x00tb."
)

# name; settings under which training meets it; how to make it; kind and words of the check; words of training
MISTAKES: list[tuple[str, dict[str, Any], Spoil, str, str, str]] = [
    ("noise missing", NOISE, remove(f"noise/{LAST}.pickle"), "missing-noise", "1 of 3 lack noise/: clip_000002",
     r"1 of 3 lack noise/\*\.pickle: clip_000002"),
    ("embedding missing", TEXT, remove(f"t5_xxl/{LAST}.pickle"), "missing-t5_xxl", "1 of 3 lack t5_xxl/",
     "1 of 3 lack t5_xxl/"),
    ("control missing", EDGE, remove(f"edge/{LAST}.mp4"), "missing-edge", "1 of 3 lack edge/", "1 of 3 lack edge/"),
    ("caption missing", TEXT, remove(f"metas/{LAST}.txt"), "missing-metas", "1 of 3 lack metas/", "1 of 3 lack metas/"),
    ("8 of 9 frames in a pair", NOISE, recut(f"videos/{LAST}.mp4", lambda f: f[:8]), "pair-length",
     r"do not have 9 frames: clip_000002 \(8\)", "A pair is a whole clip"),
    ("noise of another clip", NOISE, array(f"noise/{LAST}.pickle", RANDOM.normal(size=(4, 3, 8, 6))), "unreadable-noise",
     "is noise of shape .* which no clip of 9 frames", "is noise of shape"),
    ("noise with too few frames", NOISE, array(f"noise/{LAST}.pickle", RANDOM.normal(size=(4, 4, 8, 8))), "unreadable-noise",
     "T - 1 must divide 8", "T - 1 must divide 8"),
    ("noise times 80", NOISE, array(f"noise/{LAST}.pickle", 80 * RANDOM.normal(size=SHAPE)), "unreadable-noise",
     "stored with variance 1", "stored with variance 1.*divide by it"),
    ("noise not finite", NOISE, array(f"noise/{LAST}.pickle", np.full(SHAPE, np.inf)), "unreadable-noise", "not finite",
     "not finite"),
    ("noise of integers", NOISE, array(f"noise/{LAST}.pickle", np.ones(SHAPE, int)), "unreadable-noise", "not floating-point",
     "not floating-point"),
    ("two noises", NOISE, array(f"noise/{LAST}.pickle", [np.zeros(SHAPE)] * 2), "unreadable-noise", "holds 2 arrays",
     "holds 2 arrays"),
    ("hostile pickle", NOISE, hostile, "unreadable-noise", r"(posix|os|nt)\.system", r"(posix|os|nt)\.system"),
    ("pickle that claims a terabyte", NOISE, put(f"noise/{LAST}.pickle", HUGE), "unreadable-noise", "refused|damaged",
     "refused|damaged"),
    ("truncated pickle", NOISE, cut(f"noise/{LAST}.pickle", 0.6), "unreadable-noise", "damaged", "damaged"),
    ("truncated mp4", {}, cut(f"videos/{LAST}.mp4", 0.5), "unreadable-videos",
     r"clip_000002\.mp4: not a readable video .*cut off", "cut off"),
    ("empty mp4", {}, put(f"videos/{LAST}.mp4", b""), "unreadable-videos", "not a readable video", "not a readable video"),
    ("sound only", {}, sound_only, "unreadable-videos", "has no video, only audio", "has no video, only audio"),
    ("variable frame rate", {}, dropped_frames, "unreadable-videos", "no fixed frame rate.*ffmpeg -i", "no fixed frame rate"),
    ("WebM renamed to mp4", {}, renamed, "unreadable-videos", "is a Matroska or WebM file.*ffmpeg -i", "is a Matroska or WebM"),
    ("turned by a mark", {}, turned, "unreadable-videos", "turns them by 90 degrees.*ffmpeg -i", "turns them by 90 degrees"),
    ("empty caption", TEXT, put(f"metas/{LAST}.txt", b" \n"), "empty-captions", "1 captions are empty: clip_000002",
     "1 of 3 captions are empty"),
    ("caption not UTF-8", TEXT, put(f"metas/{LAST}.txt", b"\xff\xfeabc"), "unreadable-metas", "not UTF-8", "not UTF-8"),
    ("masks as the prose has them", SEG, masks_of_the_prose, "unreadable-seg", r"mask_shape.2.*\(frames, height",
     r"mask_shape.2"),
    ("masks of too few frames", SEG,
     lambda root: masks.write(root / f"seg/{LAST}.pickle", [("cup", np.zeros((8, 32, 32), bool))]), "unlike-seg",
     "frames 8, its clip 9", "have 8 frames, but frame 8 is wanted"),
    ("masks whose runs do not add up", SEG, array(f"seg/{LAST}.pickle", [{"phrase": "cup", "segmentation_mask_rle": {
        "data": {"size": [9 * 32 * 32, 1], "counts": b"11"}, "mask_shape": (9, 32, 32)}}]), "unreadable-seg",
     "runs do not add up", "runs do not add up"),
    ("keypoint frame missing", KEY, one_frame_without_entry, "unreadable-keypoint", "1 of 9 frames have no entry .frame 4",
     "1 of 9 frames have no entry"),
    ("keypoints of the wrong number", KEY, array(f"keypoint/{LAST}.pickle", {n: [{"body-keypoints": np.zeros((17, 3))}]
     for n in range(9)}), "unreadable-keypoint", r"must be an array \(133 or 91, 3\)", r"must be an array \(133 or 91, 3\)"),
    ("control of another length", EDGE, recut(f"edge/{LAST}.mp4", lambda f: f[:8]), "unlike-edge", "frames 8, its clip 9",
     "differ from their clip in frames"),
    ("control of another size", EDGE, recut(f"edge/{LAST}.mp4", lambda f: f[:, :16]), "unlike-edge", "its clip .32, 32.",
     "differ from their clip in size"),
    ("control at another rate", EDGE, recut(f"edge/{LAST}.mp4", lambda f: f, 24), "unlike-edge", "fps 24.0, its clip 16.0",
     "differ from their clip in fps"),
    ("truncated control", EDGE, cut(f"edge/{LAST}.mp4", 0.7), "unreadable-edge", "cut off", "not a readable video|cut off"),
    ("embedding without tokens", TEXT, array(f"t5_xxl/{LAST}.pickle", np.zeros((0, 6))), "unreadable-t5_xxl", "has no tokens",
     "has no tokens"),
    ("embedding of another encoder", TEXT, array(f"t5_xxl/{LAST}.pickle", np.zeros((7, 5))), "shape-t5_xxl",
     r"1 of 3 in t5_xxl/ are not of shape \(6,\)", r"'text' of clip_000002 has shape"),
    ("embedding of one axis", TEXT, array(f"t5_xxl/{LAST}.pickle", np.zeros(6)), "unreadable-t5_xxl",
     "where .tokens, D. is wanted", "where .tokens, D. is wanted"),
    ("two files for one sample", NOISE, lambda root: np.save(root / f"noise/{LAST}.npy", np.zeros(SHAPE)), "ambiguous-noise",
     "two files for one sample", "two files for one sample"),
    ("states whose times rise", {"pairs": ("path",)}, lambda root: [cache.write(root / f"path/{path.stem}.safetensors",
     {"path": torch.randn(2, *SHAPE), "path_times": torch.tensor([0.1, 0.9])}) for path in (root / "videos").iterdir()],
     "unreadable-path", "as many times, descending", "as many times, descending"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "spoil", "kind", "check_says", "training_says"), [m[1:] for m in MISTAKES],
                         ids=[m[0] for m in MISTAKES])  # fmt: skip
def test_every_mistake_has_its_name(
    toy: Path, settings: dict[str, Any], spoil: Spoil, kind: str, check_says: str, training_says: str
) -> None:
    import re

    spoil(toy)
    found = survey(toy, num_threads=1)
    assert not found.is_trainable
    wrong = [problem for problem in found.problems if problem.level == "error"]
    told = [problem for problem in wrong if problem.kind == kind and re.search(check_says, problem.message)]
    assert told, "\n".join(map(str, found.problems))
    assert any(LAST in problem.stems or LAST in problem.message for problem in told)
    with pytest.raises(ValueError, match=training_says):
        data = replace(Folder(str(toy), text=None), **settings).open()
        data.batch(torch.arange(len(data)))
    assert not (toy / "hacked").exists()


def test_there_are_twenty_kinds() -> None:
    assert len({name for name, *_ in MISTAKES}) == len(MISTAKES) >= 30


def test_what_is_good_passes(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = survey(source)
    assert found.is_trainable and [problem for problem in found.problems if problem.level == "error"] == []
    table = dict(found.rows())
    assert table["samples"] == "3" and table["size (height x width)"] == "32 x 32" and table["fps"] == "16"
    assert table["frames"] == "9" and table["shape of noise"] == "4x3x8x8" and table["tokens in t5_xxl"] == "7"
    assert main(["check", "data", str(source), "--json", "num_frames=9", "data.pairs=[noise]"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trainable"] and told["table"]["samples with these settings"] == "3"
    assert [sample["stem"] for sample in told["samples"]] == [f"clip_00000{n}" for n in range(3)]
    assert main(["check", "data", str(source), "--json", "num_frames=12"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["trainable"] and "shorter than a window of 12 frames" in told["problems"][0]["message"]


def test_what_somebody_should_know_is_a_warning(toy: Path) -> None:
    shutil.rmtree(toy / "noise")
    frames = video.read(toy / f"videos/{FIRST}.mp4").frames
    for folder, suffix in (("metas", "txt"), ("t5_xxl", "pickle"), ("seg", "pickle"), ("keypoint", "pickle"), ("depth", "mp4")):
        for name in ("copied", "encoded_again", "still"):
            shutil.copy(toy / folder / f"{FIRST}.{suffix}", toy / folder / f"{name}.{suffix}")
    for name in ("copied", "encoded_again", "still"):
        shutil.copy(toy / f"edge/{FIRST}.mp4", toy / f"edge/{name}.mp4")
        shutil.copy(toy / f"vis/{FIRST}.mp4", toy / f"vis/{name}.mp4")
    shutil.copy(toy / f"videos/{FIRST}.mp4", toy / "videos/copied.mp4")
    video.write(toy / "videos/still.mp4", np.repeat(frames[:1], 9, axis=0), 16, "lossless")
    big = frames.repeat(4, 1).repeat(4, 2)
    video.write(toy / "videos/encoded_again.mp4", big, 16, quality=10)
    (toy / "metas" / "copied.txt").write_text("cup")
    (toy / "metas" / "nobody.txt").write_text("no clip has this name")
    for name in ("edge", "vis", "depth"):  # of the larger clip, so that they go with it
        shown = video.read(toy / f"{name}/{FIRST}.mp4").frames.repeat(4, 1).repeat(4, 2)
        video.write(toy / f"{name}/encoded_again.mp4", shown, 16, "lossless")
    found = survey(toy)
    assert found.is_trainable, "\n".join(map(str, found.problems))
    told = {problem.kind: problem for problem in found.problems}
    assert set(told["duplicates"].stems) == {"copied", "encoded_again"}
    assert told["still"].stems == ("still",)
    assert told["short-captions"].stems == ("copied",)
    assert told["without-clip-metas"].stems == ("nobody",)
    assert "128 x 128 (1)" in told["varied-size"].message


def test_folders_of_fastgen(tmp_path: Path) -> None:
    for index in range(3):
        home = tmp_path / f"{index:06d}"
        home.mkdir()
        torch.save(torch.randn(SHAPE), home / "latent.pth")
        torch.save(torch.randn(4, *SHAPE), home / "path.pth")
        (home / "prompt.txt").write_text(f"a prompt, number {index}")
    found = survey(tmp_path)
    assert found.form == "per_sample" and found.is_trainable, found.problems
    assert dict(found.rows())["shape of path"] == "4x4x3x8x8"
    torch.save(torch.randn(4, 4, 3, 8, 6), tmp_path / "000001" / "path.pth")
    (tmp_path / "000002" / "latent.pth").unlink()
    (tmp_path / "000000" / "latent.pth").write_bytes(b"PK\x03\x04 no more")
    found = survey(tmp_path)
    told = "\n".join(map(str, found.problems))
    assert not found.is_trainable
    assert "but its clip's latents are (4, 3, 8, 8)" in told and "not tensors that can be read without running code" in told


def test_the_sheet_stands_alone_and_escapes(toy: Path, tmp_path: Path) -> None:
    import re

    (toy / f"metas/{FIRST}.txt").write_text("<script>alert(1)</script> a ball rolls")
    cut(f"videos/{LAST}.mp4", 0.5)(toy)
    page = tmp_path / "sheet.html"
    assert main(["check", "data", str(toy), "--html", str(page)]) == 1
    text = page.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    # two good clips: the frames, and edge, vis, depth, seg and keypoint over them, three pictures each
    assert text.count("<img") == 2 * 6 * 3
    assert text.index(LAST) < text.index(">clip_000001<") and "CANNOT be trained on" in text


def test_what_is_laid_over_a_frame_is_its_own_control(source: Path) -> None:
    from fewstep.data.check.sheet import _pictures
    from fewstep.data.folder.layout import Layout

    place, sample = Layout.open(source), survey(source).samples[0]
    made = _pictures(place, sample)
    for row, spot in enumerate((0, 4, 8)):
        size = made["clip"].shape[1:3]
        frame = video.read(source / f"videos/{FIRST}.mp4", spot, 1, size=size).frames[0].astype(float)
        edge = video.read(source / f"edge/{FIRST}.mp4", spot, 1, size=size).frames[0]
        assert np.abs(made["edge"][row] - np.clip(frame * 0.45 + edge * 0.65, 0, 255)).max() <= 1


def test_an_empty_folder_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "data", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    (tmp_path / "videos").mkdir()
    assert not survey(tmp_path).is_trainable


def test_captions_that_do_not_tell_clips_apart_and_files_that_nobody_reads(tmp_path: Path) -> None:
    frames = np.zeros((3, 8, 8, 3), np.uint8)
    (tmp_path / "metas").mkdir()
    for n in range(6):
        video.write(tmp_path / "videos" / f"{n}.mp4", frames + 40 * n, 8.0)
        (tmp_path / "metas" / f"{n}.txt").write_text(f"a red box {'falls' if n % 3 else 'rolls'} down")
    for name in ("7.MP4", "8.mov"):
        (tmp_path / "videos" / name).write_bytes(b"a film")
    problems = {problem.kind: problem.message for problem in survey(tmp_path).problems}
    assert "6 clips have 2 different captions; 4 have 'a red box falls down'" in problems["same-captions"]
    assert "2 files in videos/ are not read, for their suffix: 7.MP4, 8.mov" in problems["unread-videos"]
    assert dict(survey(tmp_path).rows())["different captions"] == "2"
    for path in (tmp_path / "videos").glob("*.mp4"):
        path.unlink()
    with pytest.raises(ValueError, match=r"has no videos/\*\.mp4\. It has files that are not read: 7\.MP4, 8\.mov"):
        Folder(str(tmp_path), text=None).open()


def test_a_caption_that_is_a_device_or_a_pipe_is_a_problem_by_name(tmp_path: Path) -> None:
    """Reading one never ended, or took all memory."""
    (tmp_path / "metas").mkdir()
    for n in range(3):
        video.write(tmp_path / "videos" / f"{n}.mp4", np.zeros((2, 8, 8, 3), np.uint8), 8.0)
    os.mkfifo(tmp_path / "metas" / "0.txt")
    (tmp_path / "metas" / "1.txt").symlink_to("/dev/zero")
    (tmp_path / "metas" / "2.txt").write_bytes(b"x" * (2**20 + 1))
    messages = [problem.message for problem in survey(tmp_path).problems if problem.kind == "unreadable-metas"]
    assert len(messages) == 3 and sum("is no file" in message for message in messages) == 2
    with pytest.raises(ValueError, match=r"the caption of 0: .*is no file, but a folder, a device or a pipe"):
        Folder(str(tmp_path), text=None).open().captions()
