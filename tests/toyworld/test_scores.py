"""The record of all scores: its numbers, its cache, its refusals."""

import numpy as np
import pytest
import torch

from fewstep.evaluation.report import Model, Report, page
from fewstep.evaluation.score import Record
from fewstep.toyworld import features, scores
from fewstep.toyworld.clips import Clip
from fewstep.toyworld.clips import clips as rendered
from fewstep.toyworld.legend import LEGEND
from fewstep.toyworld.physics import World
from fewstep.toyworld.scores import Reference, anchors, reference, score

WORLD = World()
NUM = 48


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return rendered(WORLD, 9_200, range(5 * NUM))


@pytest.fixture(scope="module")
def pictures(clips: list[Clip]) -> np.ndarray:
    return np.stack([clip.rgb for clip in clips])


@pytest.fixture(scope="module")
def prompts(clips: list[Clip]) -> list[str]:
    return [clip.caption for clip in clips[:NUM]]


@pytest.fixture(scope="module")
def known(pictures: np.ndarray) -> Reference:
    return reference(pictures[2 * NUM :])


@pytest.fixture(scope="module")
def record(pictures: np.ndarray, prompts: list[str], known: Reference) -> Record:
    return score([pictures[:NUM], pictures[:NUM, :, :, ::-1].copy()], prompts, known, draws=6)


def test_real_clips_score_as_real(record: Record) -> None:
    assert record["adherence"].per_set[0] == 1 and record["count"].value == 1
    assert record["adherence_chance"].value < 0.1
    assert record["direction"].per_set[0] == 1 and record["direction"].per_set[1] < 0.1  # the second set is mirrored
    assert record["direction"].value == pytest.approx(np.mean(record["direction"].per_set))
    assert record["direction"].spread == pytest.approx(np.std(record["direction"].per_set, ddof=1))
    assert record["gravity"].value == pytest.approx(9.81, rel=0.06) and record["gravity"].num > 60
    assert record["gravity_ratio"].value == pytest.approx(1, abs=0.15)
    assert record["precision"].per_set[0] > 0.7 and record["coverage"].per_set[0] > 0.7
    assert record["frechet"].value < record["frechet_plain"].value
    assert record["adherence"].num == 2 * NUM


def test_the_record_is_flat_and_has_a_spread_and_an_n(record: Record) -> None:
    flat = record.flat("teacher")
    assert len(flat) == 3 * len(record.scores)
    for name, value in record.scores.items():
        assert flat[f"{name}_teacher"] == value.value
        assert flat[f"{name}_teacher_n"] == value.num
        assert flat[f"{name}_teacher_spread"] >= 0
    assert "frechet" in record.flat() and record.name == features.name() and record.num_reference == 3 * NUM
    assert record.name in record.table()


def test_too_few_clips_are_called_undetermined(record: Record) -> None:
    assert any("frechet is undetermined: it also takes one in 2.5 of the 48 clips" in note for note in record.notes)


def test_frozen_and_empty_clips_do_not_break_it(pictures: np.ndarray, prompts: list[str], known: Reference) -> None:
    frozen = score(np.repeat(pictures[:NUM, :1], 17, axis=1), prompts, known, draws=4)
    assert frozen["direction"].value == 0 and frozen["flights"].value == 0
    assert np.isnan(frozen["gravity"].value) and np.isnan(frozen["gravity"].spread) and frozen["gravity"].num == 0
    assert frozen["frechet"].value > 20
    grey = score(np.full((NUM, 17, 32, 32, 3), 180, np.uint8), prompts, known, draws=4)
    assert grey["adherence"].value == 0 and grey["permanence"].num == 0
    assert any("exact copies" in note for note in grey.notes)


def test_seed_diversity_of_copies_is_nothing(pictures: np.ndarray, prompts: list[str], known: Reference) -> None:
    copies = np.repeat(pictures[:4, None], 3, axis=1)
    apart = pictures[:12].reshape(4, 3, *pictures.shape[1:])
    made = [score(pictures[:NUM], prompts, known, draws=2, groups=g)["seed_diversity"] for g in (copies, apart)]
    assert made[0].value == pytest.approx(0, abs=1e-4) and made[1].value > 5 and made[1].num == 4
    with pytest.raises(ValueError, match="groups must be"):
        score(pictures[:NUM], prompts, known, draws=2, groups=pictures[:4])


def test_the_reference_is_kept_by_its_content(tmp_path, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reference(pictures[:8], cache=tmp_path)
    assert len(list(tmp_path.glob("toyworld-*.safetensors"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(scores, "_reference", lambda *_: pytest.fail("it was computed again"))
        again = reference(torch.from_numpy(pictures[:8]), cache=tmp_path)
    assert torch.equal(first.features, again.features) and torch.equal(first.pull_px, again.pull_px)
    changed = pictures[:8].copy()
    changed[3, 2, 1, 0, 0] += 1
    assert scores.content_hash(changed) != scores.content_hash(pictures[:8])
    assert scores.content_hash(pictures[:8].reshape(8, 17, 32, 16, 2, 3)[..., 0, :]) != scores.content_hash(pictures[:8])
    other = features.load(features.SHIPPED)
    other.std[0] *= 2
    assert scores.content_hash(pictures[:8], other) != scores.content_hash(pictures[:8])


def test_a_folder_of_videos_is_the_same_as_its_pictures(tmp_path, pictures: np.ndarray) -> None:
    pytest.importorskip("av")
    from fewstep.data.files import video

    folder = tmp_path / "set" / "videos"
    for n in range(4):
        video.write(folder / f"{n:03}.mp4", pictures[n], fps=16, quality="lossless")
    for source in (folder, tmp_path / "set"):
        np.testing.assert_array_equal(scores.read_clips(source).numpy(), pictures[:4])
    before = scores.content_hash(folder)
    assert before == scores.content_hash(tmp_path / "set")
    video.write(folder / "003.mp4", pictures[4], fps=16, quality="lossless")
    assert scores.content_hash(folder) != before
    with pytest.raises(ValueError, match="no such folder"):
        scores.read_clips(tmp_path / "nothing")


def test_a_set_that_does_not_match_its_prompts_is_refused(pictures: np.ndarray, prompts: list[str], known: Reference) -> None:
    with pytest.raises(ValueError, match=r"48 prompts, but sets of \[47\] clips"):
        score([pictures[:NUM], pictures[: NUM - 1]], prompts, known)


def test_anchors_have_the_faults_they_are_named_for() -> None:
    made = {anchor.name: anchor for anchor in anchors(WORLD, 9_300, 18)}
    real = made["real"].clips
    assert all(anchor.clips.shape == real.shape and len(anchor.captions) == 18 for anchor in made.values())
    np.testing.assert_array_equal(made["time reversed"].clips[:, ::-1], real)
    np.testing.assert_array_equal(made["adjacent frames swapped"].clips[:, [1, 0, 16]], real[:, [0, 1, 16]])
    assert np.ptp(made["frozen"].clips.astype(int), axis=1).max() == 0
    np.testing.assert_array_equal(made["gravity x2"].clips[:, 0], real[:, 0])
    collapsed = made["16 scenes, jitter 0.15 m"]
    assert collapsed.captions[16] == collapsed.captions[0] and not np.array_equal(collapsed.clips[16], collapsed.clips[0])
    np.testing.assert_array_equal(made["mean of two clips"].clips[1], (real[0].astype(int) + real[1]) // 2)


def test_every_score_is_explained_and_goes_into_a_report_as_it_is(record: Record) -> None:
    assert set(record.scores) | {"seed_diversity"} == {score.name for score in LEGEND}
    text = page(Report("t", models=[Model("real", "real clips", scores=record.scores)], scores=LEGEND))
    assert f'value="{record["recall"].value!r}" data-of="real clips|recall"' in text
