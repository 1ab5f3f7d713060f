"""Consistency models and flow maps learn the known distribution; a flow map gets better with every step it is given."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fewstep.batch import Condition
from fewstep.cli import main
from fewstep.diffusion import Rng
from fewstep.evaluation import energy_distance
from fewstep.inference.model import open_model
from fewstep.recipes.analytic import MIXTURE

pytestmark = pytest.mark.slow

ONE, TWO = 0.05, 0.02  # largest energy distance of one step, and of two
BOUNDS = {
    "analytic_consistency": ONE,
    "analytic_tcm": ONE,
    "analytic_scm": TWO,
    "analytic_rcm": TWO,
    "analytic_meanflow": TWO,
    "analytic_flow_map": TWO,
    "analytic_flow_map_on_policy": TWO,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the stage they all start from is trained once."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("name", BOUNDS)
def test_a_recipe_recovers_the_known_distribution(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    assert main(["train", f"experiment={name}"]) == 0
    summary = json.loads((root / "analytic" / "basic" / name / "summary.json").read_text())
    assert summary["energy_distance"] <= BOUNDS[name], summary


def test_a_flow_map_rises_with_its_steps(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, 2, 4, 8, 16 jumps of one student: never worse by more than the noise of the number, and in the end the teacher's."""
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    assert main(["train", "experiment=analytic_flow_map"]) == 0
    model = open_model(f"{root}/analytic/basic/analytic_flow_map")
    data = MIXTURE.build().sample(Rng(77, 0, range(4096)))
    distances = []
    for num in (1, 2, 4, 8, 16):
        rng = Rng(1234, 0, range(4096))
        with torch.no_grad():
            samples = model.sampler.with_steps(num)(model.network, rng.normal((2,)), Condition(), rng)
        distances.append(float(energy_distance(samples.float(), data)))
    noise = 1e-3
    assert all(later < earlier + noise for earlier, later in pairwise(distances)), distances
    assert distances[0] <= ONE and distances[1] <= TWO and distances[-1] <= 0.005, distances
