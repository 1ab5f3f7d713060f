"""Controls against OpenCV with the reference's numbers, run-length codes against pycocotools and a plain loop."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fewstep.config import choices
from fewstep.data.controls import Depth, Edge, Keypoint, Seg, Span, Strength, Vis
from fewstep.data.files import keypoints, masks, video
from fewstep.data.files.arrays import write_pickle
from fewstep.toyworld import clips, physics
from fewstep.toyworld.dataset import depth_of_grey, grey_of_depth


@pytest.fixture(scope="module")
def toy() -> clips.Clip:
    return clips.clip(physics.World(height=64, width=64, num_frames=5), 0, 0)


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """Blobs and sharp edges."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)[None]


def test_all_five_can_be_named_in_a_configuration() -> None:
    assert set(choices("control")) == {"edge", "vis", "depth", "seg", "keypoint"}


# ---- edge and vis --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "lower", "upper"),
    [
        ("none", 20, 50),
        ("very_low", 20, 50),
        ("low", 50, 100),
        ("medium", 100, 200),
        ("high", 200, 300),
        ("very_high", 300, 400),
    ],
)
def test_edge_is_canny_with_the_numbers_of_transfer1(toy: clips.Clip, preset: Strength, lower: int, upper: int) -> None:
    edges = Edge(preset)(toy.rgb)
    assert edges.dtype == np.uint8
    for made, frame in zip(edges, toy.rgb, strict=True):
        wanted = cv2.Canny(frame, lower, upper)
        assert all(np.array_equal(made[..., channel], wanted) for channel in range(3))
    if preset == "medium":
        assert 0.01 < (edges > 0).mean() < 0.3


def bicubic(source: int, target: int) -> NDArray[np.float64]:
    """(target, source) weights of Keys' cubic, a = -1/2, widened against aliasing when it shrinks."""
    scale = source / target
    x = np.abs((np.arange(source)[None] + 0.5 - (np.arange(target)[:, None] + 0.5) * scale) / max(scale, 1))
    weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("preset", "small", "bilateral", "factor"),
    [("very_low", 1, (15, 100, 50), 4), ("low", 4, (15, 100, 50), 4), ("medium", 2, (30, 150, 100), 10)],
)
def test_vis_is_bilateral_then_bicubic_down_and_up(
    preset: Strength, small: int, bilateral: tuple[int, int, int], factor: int
) -> None:
    frame = picture(64, 96)[0]
    step = cv2.resize(frame, (96 // small, 64 // small), interpolation=cv2.INTER_AREA) if small > 1 else frame
    step = cv2.bilateralFilter(step, *bilateral)
    step = cv2.resize(step, (96, 64), interpolation=cv2.INTER_LINEAR) if small > 1 else step
    wanted = np.asarray(step, dtype=float)
    for height, width in ((64 // factor, 96 // factor), (64, 96)):
        rows, columns = bicubic(wanted.shape[0], height), bicubic(wanted.shape[1], width)
        wanted = np.clip(np.rint(np.einsum("yi,xj,ijc->yxc", rows, columns, wanted)), 0, 255)
    made = Vis(preset)(frame[None])[0]
    assert np.abs(made - wanted).max() <= 1  # where a half is rounded


def test_stronger_blurs_leave_less_and_none_leaves_all() -> None:
    frames = picture(96, 128)
    left = [float(Vis(preset)(frames).std()) for preset in ("none", "very_low", "medium", "very_high")]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.5 * left[0]
    assert np.abs(Vis("none")(frames).astype(int) - frames).mean() < 1


def test_large_frames_are_looked_at_in_the_size_of_their_bucket() -> None:
    frames = picture(1080, 1920)
    made = Edge("medium")(frames)
    small = cv2.resize(frames[0], (1252, 704), interpolation=cv2.INTER_AREA)  # 704 / 1080 of 1920 is 1251.6
    wanted = cv2.resize(cv2.Canny(small, 100, 200), (1920, 1080), interpolation=cv2.INTER_LINEAR)
    assert made.shape == frames.shape
    assert np.array_equal(made[0, ..., 0], wanted)


def test_frames_too_small_or_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="frames of 8 x 8 are too small for the preset 'high'"):
        Vis("high")(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="must be uint8 T H W 3, not float64"):
        Edge()(np.zeros((1, 8, 8, 3)))  # type: ignore[arg-type]


def test_video_controls_read_windows_at_a_size(tmp_path: Path, toy: clips.Clip) -> None:
    video.write(tmp_path / "a.mp4", toy.rgb, 16, "lossless")
    for control in (Edge(), Vis(), Depth()):
        assert np.array_equal(control.read(tmp_path / "a.mp4", Span(1, 2, 2), (64, 64)), toy.rgb[1:4:2])
        assert control.read(tmp_path / "a.mp4", Span(0, 1), (32, 16)).shape == (1, 32, 16, 3)


def test_depth_comes_back_within_half_a_step_of_grey() -> None:
    near, far = 3.5, 9.4
    depth = np.linspace(near, far, 4096).reshape(1, 64, 64).astype(np.float32)
    grey = grey_of_depth(depth, near, far)
    bound = depth**2 * (1 / near - 1 / far) / 510
    assert (np.abs(depth_of_grey(grey, near, far) - depth) <= 1.02 * bound).all()
    assert grey[0, 0, 0, 0] == 255
    assert grey[0, -1, -1, 0] == 0


# ---- run-length codes ----------------------------------------------------------------------------------------------

# Made once with pycocotools 2.0: encode(asfortranarray(mask.reshape(-1, 1))).
BLOCK = np.zeros((9, 40, 50), dtype=bool)
BLOCK[2:7, 10:30, 5:45] = True
KNOWN = [
    (np.zeros(7, dtype=bool), b"7"),
    (np.ones(7, dtype=bool), b"07"),
    (np.arange(40) % 2 == 0, b"01100000000000000000000000000000000000000"),
    ((np.arange(5000) // 700) % 2 == 1, b"le0le0le00000X]O"),
    (BLOCK, b"i\\4X1:" + b"Xo00hPO".join([b"0" * 37] * 5) + b"_\\4"),
]


def slow_counts(mask: NDArray[np.bool_]) -> bytes:
    """The published rule, one run and one group at a time."""
    runs, now, length = [], False, 0
    for value in mask.reshape(-1).tolist():
        if value != now:
            runs.append(length)
            now, length = value, 0
        length += 1
    runs.append(length)
    text = bytearray()
    for number, run in enumerate(runs):
        left = run - runs[number - 2] if number > 2 else run
        while True:
            group = left & 31
            left >>= 5
            more = left != (-1 if group & 16 else 0)
            text.append(group + 48 + (32 if more else 0))
            if not more:
                break
    return bytes(text)


def decode(code: dict[str, Any]) -> NDArray[np.bool_]:
    """The column of bools that a code stands for, through a file of one object."""
    with tempfile.TemporaryDirectory() as folder:
        path, rle = Path(folder) / "a.pickle", {"data": code, "mask_shape": (1, 1, code["size"][0])}
        write_pickle(path, [{"phrase": "", "segmentation_mask_rle": rle}])
        return masks.read(path)[0].frames([0]).reshape(-1)


@pytest.mark.parametrize(("mask", "counts"), KNOWN)
def test_codes_are_those_of_pycocotools(mask: NDArray[np.bool_], counts: bytes) -> None:
    assert masks.encode(mask) == {"size": [mask.size, 1], "counts": counts}
    assert np.array_equal(decode({"size": [mask.size, 1], "counts": counts}), mask.reshape(-1))
    assert np.array_equal(decode({"size": [mask.size, 1], "counts": counts.decode()}), mask.reshape(-1))  # json's


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12), st.booleans())
def test_any_runs_follow_the_rule_and_come_back(lengths: list[int], first: bool) -> None:
    mask = np.concatenate([np.full(n, (i % 2 == 0) == first) for i, n in enumerate(lengths)] + [np.array([first])])
    code = masks.encode(mask)
    assert code["counts"] == slow_counts(mask)
    assert np.array_equal(decode(code), mask)
    runs = np.diff(np.flatnonzero(np.concatenate([[True], mask[1:] != mask[:-1], [True]])))
    uncompressed = {"size": [mask.size, 1], "counts": ([0] if mask[0] else []) + runs.tolist()}
    assert np.array_equal(decode(uncompressed), mask)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(-3, 10**7))
def test_no_code_crashes_the_decoder(counts: bytes, pixels: int) -> None:
    try:
        mask = decode({"size": [pixels, 1], "counts": counts})
    except ValueError:
        return
    assert mask.shape == (pixels,)


# ---- segmentation --------------------------------------------------------------------------------------------------


def test_masks_come_back_frame_by_frame(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((6, 5, 7)) < 0.4
    masks.write(tmp_path / "a.pickle", [("cup", mask), ("table", ~mask)])
    raw = pickle.loads((tmp_path / "a.pickle").read_bytes())
    assert [row["phrase"] for row in raw] == ["cup", "table"]
    assert raw[0]["segmentation_mask_rle"]["mask_shape"] == (6, 5, 7)
    assert raw[0]["segmentation_mask_rle"]["data"] == masks.encode(mask)
    cup, table = masks.read(tmp_path / "a.pickle")
    assert np.array_equal(cup.frames([4, 0, 5]), mask[[4, 0, 5]])
    assert np.array_equal(table.frames(range(6)), ~mask)
    assert (cup.area, cup.shape) == (mask.sum(), (6, 5, 7))


def test_small_objects_are_painted_over_large_ones_and_keep_their_colour(tmp_path: Path) -> None:
    large, small = np.zeros((3, 8, 8), bool), np.zeros((3, 8, 8), bool)
    large[:, 1:7, 1:7], small[1:, 3:5, 3:5] = True, True
    for pairs in ([("a", large), ("b", small)], [("b", small), ("a", large)]):
        masks.write(tmp_path / "a.pickle", pairs)
        out = Seg().read(tmp_path / "a.pickle", Span(0, 3), (8, 8))
        assert not out[:, 0].any()
        inner, outer = out[1, 3, 3], out[1, 1, 1]
        assert inner.any() and outer.any() and not np.array_equal(inner, outer)
        assert np.array_equal(out[0, 3, 3], outer)
        assert np.array_equal(Seg().read(tmp_path / "a.pickle", Span(1, 1), (8, 8))[0], out[1])
        assert np.array_equal(Seg().read(tmp_path / "a.pickle", Span(1, 1), (16, 16))[0, ::2, ::2], out[1])
    masks.write(tmp_path / "none.pickle", [])
    assert not Seg().read(tmp_path / "none.pickle", Span(0, 3), (8, 8)).any()


def seg_file(path: Path, **changes: Any) -> Path:
    mask = BLOCK[:, :8, :10]
    packed = {"data": masks.encode(mask), "mask_shape": mask.shape} | changes
    path.write_bytes(pickle.dumps([{"phrase": "cup", "segmentation_mask_rle": packed}]))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mask_shape": (8, 10)},
            r"lacks 0.*mask_shape.2\. A segmentation is .*\(frames, height, width\)}}: one code holds the whole clip",
        ),
        ({"data": b"i\\4X1:"}, r"data: must be .*, got b'i.*'size': \[pixels, 1\], 'counts': bytes"),
        (
            {"data": {"size": [8, 10], "counts": b"7"}},
            r"size of its code is \[8, 10\], not \[720, 1\]: the whole clip as one column",
        ),
        ({"data": {"size": [720, 1], "counts": b"7"}}, "do not add up to the 720 pixels"),
        ({"data": {"size": [720, 1], "counts": b"\xff\x00"}}, "not COCO's run-length code"),
        ({"data": {"size": [720, 1], "counts": 7}}, r"counts.*, got 7"),
        ({"mask_shape": (10**9, 10**9, 10**9)}, "size of its code is"),
        ({"mask_shape": None}, "mask_shape: must be a valid tuple, got None"),
    ],
)
def test_other_layouts_of_a_segmentation_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        masks.read(seg_file(tmp_path / "a.pickle", **changes))


def test_a_segmentation_of_fewer_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.pickle: its masks have 9 frames, but frame 9 is wanted"):
        Seg().read(seg_file(tmp_path / "a.pickle"), Span(0, 10), (8, 10))
    (tmp_path / "b.pickle").write_bytes(pickle.dumps({"phrase": "cup"}))
    with pytest.raises(
        ValueError, match=r"must be a valid list, got .* A segmentation is a list with one entry for each object"
    ):
        masks.read(tmp_path / "b.pickle")


# ---- keypoints -----------------------------------------------------------------------------------------------------


def person(**points: tuple[float, float, float]) -> NDArray[np.float16]:
    """COCO-WholeBody with only these points seen."""
    rows = {"nose": 0, "left_shoulder": 5, "right_shoulder": 6, "right_elbow": 8, "left_hand_root": 91, "left_thumb1": 92}
    out = np.zeros((133, 3), dtype=np.float16)
    for name, point in points.items():
        out[rows[name]] = point
    return out


def test_people_are_drawn_as_openpose_does(tmp_path: Path) -> None:
    body = person(
        nose=(0.5, 0.1, 1), left_shoulder=(0.75, 0.5, 0.9), right_shoulder=(0.25, 0.5, 0.7), right_elbow=(0.25, 0.9, 0.3)
    )
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({0: [{"body-keypoints": body, "hand-keypoints": body[91:]}], 1: []}))
    out = Keypoint().read(tmp_path / "a.pickle", Span(0, 2), (704, 704))
    assert not out[1].any()
    # The neck stands between the shoulders; its score is the lower of theirs, here above the threshold.
    assert tuple(out[0, 352, 264]) == (255, 0, 0)  # neck to right shoulder
    assert tuple(out[0, 352, 440]) == (255, 85, 0)  # neck to left shoulder
    assert tuple(out[0, 211, 352]) == (0, 0, 255)  # neck to nose
    assert not out[0, 400:].any()  # the elbow is below the threshold
    weak = person(nose=(0.5, 0.1, 1), left_shoulder=(0.75, 0.5, 0.9), right_shoulder=(0.25, 0.5, 0.5))
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({0: [{"body-keypoints": weak}]}))
    assert not Keypoint().read(tmp_path / "a.pickle", Span(0, 1), (704, 704))[0, 200:330].any()  # no neck, no line


def test_hands_are_taken_from_their_own_rows_where_the_body_has_none(tmp_path: Path) -> None:
    whole = person(left_hand_root=(0.2, 0.2, 1), left_thumb1=(0.8, 0.8, 1))
    drawn = []
    for figure in ({"body-keypoints": whole}, {"body-keypoints": whole[:91], "hand-keypoints": whole[91:]}):
        (tmp_path / "a.pickle").write_bytes(pickle.dumps({0: [figure | {"face-bbox": np.zeros(4)}]}))
        drawn.append(Keypoint().read(tmp_path / "a.pickle", Span(0, 1), (64, 64)))
    assert drawn[0].any()
    assert np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({0: [], 2: []}, r"1 of 3 frames have no entry \(frame 1, ...\)\. Every frame needs one: write an empty list"),
        ({0: [{}], 1: [], 2: []}, r"frame 0: 'body-keypoints' must be an array \(133 or 91, 3\) .* but is nothing"),
        ({0: [{"body-keypoints": np.zeros((17, 3))}], 1: [], 2: []}, r"but is a \(17, 3\)"),
        ({0: [{"body-keypoints": np.full((133, 3), np.nan)}], 1: [], 2: []}, "not finite. Give unseen points the score 0"),
        ({"0": []}, "must be a valid integer, got '0'.* a table from the number of a frame to the list of its figures"),
        ([1], r"must be a valid dictionary, got \[1\]"),
    ],
)
def test_other_layouts_of_keypoints_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=words):
        Keypoint().read(tmp_path / "a.pickle", Span(0, 3), (32, 32))


def test_things_of_the_toy_world_are_drawn_where_they_are(tmp_path: Path) -> None:
    world = physics.World(height=64, width=64, num_frames=5, min_objects=2)
    made = clips.clip(world, 3, 1)
    phrases = [f"{body.colour} {body.shape}" for body in made.scene.bodies]
    keypoints.write_objects(tmp_path / "a.pickle", phrases, made.keypoints)
    raw = keypoints.read_raw(tmp_path / "a.pickle")
    assert sorted(raw) == list(range(5))
    for frame, figures in raw.items():
        assert [figure["phrase"] for figure in figures] == phrases
        assert np.array_equal(np.stack([figure["object-keypoints"] for figure in figures]), made.keypoints[frame])
    drawn = Keypoint().read(tmp_path / "a.pickle", Span(0, 5), (64, 64))
    assert drawn.any()
    near = np.asarray(cv2.dilate((made.segmentation[0] > 0).astype(np.uint8), np.ones((5, 5), np.uint8)))
    assert not drawn[0][near == 0].any()
