"""The folder data set: windows, pairs and caches come out as they were put in, and every mistake is told by its name."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.config import ConfigError, check, choices, parse, to_yaml
from fewstep.data.contract import BadSamples
from fewstep.data.controls import Depth, Edge, Keypoint, Seg, Vis
from fewstep.data.files import cache, video
from fewstep.data.files.arrays import write_pickle
from fewstep.data.folder.dataset import Folder
from fewstep.toyworld import clips
from fewstep.toyworld.dataset import depth_of_grey, depth_range_m, stem_of, write
from fewstep.toyworld.physics import World

WORLD = World(num_frames=9)
NUM, SEED = 4, 3
SHAPE = (4, 3, 8, 8)  # latents C T H W of 9 frames of 32 x 32
TIMES = (0.999, 0.75, 0.4)
Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy world, with embeddings, noise, latents and states that a teacher might have made."""
    out = tmp_path_factory.mktemp("toy") / "set"
    write(out, NUM, SEED, WORLD)
    generator = torch.Generator().manual_seed(0)
    for index in range(NUM):
        stem, noise = stem_of(index), torch.randn(SHAPE, generator=generator)
        latents = torch.randn(SHAPE, generator=generator)
        write_pickle(out / "t5_xxl" / f"{stem}.pickle", [np.full((index + 2, 6), index + 1, dtype=np.float16)])
        write_pickle(out / "noise" / f"{stem}.pickle", noise.numpy() if index % 2 else [noise.numpy()])
        facts = {"num_frames": 9, "fps": 16.0}
        cache.write(
            out / "latents" / f"{stem}.safetensors", {"latents": latents.half()}, made_from={"codec": "toy"}, facts=facts
        )
        cache.write(out / "edge_latents" / f"{stem}.safetensors", {"latents": -latents})
        states = torch.stack([noise, (noise + latents) / 2, latents * 0.9])
        cache.write(out / "path" / f"{stem}.safetensors", {"path": states, "path_times": torch.tensor(TIMES)})
    return out


@pytest.fixture
def toy(source: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(source, tmp_path / "set"))


def spec(root: Path, **changes: Any) -> Folder:
    return replace(Folder(str(root), text=None), **changes)


# ---- pixels --------------------------------------------------------------------------------------------------------


def test_the_toy_world_comes_back(source: Path) -> None:
    data = Folder(str(source), max_tokens=4, mask_text=True, control=Depth()).open()
    assert len(data) == NUM
    batch = data.batch(torch.tensor([2, 0, 3, 1]))
    assert batch.x0 is not None and batch.index is not None and batch.cond.text is not None and batch.cond.fps is not None
    assert batch.x0.shape == (NUM, 3, 9, 32, 32) and batch.x0.dtype == torch.float32 and batch.x0.is_contiguous()
    assert batch.index.tolist() == [2, 0, 3, 1]
    assert batch.cond.fps.tolist() == [16.0] * 4
    near, far = depth_range_m(WORLD)
    for row, index in enumerate([2, 0, 3, 1]):
        made = clips.clip(WORLD, SEED, index)
        pixels = (batch.x0[row] + 1) * 127.5
        assert torch.equal(pixels.round().permute(1, 2, 3, 0).to(torch.uint8), torch.from_numpy(made.rgb))
        grey = ((batch.cond.control["depth"][row] + 1) * 127.5).round().permute(1, 2, 3, 0).numpy().astype(np.uint8)
        assert np.abs(depth_of_grey(grey, near, far) - made.depth).max() < 0.03
        assert data.captions()[index] == made.caption
        # index + 2 tokens of the value index + 1, cut or padded to four
        num = min(index + 2, 4)
        assert batch.cond.text_mask is not None and batch.cond.text_mask[row].tolist() == [True] * num + [False] * (4 - num)
        assert batch.cond.text[row, :, 0].tolist() == [index + 1.0] * num + [0.0] * (4 - num)
    assert batch.noise is None and batch.path is None and batch.negative is None


def test_masks_and_keypoints_and_controls_made_on_the_way(source: Path) -> None:
    row, made = torch.tensor([1]), clips.clip(WORLD, SEED, 1)
    seg = spec(source, control=Seg()).open().batch(row).cond.control["seg"]
    assert torch.equal((seg > -1).any(1)[0], torch.from_numpy(made.segmentation > 0))
    drawn = spec(source, control=Keypoint()).open().batch(row).cond.control["keypoint"]
    assert drawn.shape == (1, 3, 9, 32, 32) and bool((drawn > -1).any())
    for control in (Edge("medium"), Vis("very_low")):
        found = [spec(source, control=control, control_from=way).open().batch(row) for way in ("files", "video")]
        assert torch.equal(found[0].cond.control[control.folder], found[1].cond.control[control.folder])


def test_windows_are_those_of_predict1(source: Path) -> None:
    whole = spec(source).open().batch(torch.tensor([1])).x0
    assert whole is not None
    data = spec(source, num_frames=3, sequence_interval=2, start_frame_interval=2).open()
    # Starts 0, 2, 4 of every clip: from 4 on, frames 4, 6, 8 are the last that fit.
    assert data.stems == [stem_of(index) for index in range(NUM) for _ in range(3)]
    assert [sample.span.start for sample in data.samples] == [0, 2, 4] * NUM
    batch = data.batch(torch.tensor([3, 4, 5]))
    assert batch.x0 is not None and batch.cond.fps is not None
    for row, start in enumerate((0, 2, 4)):
        assert torch.equal(batch.x0[row], whole[0, :, start : start + 5 : 2])
    assert batch.cond.fps.tolist() == [8.0] * 3  # of the pictures, not of the file
    assert len(spec(source, num_frames=9).open()) == NUM
    assert len(spec(source, num_frames=8).open()) == 2 * NUM
    every_second = spec(source, sequence_interval=2).open().batch(torch.tensor([0])).x0
    assert every_second is not None and every_second.shape[2] == 5


def test_frames_are_resized_and_cropped(source: Path) -> None:
    whole = spec(source).open().batch(torch.tensor([0])).x0
    wide = spec(source, video_size=(32, 64), control=Edge()).open().batch(torch.tensor([0]))
    assert wide.x0 is not None and whole is not None
    assert wide.x0.shape == wide.cond.control["edge"].shape == (1, 3, 9, 32, 64)
    cut = spec(source, video_size=(16, 32), resize="crop").open().batch(torch.tensor([0])).x0
    assert cut is not None and torch.equal(cut, whole[..., 8:24, :])
    both = spec(source, video_size=(16, 32), resize="crop", control=Seg()).open().batch(torch.tensor([0]))
    plain = spec(source, control=Seg()).open().batch(torch.tensor([0]))
    assert torch.equal(both.cond.control["seg"], plain.cond.control["seg"][..., 8:24, :])


def test_memory_and_threads_change_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = spec(source, control=Edge()).open()
    slow = spec(source, control=Edge(), ram_gib=0.0, num_threads=2).open()
    index = torch.tensor([3, 1, 1, 0])
    for _ in range(2):
        one, two = kept.batch(index), slow.batch(index)
        assert one.x0 is not None and two.x0 is not None
        assert torch.equal(one.x0, two.x0)
        assert torch.equal(one.cond.control["edge"], two.cond.control["edge"])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(video, "read", never)
    assert torch.equal(kept.batch(index.flip(0)).index, index.flip(0))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="read again"):
        slow.batch(index)


# ---- latents and pairs ---------------------------------------------------------------------------------------------


def test_pairs_of_latents(source: Path) -> None:
    wanted = Folder(
        str(source), x0="latents", num_frames=9, control=Edge(), max_tokens=3, negative="zeros", pairs=("noise", "path")
    )
    assert wanted.fields == {"x0", "noise", "path", "path_times", "negative"}
    batch = wanted.open().batch(torch.tensor([3, 0]))
    for row, index in enumerate((3, 0)):
        stem = stem_of(index)
        latents = cache.read(source / "latents" / f"{stem}.safetensors").tensors["latents"].float()
        noise = pickle.loads((source / "noise" / f"{stem}.pickle").read_bytes())
        assert batch.x0 is not None and torch.equal(batch.x0[row], latents)
        assert batch.noise is not None and np.array_equal(batch.noise[row], noise if index % 2 else noise[0])
        assert batch.path is not None and torch.equal(batch.path[row, 0], batch.noise[row])
        assert batch.path_times is not None and torch.equal(batch.path_times[row], torch.tensor(TIMES))
    assert batch.cond.control["edge"].shape == (2, *SHAPE)
    assert batch.cond.fps is not None and batch.cond.fps.tolist() == [16.0, 16.0]
    assert batch.negative is not None and batch.negative.text is not None and batch.cond.text is not None
    assert batch.negative.text.shape == batch.cond.text.shape and not batch.negative.text.any()
    assert batch.negative.control.keys() == {"edge"}
    assert all(
        tensor is None or tensor.dtype == torch.float32 for tensor in (batch.x0, batch.noise, batch.path, batch.cond.text)
    )


def test_pairs_of_pixels_and_a_negative_from_a_file(source: Path, toy: Path) -> None:
    with pytest.raises(ValueError, match=r"has no negative.pickle.*prepare text --negative-prompt TEXT"):
        Folder(str(toy), num_frames=9, negative="negative.pickle").open()
    write_pickle(toy / "negative.pickle", [np.ones((2, 6), dtype=np.float16)])
    batch = (
        Folder(str(toy), num_frames=9, max_tokens=4, mask_text=True, negative="negative.pickle", pairs=("noise",))
        .open()
        .batch(torch.arange(2))
    )
    assert (
        batch.x0 is not None and batch.noise is not None and batch.negative is not None and batch.negative.text_mask is not None
    )
    assert batch.x0.shape == (2, 3, 9, 32, 32) and batch.noise.shape == (2, *SHAPE)
    assert batch.negative.text_mask.tolist() == [[True, True, False, False]] * 2


def test_folders_of_fastgen(source: Path, tmp_path: Path) -> None:
    for index in range(3):
        home = tmp_path / f"{index:06d}"
        home.mkdir()
        torch.save(torch.full(SHAPE, float(index)), home / "latent.pth")
        torch.save(torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(index)), home / "path.pth")
        (home / "prompt.txt").write_text(f"prompt {index}")
    fastgen = (0.999, 0.937, 0.833, 0.624)
    data = spec(tmp_path, x0="latents", pairs=("path",), path_times=fastgen).open()
    batch = data.batch(torch.tensor([2]))
    assert data.captions() == ["prompt 0", "prompt 1", "prompt 2"]
    assert batch.x0 is not None and batch.path is not None and batch.path_times is not None
    assert batch.x0.unique().tolist() == [2.0]
    assert batch.path.shape == (1, 4, *SHAPE)
    assert torch.equal(batch.path_times[0], torch.tensor(fastgen))
    assert batch.cond.fps is None
    with pytest.raises(ValueError, match=r"does not say at which times its 4 states are\. Set data\.path_times"):
        spec(tmp_path, x0="latents", pairs=("path",)).open()


# ---- mistakes ------------------------------------------------------------------------------------------------------


def rewrite(root: Path, name: str, change: Callable[[np.ndarray], np.ndarray], fps: float = 16) -> None:
    frames = video.read(root / name).frames
    video.write(root / name, change(frames), fps, "lossless")


def remove(*names: str) -> Spoil:
    def spoil(root: Path) -> None:
        for name in names:
            (root / name).unlink()

    return spoil


def array(name: str, value: Any) -> Spoil:
    return lambda root: write_pickle(root / name, value)


def text(name: str, value: bytes) -> Spoil:
    return lambda root: (root / name).write_bytes(value) and None


def tensors(name: str, **value: torch.Tensor) -> Spoil:
    return lambda root: cache.write(root / name, value)


def cut(name: str) -> Spoil:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-400]) and None


OTHER = {"codec": "x"}
NOISE, T5 = "noise/clip_000000.pickle", "t5_xxl/clip_000000.pickle"
KD: dict[str, Any] = {"x0": "latents", "pairs": ("noise",)}
STATES: dict[str, Any] = {"x0": "latents", "pairs": ("path",)}
MISTAKES: list[tuple[str, dict[str, Any], Spoil, str]] = [
    (
        "no noise",
        KD,
        remove(NOISE, "noise/clip_000003.pickle"),
        r"2 of 4 lack noise/\*.pickle: clip_000000, clip_000003\. .*fewstep pairs",
    ),
    (
        "no embedding",
        {"text": "t5_xxl"},
        remove(T5),
        r"1 of 4 lack t5_xxl/\*.pickle: clip_000000\. Embed .*fewstep prepare text",
    ),
    (
        "no control",
        {"control": Edge()},
        remove("edge/clip_000001.mp4"),
        r"1 of 4 lack edge/\*.mp4: clip_000001.*control_from=video",
    ),
    (
        "no masks",
        {"control": Seg()},
        remove("seg/clip_000001.pickle"),
        r"lack seg/\*.pickle: clip_000001\. .*prepare controls$",
    ),
    ("no caption", {"text": "t5_xxl"}, remove("metas/clip_000002.txt"), r"1 of 4 lack metas/\*.txt: clip_000002"),
    (
        "empty caption",
        {"text": "t5_xxl"},
        text("metas/clip_000002.txt", b" \n"),
        "1 of 4 captions are empty: clip_000002. Write one",
    ),
    ("caption of bytes", {"text": "t5_xxl"}, text("metas/clip_000002.txt", b"\xff\xfe"), "caption of clip_000002 is not UTF-8"),
    ("truncated", {}, cut("videos/clip_000001.mp4"), r"clip_000001\.mp4: not a readable video .* cut off"),
    ("not a video", {}, text("videos/clip_000001.mp4", b""), r"clip_000001\.mp4: not a readable video"),
    (
        "8 of 9 frames in a pair",
        {"pairs": ("noise",), "num_frames": 9},
        lambda root: rewrite(root, "videos/clip_000001.mp4", lambda f: f[:8]),
        r"1 of 4 clips do not have 9 frames: clip_000001 \(8\)\. A pair is the whole clip its noise belongs to, never a window",
    ),
    (
        "8 of 9 frames, no count given",
        {"pairs": ("noise",)},
        lambda root: rewrite(root, "videos/clip_000001.mp4", lambda f: f[:8]),
        r"1 of 4 differ from the others in num_frames \(9\): clip_000001 \(8\)\. A pair is a whole clip",
    ),
    (
        "too short for a window",
        {"num_frames": 5, "sequence_interval": 2},
        lambda root: rewrite(root, "videos/clip_000001.mp4", lambda f: f[:8]),
        r"1 of 4 clips are shorter than a window of 9 frames .*: clip_000001 \(8\)\. Set data\.skip_short=true",
    ),
    (
        "another size",
        {},
        lambda root: rewrite(root, "videos/clip_000001.mp4", lambda f: f[:, :16]),
        r"1 of 4 differ from the others in size \(\(32, 32\)\): clip_000001 \(\(16, 32\)\)\. Set data\.video_size",
    ),
    (
        "control of other length",
        {"control": Edge()},
        lambda root: rewrite(root, "edge/clip_000001.mp4", lambda f: f[:8]),
        r"1 of 4 edge/\*\.mp4 differ from their clip in frames: clip_000001 \(8, its clip 9\)",
    ),
    (
        "control of other rate",
        {"control": Edge()},
        lambda root: rewrite(root, "edge/clip_000001.mp4", lambda f: f, fps=24),
        r"differ from their clip in fps: clip_000001 \(24\.0, its clip 16\.0\)",
    ),
    ("noise of nothing", KD, array(NOISE, np.zeros(SHAPE)), "standard deviation is 0, but noise is stored with variance 1"),
    (
        "noise of wrong shape",
        KD,
        array(NOISE, np.eye(16).reshape(4, 1, 8, 8) * 4),
        r"\(4, 1, 8, 8\), but its clip's latents are \(4, 3, 8, 8\)",
    ),
    (
        "noise with its axes swapped",
        {"pairs": ("noise",)},
        lambda root: write_pickle(root / NOISE, np.random.default_rng(0).normal(size=(3, 4, 8, 8))),
        r"no clip of 9 frames of 32 x 32 has: T - 1 must divide 8",
    ),
    (
        "noise times 80",
        KD,
        lambda root: write_pickle(root / NOISE, 80 * np.random.default_rng(0).normal(size=SHAPE)),
        r"standard deviation is (79|8\d)\.?\d*, but noise is stored with variance 1.*divide by it",
    ),
    ("two noises", KD, array(NOISE, [np.zeros(SHAPE)] * 2), "holds 2 arrays, where one array or a list of one"),
    ("hostile pickle", KD, text(NOISE, b"cos\nsystem\n(S'true'\ntR."), "os.system|posix.system"),
    ("noise of text", KD, array(NOISE, "noise"), "holds a str, not an array of numbers"),
    ("noise not finite", KD, array(NOISE, np.full(SHAPE, np.nan)), "768 numbers that are not finite"),
    ("whole numbers", KD, array(NOISE, np.zeros(SHAPE, dtype=int)), "torch.int64, not floating-point"),
    (
        "embedding without tokens",
        {"text": "t5_xxl"},
        array(T5, np.zeros((0, 6))),
        "has no tokens; even an empty text has its end token",
    ),
    ("embedding of one axis", {"text": "t5_xxl"}, array(T5, np.zeros(6)), r"has shape \(6,\), where \(tokens, D\) is wanted"),
    (
        "states without name",
        STATES,
        tensors("path/clip_000000.safetensors", a=torch.zeros(2), b=torch.zeros(2)),
        "holds a, b, but no 'path'",
    ),
    (
        "states without times",
        STATES,
        tensors("path/clip_000000.safetensors", path=torch.zeros(3, *SHAPE)),
        "does not say at which times its 3 states are",
    ),
    (
        "times that rise",
        STATES,
        tensors("path/clip_000000.safetensors", path=torch.zeros(2, *SHAPE), path_times=torch.tensor([0.4, 0.9])),
        "2 states need as many times, descending, not",
    ),
    (
        "states of another clip",
        STATES,
        tensors("path/clip_000000.safetensors", path=torch.zeros(1, 4, 3, 8, 4), path_times=torch.ones(1)),
        r"shape \(4, 3, 8, 4\), but its clip's latents are \(4, 3, 8, 8\)",
    ),
    ("damaged cache", {"x0": "latents"}, text("latents/clip_000001.safetensors", b"\x10"), "cannot be opened"),
    (
        "latents of another codec",
        {"x0": "latents"},
        lambda root: cache.write(
            root / "latents" / "clip_000001.safetensors", {"latents": torch.zeros(SHAPE)}, made_from=OTHER
        ),
        r"1 of 4 differ from the others in origin \(codec toy\): clip_000001 \(codec x\)\. Encode them again",
    ),
    ("latents of other length", {"x0": "latents", "num_frames": 17}, lambda root: None, "4 of 4 latents are not of 17 frames"),
    (
        "control of latents missing",
        {"x0": "latents", "control": Vis()},
        lambda root: None,
        r"lack vis_latents/\*\.safetensors.*prepare latents",
    ),
    (
        "no latents at all",
        {"x0": "latents"},
        lambda root: shutil.rmtree(root / "latents"),
        r"has no latents/\*\.safetensors\. Make them",
    ),
    (
        "embeddings of another encoder",
        {"text": "t5_xxl", "negative": "n.pickle"},
        array("n.pickle", np.zeros((2, 7))),
        "embeds in 7 numbers, but t5_xxl/ in 6",
    ),
]


@pytest.mark.parametrize(("changes", "spoil", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_every_mistake_is_told_by_name_before_training(toy: Path, changes: dict[str, Any], spoil: Spoil, words: str) -> None:
    spoil(toy)
    with pytest.raises(ValueError, match=words) as told:
        spec(toy, **changes).open()
    assert str(toy) in str(told.value)


def test_what_only_reading_shows_is_told_when_it_is_read(toy: Path) -> None:
    write_pickle(toy / "noise" / "clip_000002.pickle", np.random.default_rng(0).normal(size=(4, 3, 8, 4)))
    data = spec(toy, **KD).open()
    data.batch(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"clip_000002\.pickle: is noise of shape \(4, 3, 8, 4\)"):
        data.batch(torch.tensor([0, 2]))
    write_pickle(toy / "t5_xxl" / "clip_000002.pickle", np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"'text' of clip_000002 has shape \(512, 5\), but \(512, 6\) in clip_000000"):
        spec(toy, text="t5_xxl").open().batch(torch.tensor([2]))
    (toy / "noise" / "clip_000003.pickle").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(BadSamples, match=r"clip_000003\.pickle"):
        data.batch(torch.tensor([3]))


def test_everything_wrong_is_told_at_once(toy: Path) -> None:
    remove(NOISE, "edge/clip_000001.mp4")(toy)
    cut("videos/clip_000002.mp4")(toy)
    with pytest.raises(ValueError, match=r"(?s)lack edge.*lack noise.*clip_000002\.mp4: not a readable video") as told:
        spec(toy, pairs=("noise",), control=Edge()).open()
    assert len(str(told.value).splitlines()) == 3


def test_short_clips_are_left_out_when_asked(toy: Path) -> None:
    rewrite(toy, "videos/clip_000001.mp4", lambda frames: frames[:4])
    data = spec(toy, num_frames=9, skip_short=True).open()
    assert data.stems == [stem_of(0), stem_of(2), stem_of(3)]
    with pytest.raises(ValueError, match="4 of 4 clips are shorter"):
        spec(toy, num_frames=30, skip_short=True).open()


# ---- configuration -------------------------------------------------------------------------------------------------


def test_it_is_a_kind_of_data_with_the_names_of_cosmos() -> None:
    assert choices("data")["folder"] is Folder
    written = {
        "dataset_dir": "d",
        "num_frames": 17,
        "sequence_interval": 1,
        "start_frame_interval": 1,
        "video_size": [704, 1280],
    }
    assert parse(Folder, written) == Folder("d", num_frames=17, video_size=(704, 1280))
    assert "dataset_dir: d" in to_yaml(Folder("d", control=Edge("low")))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_frames": 0}, "num_frames: must be at least 1"),
        ({"pairs": ("noise",), "sequence_interval": 2}, "sequence_interval: must be left alone with pairs"),
        ({"pairs": ("noise",), "control": Edge(), "control_from": "video"}, "control_from: .*the file its teacher was given"),
        ({"control": Depth(), "control_from": "video"}, "depth cannot be made from frames"),
        ({"x0": "latents", "control": Edge(), "control_from": "video"}, "latents have no frames"),
        ({"text": None, "negative": "zeros"}, "negative: needs the embeddings"),
        ({"negative": "../../etc/passwd"}, "negative: must lie within dataset_dir"),
        ({"pairs": ("path",), "path_times": (0.1, 0.9)}, "path_times: must descend"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(replace(Folder("d"), **changes))


def test_settings_without_effect_are_warned_of() -> None:
    assert check(Folder("d", x0="latents", sequence_interval=2)) == [
        "sequence_interval: has no effect: latents are of whole clips, at their own size"
    ]
    assert Folder("d", path_times=(0.5,)).fields == {"x0"}
    assert "path_times: has no effect" in check(Folder("d", path_times=(0.5,)))[0]
