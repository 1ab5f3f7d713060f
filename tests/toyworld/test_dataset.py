"""The toy world on disk: what was rendered is what a data set reads, and a killed command goes on to the same bytes."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep
from fewstep import cli
from fewstep.data.controls import Edge, Vis
from fewstep.data.files import keypoints, masks, video
from fewstep.networks.encoders.words import open_words
from fewstep.toyworld import clips, scenes
from fewstep.toyworld.dataset import PARTS, depth_of_grey, depth_range_m, stem_of, write
from fewstep.toyworld.physics import World

WORLD = World(num_frames=9)
FILMS, PICKLES = ("videos", "edge", "vis", "depth"), ("t5_xxl", "seg", "keypoint")
SEEDS = {"metas": ".txt"} | dict.fromkeys(FILMS, ".mp4") | dict.fromkeys(PICKLES, ".pickle")  # their folder layout
NUM, SEED = 5, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "set"
    assert write(out, NUM, SEED, WORLD) == NUM
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_part_of_every_clip_is_what_was_rendered(folder: Path) -> None:
    near, far = depth_range_m(WORLD)
    for index in range(NUM):
        made, stem = clips.clip(WORLD, SEED, index), stem_of(index)
        clip = video.read(folder / "videos" / f"{stem}.mp4")
        assert np.array_equal(clip.frames, made.rgb)  # lossless: PSNR is infinite
        assert clip.fps == WORLD.fps
        assert (folder / "metas" / f"{stem}.txt").read_text() == made.caption + "\n"
        assert np.array_equal(video.read(folder / "edge" / f"{stem}.mp4").frames, Edge("medium")(made.rgb))
        assert np.array_equal(video.read(folder / "vis" / f"{stem}.mp4").frames, Vis("very_low")(made.rgb))
        depth = depth_of_grey(video.read(folder / "depth" / f"{stem}.mp4").frames, near, far)
        assert (made.depth >= near - 1e-4).all() and (made.depth <= far + 1e-4).all()  # so that nothing is clipped
        assert np.abs(depth - made.depth).max() < 0.03  # m, at the wall; half a step of grey
        found = masks.read(folder / "seg" / f"{stem}.pickle")
        assert [mask.phrase for mask in found] == [f"{body.colour} {body.shape}" for body in made.scene.bodies]
        for number, mask in enumerate(found):
            assert np.array_equal(mask.frames(range(WORLD.num_frames)), made.segmentation == number + 1)
        points = keypoints.read_raw(folder / "keypoint" / f"{stem}.pickle")
        assert np.array_equal([[one["object-keypoints"] for one in points[t]] for t in range(9)], made.keypoints)


def test_segmentation_has_the_exact_layout_of_transfer1(folder: Path) -> None:
    rows = pickle.loads((folder / "seg" / "clip_000000.pickle").read_bytes())
    for row in rows:
        assert set(row) == {"phrase", "segmentation_mask_rle"}
        assert set(row["segmentation_mask_rle"]) == {"data", "mask_shape"}
        assert row["segmentation_mask_rle"]["mask_shape"] == (9, 32, 32)
        assert row["segmentation_mask_rle"]["data"]["size"] == [9 * 32 * 32, 1]
        assert isinstance(row["segmentation_mask_rle"]["data"]["counts"], bytes)


def test_the_index_tells_the_world_and_what_is_in_each_clip(folder: Path) -> None:
    told = json.loads((folder / "toyworld.json").read_text())
    assert (told["num"], told["seed"], told["world"]["num_frames"], len(told["clips"])) == (NUM, SEED, 9, NUM)
    for index, label in enumerate(told["clips"]):
        scene = scenes.specification(WORLD, SEED, index)
        assert (label["index"], label["stem"]) == (index, stem_of(index))
        assert label["caption"] == (folder / "metas" / f"{stem_of(index)}.txt").read_text().strip()
        assert [(o["shape"], o["colour"], tuple(o["position"])) for o in label["objects"]] == [
            (b.shape, b.colour, b.position) for b in scene.bodies
        ]


def test_a_rerun_makes_only_what_is_missing_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    before = content(folder)
    assert write(folder, NUM, SEED, WORLD) == 0
    (folder / "depth" / "clip_000001.mp4").unlink()
    (folder / "metas" / "clip_000004.txt").unlink()
    (folder / "toyworld.json").write_text((folder / "toyworld.json").read_text().split('"clips"')[0] + '"clips": []}')
    assert write(folder, NUM, SEED, WORLD) == 2
    assert content(folder) == before
    assert write(tmp_path / "grown", 2, SEED, WORLD) == 2
    assert write(tmp_path / "grown", NUM, SEED, WORLD) == NUM - 2
    assert content(tmp_path / "grown") == before


def test_a_refused_seed_leaves_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--seed must not be negative, as -1 is"):
        write(tmp_path / "set", 1, -1, WORLD)
    assert write(tmp_path / "set", 1, 1, WORLD) == 1


def test_captions_are_embedded_by_the_shipped_encoder(folder: Path, tmp_path: Path) -> None:
    """Told by the weights alone: padded or not, the embedding of a caption is what its network puts out."""
    out = tmp_path / "set"
    assert write(out, 3, SEED, WORLD, only=["t5_xxl"], encoder=fewstep.TOY) == 3
    assert sorted(path.name for path in out.iterdir()) == ["metas", "t5_xxl", "toyworld.json"]
    model = open_words(fewstep.TOY / "text_encoder").module
    for index in range(3):
        name = stem_of(index)
        caption = (folder / "metas" / f"{name}.txt").read_text()
        assert (out / "metas" / f"{name}.txt").read_text() == caption
        words = re.findall(r"[a-z]+|[.,]", caption.lower())
        with torch.no_grad():
            wanted = model(torch.tensor([[2 + model.config.words.index(word) for word in words]]))[0]
        (found,) = pickle.loads((out / "t5_xxl" / f"{name}.pickle").read_bytes())
        assert found.dtype == np.float16
        assert found.shape == wanted.shape
        assert np.abs(found - wanted.numpy()).max() < 2e-3  # half a bit of float16 at 2 to 4
    before = content(out)
    assert write(out, 3, SEED, WORLD, only=["t5_xxl"], encoder=fewstep.TOY) == 0
    assert content(out) == before
    assert write(out, 4, SEED, WORLD, only=["videos"], encoder=fewstep.TOY) == 4
    assert not (out / "t5_xxl" / "clip_000003.pickle").exists()


def test_an_encoder_that_is_none_is_refused_before_anything_is_rendered(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no text encoder at .*empty: it has no config\.json"):
        write(tmp_path / "set", 1, SEED, WORLD, encoder=tmp_path / "empty")
    assert not (tmp_path / "set").exists()


def test_worker_processes_change_nothing(folder: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "set", NUM, SEED, WORLD, workers=2) == NUM
    assert content(tmp_path / "set") == content(folder)


def test_another_series_is_never_mixed_in(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds clips of another seed\. Choose another --out"):
        write(folder, NUM, SEED + 1, WORLD)
    with pytest.raises(ValueError, match="holds clips of another seed and world"):
        write(folder, NUM, SEED + 1, World())
    with pytest.raises(ValueError, match="was begun with --num 5"):
        write(folder, NUM - 1, SEED, WORLD)
    with pytest.raises(ValueError, match="--num must be at least 1"):
        write(folder, 0, SEED, WORLD)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty and has no toyworld\.json"):
        write(tmp_path, NUM, SEED, WORLD)
    (tmp_path / "toyworld.json").write_text("{")
    with pytest.raises(ValueError, match=r"toyworld\.json: damaged"):
        write(tmp_path, NUM, SEED, WORLD)


def test_killed_and_run_again_it_is_as_if_nothing_had_happened(folder: Path, tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from fewstep.toyworld.physics import World; from fewstep.toyworld.dataset import write;"
        f"write(Path({str(tmp_path / 'set')!r}), {NUM}, {SEED}, World(num_frames=9))"
    )
    running = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not list((tmp_path / "set").glob("metas/clip_000001.txt")) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    made = sum(all((tmp_path / "set" / p.folder / f"{stem_of(i)}{p.suffixes[0]}").is_file() for p in PARTS) for i in range(NUM))
    assert 1 <= made < NUM
    for path in (tmp_path / "set" / "videos").glob("*.mp4"):  # what is half-written ends in .partial
        video.probe(path)
    assert write(tmp_path / "set", NUM, SEED, WORLD) == NUM - made
    assert content(tmp_path / "set") == content(folder)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "prepare",
        "toyworld",
        "--out",
        str(tmp_path / "set"),
        "--num",
        "2",
        "--seed",
        "1",
        *("--height", "16", "--width", "16"),
        "--workers",
        "0",
    ]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'set'}: 2 clips, 2 of them new\n"
    assert video.probe(tmp_path / "set" / "videos" / "clip_000001.mp4").size == (16, 16)
    told = {part: sorted(path.name for path in (tmp_path / "set" / part).glob("clip_*")) for part in SEEDS}
    assert told == {part: [f"clip_00000{n}{suffix}" for n in range(2)] for part, suffix in SEEDS.items()}
    assert cli.main([*words[:-6], "--height", "32", "--width", "32"]) == 1
    assert "holds clips of another world" in capsys.readouterr().err

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.toyworld.dataset.write", interrupt)
    assert cli.main(words) == 1
    assert capsys.readouterr().err.strip() == "fewstep: aborted"
