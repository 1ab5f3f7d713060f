"""Intervals of differences between two models, against the experiment repeated with fresh prompts, noises and real clips."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from score_records import record

from fewstep.evaluation.bootstrap import REAL, half_sampled, halves, student_quantile
from fewstep.evaluation.compare import COVERS, WIDE, Difference, compare, table
from fewstep.evaluation.feature_set import FeatureSet, Scale
from fewstep.evaluation.feature_set import compare as compare_sets
from fewstep.evaluation.frechet import Remembered, frechet_extrapolated
from fewstep.evaluation.mmd import mmd_of_subsets
from fewstep.evaluation.score import Record, Value, over_sets

torch.set_num_threads(1)
DIMS = 3
Floats = NDArray[np.float64]
Scoring = Callable[[Floats, Floats], Record]  # of the features of one set of clips, and of the real clips


@dataclass(frozen=True)
class World:
    """Two models whose features are Gaussian about `shift_a` on one axis and `shift_b` on another; the real ones about 0.

    Half of the variance is the prompt's, the same in all sets. `own` is the share of either half that the models do not share.
    """

    shift_a: float
    shift_b: float
    own: float
    num: int = 40
    sets: int = 2
    num_real: int = 80

    def experiment(self, rng: np.random.Generator) -> tuple[Floats, list[Floats], list[Floats]]:
        """Features of fresh real clips, and of both models in each set."""
        shared = rng.normal(size=(self.num, DIMS)) + rng.normal(size=(self.sets, self.num, DIMS))
        models = [rng.normal(size=(self.num, DIMS)) + rng.normal(size=shared.shape) for _ in "ab"]
        a, b = (math.sqrt((1 - self.own) / 2) * shared + math.sqrt(self.own / 2) * model for model in models)
        a[..., 0] += self.shift_a
        b[..., 1] += self.shift_b
        return rng.normal(size=(self.num_real, DIMS)), list(a), list(b)


def few_scores(rows: Floats, real: Floats) -> Record:
    """A score of each clip, which some clips do not have; the MMD of the set; and a set score as a user writes one."""
    everything = torch.arange(len(rows)), torch.arange(len(real))
    parts = zip(halves(len(rows), 20), halves(len(real), 20, REAL), strict=True)
    whole, *some = mmd_of_subsets(rows, real, [everything, *parts])
    lengths = np.where(rows[:, 2] > 1.5, math.nan, np.square(rows).sum(axis=1))
    scores = {
        "mmd": Value.of_draws(whole, some, len(rows)),
        "median": half_sampled(lambda part: float(np.median(np.abs(part[:, :2]))), rows),
        "length": Value(float(np.nanmean(lengths)), float(np.nanstd(lengths)) / len(rows) ** 0.5, len(rows)),
    }
    return Record("few", scores, per_clip={"length": lengths.tolist()})


def all_scores(rows: Floats, real: Floats) -> Record:
    """Everything of `--scorer clips`, and the extrapolated distance of the toy world."""
    own, other = FeatureSet(), FeatureSet()
    own.update(torch.tensor(rows)[:, None], range(len(rows)))
    other.update(torch.tensor(real)[:, None], range(len(real)))
    scores = dict(compare_sets(own, other, Scale.none(DIMS)).scores)
    del scores["frechet_bias"]
    ours, theirs = torch.tensor(rows), torch.tensor(real)
    parts = [(ours, theirs), *zip((ours[h] for h in halves(len(ours), 20)), (theirs[h] for h in halves(len(theirs), 20, REAL)))]
    whole, *some = [frechet_extrapolated(x, Remembered(y), scales=(1.0, 1.5, 2.0), draws=4).value for x, y in parts]
    return Record("all", scores | {"extrapolated": Value.of_draws(whole, some, len(rows))})


def written(folder: Path, name: str, sets: Sequence[Record], keeps: bool = True) -> Path:
    """A file of scores as `fewstep evaluate` writes it, or as it did before it kept what pairs them."""
    values = {score: over_sets([one[score] for one in sets]) for score in sets[0].scores}
    entries = {score: value._asdict() | {"draws": value.draws if keeps else []} for score, value in values.items()}
    legend = [{"name": score, "title": score, "meaning": "", "better": "lower", "is_headline": True} for score in values]
    columns = [{"per_clip": {k: [x if x == x else None for x in column] for k, column in one.per_clip.items()}} for one in sets]
    more = {"scores": entries, "sets": columns if keeps else [{"per_clip": {}}] * len(sets), "legend": legend}
    return record(folder, name, more)


def repeated(world: World, scoring: Scoring, num: int, folder: Path, keeps: bool = True) -> dict[str, list[Difference]]:
    """What `--compare` says of each score, in `num` experiments."""
    rng = np.random.default_rng(0)
    out: dict[str, list[Difference]] = {}
    for _ in range(num):
        real, *models = world.experiment(rng)
        files = [
            written(folder, n, [scoring(rows, real) for rows in sets], keeps) for n, sets in zip("ab", models, strict=True)
        ]
        for row in compare(files):
            out.setdefault(row.score, []).append(row)
    return out


def share_that_holds(rows: Sequence[Difference], truth: float) -> float:
    return statistics.mean(row.low <= truth <= row.high for row in rows)


def reach(rows: Sequence[Difference]) -> float:
    return statistics.mean((row.high - row.low) / 2 for row in rows)


def least(num: int) -> float:
    """What 95 of 100 is at least in `num` tries, but for one time in two hundred."""
    return 0.95 - 2.58 * math.sqrt(0.95 * 0.05 / num)


def true_reach(rows: Sequence[Difference]) -> float:
    """What holds the truth in 95 of 100 experiments, known from all of them."""
    return 1.96 * statistics.stdev(row.difference for row in rows)


def test_equal_models_differ_one_time_in_twenty_and_their_intervals_are_narrower_than_independent_ones(tmp_path: Path) -> None:
    world, num = World(0.7, 0.7, own=0.2), 120
    rows = repeated(world, few_scores, num, tmp_path)
    single = repeated(world, few_scores, 12, tmp_path, keeps=False)
    assert [(name, some[0].how) for name, some in rows.items()] == [
        ("mmd", "same halves"),
        ("median", "same halves"),
        ("length", "clip by clip"),
    ]
    for name, some in rows.items():
        assert {row.how for row in single[name]} == {"independent"}
        assert share_that_holds(some, 0.0) >= least(num), name
        assert 0.9 * true_reach(some) < reach(some) < 1.4 * true_reach(some), name
        # MMD differs mostly by the real clips, which is on both sides: the models err in different directions.
        assert reach(some) < {"mmd": 0.95, "median": 0.8, "length": 0.7}[name] * reach(single[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("own", [0.2, 1.0])
@pytest.mark.parametrize("shift_b", [0.7, 1.1])
def test_intervals_hold_the_truth_as_often_as_they_claim(shift_b: float, own: float, tmp_path: Path) -> None:
    """For models that share their noise or nothing, equal or not: at least 95 of 100, and less than twice as wide as needed."""
    num = 200
    few = repeated(World(0.7, shift_b, own), few_scores, num, tmp_path)
    everything = few | repeated(World(0.7, shift_b, own), all_scores, num, tmp_path)
    for name, rows in everything.items():
        truth = 0.0 if shift_b == 0.7 else statistics.mean(row.difference for row in rows)
        assert share_that_holds(rows, truth) >= least(num), name
        assert reach(rows) < 2 * true_reach(rows), name


@pytest.mark.slow
def test_few_clips_are_judged_with_care(tmp_path: Path) -> None:
    num = 400
    for name, rows in repeated(World(0.7, 0.7, own=0.2, num=8, sets=1), few_scores, num, tmp_path).items():
        assert share_that_holds(rows, 0.0) >= least(num), name


def test_as_real_scores_are_compared_by_their_distance_on_the_side_on_which_they_are(tmp_path: Path) -> None:
    """b lies as far above the real value as a below: paired values that rise together are then paired with opposite signs."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=200)
    files = [record(tmp_path, name) for name in "ab"]
    legend = [
        {"name": name, "title": "", "meaning": "", "better": "as real", "is_headline": True} for name in ("each", "whole")
    ]
    for file, shift in zip(files, (-2.0, 2.5), strict=True):
        values = shift + noise
        draws = [float(values[half].mean()) for half in halves(200, 400)]
        entry = {"value": float(values.mean()), "spread": 0.1, "num": 200}
        content = {
            "what": "", "protocol": {}, "legend": legend, "sets": [{"per_clip": {"each": values.tolist()}}],
            "scores": {"each": entry, "whole": entry | {"draws": draws}},
            "anchors": {"real": {"each": {"value": 0.0}, "whole": {"value": 0.0}}},
        }  # fmt: skip
        file.write_text(json.dumps(content))
    error = 2 * noise.std(ddof=1) / 200**0.5  # of |b| - |a| = 0.5 + 2 noise
    for row in compare(files):
        assert row.difference == pytest.approx(0.5 + 2 * noise.mean())
        assert row.high - row.difference == pytest.approx(1.97 * error, rel=0.1 if row.score == "whole" else 0.01), row.how


def test_files_of_before_are_compared_as_independent_and_that_is_said(tmp_path: Path) -> None:
    real, a, b = World(0.7, 0.7, own=0.2).experiment(np.random.default_rng(0))
    new = [written(tmp_path, name, [few_scores(rows, real) for rows in sets]) for name, sets in (("a", a), ("b", b))]
    old = written(tmp_path, "old", [few_scores(rows, real) for rows in b], keeps=False)
    assert {row.how for row in compare([new[0], old])} == {"independent"}
    assert WIDE in table(compare([new[0], old])) and WIDE not in table(compare(new))
    assert all(COVERS in table(compare(files)) for files in (new, [new[0], old]))


def test_draws_that_were_not_all_measured_pair_nothing() -> None:
    part = Value.of_draws(1.0, [1.0, math.nan, 2.0], 5)
    assert part.draws == () and part.spread == pytest.approx(0.5**0.5)
    whole = Value.of_draws(3.0, [2.0, 4.0, 6.0], 5)
    assert over_sets([whole, whole._replace(value=5.0, draws=(4.0, 6.0, 5.0))]).draws == (3.0, 5.0, 5.5)
    assert over_sets([whole, part]).draws == () and over_sets([whole, Value(math.nan)]).draws == whole.draws


def test_quantiles_of_few_degrees_of_freedom() -> None:
    stats = pytest.importorskip("scipy.stats")
    for dof in (2, 3, 5.5, 9, 19, 1000):
        assert student_quantile(dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=0.01 if dof < 3 else 0.002)
