"""Prepared controls: the ranges of the reference, upstream's depth, the exact layouts of Cosmos, and nothing replaced."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from fewstep import cli
from fewstep.data.controls import Depth, Edge, Keypoint, Seg, Vis, seed_of
from fewstep.data.files import keypoints, masks, video
from fewstep.data.files.arrays import write_pickle
from fewstep.data.folder.dataset import Folder
from fewstep.prepare.controls import OfDepthModel, OfFiles, OfFrames, grey_of_inverse, write
from fewstep.prepare.summary import Summary
from fewstep.toyworld import clips
from fewstep.toyworld.dataset import stem_of
from fewstep.toyworld.physics import World

WORLD, NUM = World(num_frames=5), 3
CLIPS = [clips.clip(WORLD, 0, n) for n in range(NUM)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, made in enumerate(CLIPS):
        video.write(tmp_path / "set" / "videos" / f"{stem_of(number)}.mp4", made.rgb, made.fps, quality="lossless")
    return tmp_path / "set"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- random numbers ------------------------------------------------------------------------------------------------


def test_random_thresholds_have_the_ranges_of_training() -> None:
    drawn = np.array([Edge("random").thresholds(seed) for seed in range(4000)])
    lower, upper = drawn.T
    assert lower.min() == 20 and lower.max() == 99  # np.random.randint(20, 100)
    assert (upper <= 255).all() and upper.max() < 99 + 150
    rise = upper - lower
    assert rise.min() == 50 and rise.max() == 149  # np.random.randint(50, 150)
    assert abs(lower.mean() - 59.5) < 1.5 and abs(rise.mean() - 99.5) < 2
    assert abs(np.corrcoef(lower, rise)[0, 1]) < 0.05


def test_random_blurs_have_the_kinds_and_ranges_of_training() -> None:
    drawn = [Vis("random").blur(seed) for seed in range(4000)]
    kinds = [(blur.bilateral is not None, blur.gaussian is not None) for blur in drawn]
    for kind, chance in (((True, False), 0.5), ((False, True), 0.3), ((True, True), 0.2)):
        assert abs(kinds.count(kind) / 4000 - chance) < 0.03
    assert {blur.shrink for blur in drawn} == {1, 2, 3, 4} and {blur.factor for blur in drawn} == set(range(4, 18))
    bilateral = np.array([blur.bilateral for blur in drawn if blur.bilateral])
    assert bilateral.min(0).tolist() == [15, 100, 50] and bilateral.max(0).tolist() == [49, 299, 149]
    assert {blur.passes for blur in drawn if blur.bilateral} == {1, 2, 3}
    gaussian = [blur.gaussian for blur in drawn if blur.gaussian]
    assert {width for width, _ in gaussian} == {21, 23, 25, 27, 29}  # 21..29, made odd
    assert min(sigma for _, sigma in gaussian) < 10.6 and max(sigma for _, sigma in gaussian) > 14.4


def test_a_random_blur_is_what_opencv_makes_of_its_numbers() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), dtype=np.uint8)
    seeds = [
        next(s for s in range(99) if (b := Vis("random").blur(s)).gaussian and bool(b.bilateral) == both) for both in (0, 1)
    ]
    for seed in seeds:
        blur = Vis("random").blur(seed)
        assert blur.gaussian is not None
        wanted: Any = cv2.resize(frames[0], (64 // blur.shrink, 48 // blur.shrink), interpolation=cv2.INTER_AREA)
        for _ in range(blur.passes if blur.bilateral else 0):
            wanted = cv2.bilateralFilter(wanted, *(blur.bilateral or ()))
        wanted = cv2.GaussianBlur(wanted, (blur.gaussian[0],) * 2, blur.gaussian[1])
        wanted = torch.from_numpy(cv2.resize(wanted, (64, 48), interpolation=cv2.INTER_LINEAR)).permute(2, 0, 1)[None]
        for size in ((48 // blur.factor, 64 // blur.factor), (48, 64)):  # torchvision's resize of uint8, spelled out
            wanted = torch.nn.functional.interpolate(wanted.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)
        assert np.array_equal(Vis("random")(frames, seed)[0], wanted[0].permute(1, 2, 0).byte().numpy())


def test_frames_too_small_for_some_draw_are_refused_whatever_is_drawn() -> None:
    for seed in range(5):
        with pytest.raises(ValueError, match="16 x 16 are too small for the preset 'random'"):
            Vis("random")(np.zeros((1, 16, 16, 3), np.uint8), seed)


def test_on_the_fly_each_clip_has_its_own_numbers_and_always_the_same(folder: Path) -> None:
    data = Folder(str(folder), text=None, control=Edge("random"), control_from="video").open()
    batch = data.batch(torch.tensor([2, 0]))
    for row, number in enumerate((2, 0)):
        wanted = Edge("random")(CLIPS[number].rgb, seed_of(stem_of(number)))
        found = ((batch.cond.control["edge"][row] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
        assert np.array_equal(found, wanted)
    windows = Folder(str(folder), num_frames=2, text=None, control=Vis("random"), control_from="video").open()
    found = ((windows.batch(torch.tensor([3])).cond.control["vis"][0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(found, Vis("random")(CLIPS[0].rgb[3:5], seed_of(stem_of(0), 3)))
    assert len({Edge("random").thresholds(seed_of(stem_of(n))) for n in range(50)}) > 40


# ---- edge and vis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("type_", "preset"), [("edge", "low"), ("edge", "random"), ("vis", "very_low"), ("vis", "random")])
def test_files_are_the_control_of_the_frames(folder: Path, type_: Any, preset: Any) -> None:
    assert write(folder, OfFrames(type_, preset)) == Summary(NUM, NUM, 0)
    control = (Edge if type_ == "edge" else Vis)(preset)
    for number, made in enumerate(CLIPS):
        found = video.read(folder / type_ / f"{stem_of(number)}.mp4")
        assert np.array_equal(found.frames, control(made.rgb, seed_of(stem_of(number)))) and found.fps == made.fps
    before = content(folder)
    assert write(folder, OfFrames(type_, preset)) == Summary(NUM, 0, 0)
    assert content(folder) == before
    with pytest.raises(ValueError, match=f"preset is '{preset}', not 'high'.*remove its 3 files"):
        write(folder, OfFrames(type_, "high"))


def test_the_file_of_a_clip_that_changed_is_made_again_and_one_of_someone_else_is_kept(folder: Path) -> None:
    video.write(folder / "edge" / "clip_000001.mp4", CLIPS[1].rgb, 16, quality="lossless")
    teacher = (folder / "edge" / "clip_000001.mp4").read_bytes()
    assert write(folder, OfFrames("edge")) == Summary(NUM, 2, 1)
    for number in (0, 1):
        video.write(folder / "videos" / f"{stem_of(number)}.mp4", CLIPS[2].rgb, 16, quality="lossless")
    assert write(folder, OfFrames("edge")) == Summary(NUM, 1, 1)
    assert np.array_equal(video.read(folder / "edge" / "clip_000000.mp4").frames, Edge()(CLIPS[2].rgb))
    assert (folder / "edge" / "clip_000001.mp4").read_bytes() == teacher


def test_a_clip_that_fails_is_told_of_when_the_others_are_done(folder: Path) -> None:
    (folder / "videos" / "clip_000001.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"1 of 3 failed, the others are done: .*clip_000001\.mp4: not a readable video"):
        write(folder, OfFrames("edge"))
    assert sorted(path.name for path in (folder / "edge").glob("*.mp4")) == ["clip_000000.mp4", "clip_000002.mp4"]


# ---- depth ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil

    torch.manual_seed(0)
    layers: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [1, 2, 3, 4]}
    backbone = Dinov2Config(**layers, image_size=28, patch_size=14, reshape_hidden_states=False, apply_layernorm=True)
    sizes: dict[str, Any] = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [4, 8, 8, 8], "fusion_hidden_size": 8}
    config = DepthAnythingConfig(backbone_config=backbone, **sizes, head_hidden_size=4, patch_size=14)
    out = tmp_path_factory.mktemp("depth")
    model = DepthAnythingForDepthEstimation(config)
    for parameter in model.parameters():  # fresh ones answer 0 everywhere: the last activation cuts what is below
        parameter.data.add_(0.02 * torch.randn_like(parameter)).add_(0.02)
    model.save_pretrained(out)
    DPTImageProcessorPil(size={"height": 42, "width": 42}, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(out)
    return out


def test_depth_is_upstreams_answer_frame_by_frame_in_one_range(folder: Path, depth_model: Path) -> None:
    from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

    maker = OfDepthModel(str(depth_model), at_once=2)
    assert write(folder, maker) == Summary(NUM, NUM, 0)
    model, processor = (
        DepthAnythingForDepthEstimation.from_pretrained(depth_model).eval(),
        DPTImageProcessorPil.from_pretrained(depth_model),
    )
    parts = []
    for frame in CLIPS[0].rgb:
        with torch.no_grad():
            answer = model(**processor(images=frame, return_tensors="pt"))
        parts.append(processor.post_process_depth_estimation(answer, target_sizes=[(32, 32)])[0]["predicted_depth"].numpy())
    wanted = np.stack(parts)
    np.testing.assert_allclose(maker.inverse_depth(CLIPS[0].rgb), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.std() > 1e-3 * abs(wanted.mean())
    grey = video.read(folder / "depth" / "clip_000000.mp4").frames
    steps = (wanted - wanted.min()) / (wanted.max() - wanted.min()) * 255
    assert np.abs(grey[..., 0] - steps).max() < 0.6 and grey.min() == 0 and grey.max() == 255
    found = Folder(str(folder), text=None, control=Depth()).open().batch(torch.tensor([1])).cond.control["depth"]
    assert found.shape == (1, 3, 5, 32, 32)
    assert write(folder, OfDepthModel(str(depth_model))) == Summary(NUM, 0, 0)


def test_a_flat_clip_has_depth_without_a_division_by_zero() -> None:
    assert (grey_of_inverse(np.full((2, 3, 4), 7.0)) == 0).all()


def test_depth_from_arrays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    for number, made in enumerate(CLIPS):
        np.save(tmp_path / "arrays" / f"{stem_of(number)}.npy", made.depth)
    assert write(folder, OfFiles("depth", tmp_path / "arrays", metric=True)) == Summary(NUM, NUM, 0)
    grey, inverse = video.read(folder / "depth" / "clip_000002.mp4").frames, 1 / CLIPS[2].depth
    wanted = (inverse - inverse.min()) / (inverse.max() - inverse.min()) * 255
    assert np.abs(grey[..., 0] - wanted).max() <= 0.501


# ---- seg and keypoint ----------------------------------------------------------------------------------------------


def test_label_maps_become_the_exact_layout_of_transfer1(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for number, made in enumerate(CLIPS):
        np.save(tmp_path / "maps" / f"{stem_of(number)}.npy", made.segmentation)
    assert write(folder, OfFiles("seg", tmp_path / "maps")) == Summary(NUM, NUM, 0)
    rows: Any = pickle.loads((folder / "seg" / "clip_000000.pickle").read_bytes())
    assert all(set(row) == {"phrase", "segmentation_mask_rle"} for row in rows)
    found = masks.read(folder / "seg" / "clip_000000.pickle")
    labels = [label for label in np.unique(CLIPS[0].segmentation) if label]
    for mask, label in zip(found, labels, strict=True):
        assert np.array_equal(mask.frames(range(5)), CLIPS[0].segmentation == label)
    Folder(str(folder), text=None, control=Seg()).open().batch(torch.tensor([0]))
    shutil.copytree(folder / "seg", tmp_path / "mine")
    (tmp_path / "mine" / ".made.jsonl").unlink()
    before = content(tmp_path / "mine")
    shutil.rmtree(folder / "seg")
    assert write(folder, OfFiles("seg", tmp_path / "mine")).new == NUM
    assert {name: data for name, data in content(folder / "seg").items() if name != ".made.jsonl"} == before


def test_people_from_arrays_and_pickles(folder: Path, tmp_path: Path) -> None:
    people = np.random.default_rng(0).random((5, 2, 133, 3)).astype(np.float32)
    (tmp_path / "people").mkdir()
    for number in range(NUM):
        np.save(tmp_path / "people" / f"{stem_of(number)}.npy", people)
    assert write(folder, OfFiles("keypoint", tmp_path / "people")) == Summary(NUM, NUM, 0)
    raw: Any = pickle.loads((folder / "keypoint" / "clip_000001.pickle").read_bytes())
    assert sorted(raw) == [0, 1, 2, 3, 4] and len(raw[3]) == 2
    assert raw[3][1]["body-keypoints"].shape == (133, 3) and raw[3][1]["hand-keypoints"].shape == (42, 3)
    np.testing.assert_allclose(raw[3][1]["body-keypoints"], people[3, 1], atol=1e-3)
    assert len(keypoints.read(folder / "keypoint" / "clip_000001.pickle", range(5))) == 5
    Folder(str(folder), text=None, control=Keypoint()).open().batch(torch.tensor([0]))


@pytest.mark.parametrize(
    ("type_", "name", "value", "words"),
    [
        ("depth", "x.npy", np.ones((4, 32, 32)), "has 4 frames, its clip 5"),
        ("depth", "x.npy", np.ones((5, 16, 32)), r"has shape \(5, 16, 32\), its clip \(5, 32, 32\)"),
        ("depth", "x.npy", np.full((5, 32, 32), np.nan), "depth must be finite"),
        ("seg", "x.npy", np.ones((5, 32, 32)), "holds float64; a label map has a whole number"),
        ("keypoint", "x.npy", np.ones((5, 133, 3)), r"where \(frames, people, 133, 3\) is wanted"),
        ("keypoint", "x.pickle", {0: []}, "4 of 5 frames have no entry"),
        ("seg", "x.pickle", {"a": 1}, "A segmentation is a list"),
        ("seg", "x.csv", None, r"has no file for x; wanted is one of \.npy"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, type_: Any, name: str, value: Any, words: str) -> None:
    video.write(tmp_path / "set" / "videos" / "x.mp4", CLIPS[0].rgb, 16, quality="lossless")
    (tmp_path / "files").mkdir()
    if name.endswith(".npy"):
        np.save(tmp_path / "files" / name, value)
    elif name.endswith(".pickle"):
        write_pickle(tmp_path / "files" / name, value)
    with pytest.raises(ValueError, match=words):
        write(tmp_path / "set", OfFiles(type_, tmp_path / "files"))
    assert not list((tmp_path / "set" / type_).glob("x.*"))


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], depth_model: Path) -> None:
    words = ["prepare", "controls", str(folder), "--type"]
    assert cli.main([*words, "edge", "--preset", "random", "--quality", "12"]) == 0
    assert capsys.readouterr().out == f"{folder / 'edge'}: 3 clips, 3 of them new\n"
    assert cli.main([*words, "depth", "--model", str(depth_model), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{folder / 'depth'}: 3 clips, 3 of them new\n"
    for wrong, told in (
        (["blur"], "'blur' is not one of edge, vis, depth, seg, keypoint"),
        (["edge", "--preset", "weak"], "'weak' is not one of none, very_low"),
        (["keypoint"], "--type keypoint needs --from"),
        (["depth"], "--type depth needs --model with a Depth-Anything model"),
        (["edge", "--from", str(folder)], "--from is for depth, seg, keypoint, not edge"),
        (["vis", "--quality", "best"], "'best' is neither lossless nor a CRF"),
    ):
        assert cli.main([*words, *wrong]) == 2
        assert told in capsys.readouterr().err
    assert cli.main([*words, "depth", "--model", str(folder)]) == 1
    assert "no depth model of transformers" in capsys.readouterr().err
