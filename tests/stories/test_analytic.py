"""The first story: one command, and KD and DMD2 recover a known distribution; a method of the user's own does too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli import main

ROOT = Path(__file__).parents[2]

# Largest energy distance after, smallest before (undistilled, at the same number of calls). The squared form, unbiased.
BOUNDS = {
    "analytic_kd": (0.02, 0.15),
    "analytic_kd_4step": (0.02, 0.15),
    "analytic_dmd2": (0.02, 0.15),
    "analytic_dmd2_onestep": (0.03, 0.15),
    "my_reflow": (0.02, 0.15),
}


@pytest.fixture(scope="module")
def output_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that the stage they all start from is trained once."""
    return tmp_path_factory.mktemp("checkpoints")


def fewstep(output_root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fewstep", *arguments]
    environment = os.environ | {"OUTPUT_ROOT": str(output_root)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def trained(output_root: Path, name: str) -> Path:
    """The run folder of a recipe; the same command again finds it finished."""
    extra = ["--config", "examples/my_method.py"] if name == "my_reflow" else []
    done = fewstep(output_root, "train", *extra, f"experiment={name}")
    assert done.returncode == 0, done.stderr
    return next(output_root.glob(f"*/*/{name}"))


@pytest.mark.parametrize("name", BOUNDS)
def test_a_recipe_recovers_the_known_distribution(name: str, output_root: Path) -> None:
    run = trained(output_root, name)
    summary = json.loads((run / "summary.json").read_text())
    after, before = BOUNDS[name]
    assert summary["energy_distance"] <= after, summary
    assert summary["energy_distance_undistilled"] >= before, summary
    assert len(list(run.glob("previews/*.svg"))) >= 2, "a picture of before and one of after"


def test_the_student_leaves_as_safetensors_and_samples_alike_elsewhere(output_root: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from fewstep.batch import Condition
    from fewstep.config import from_yaml
    from fewstep.diffusion import RectifiedFlow, Rng, samplers
    from fewstep.evaluation import energy_distance
    from fewstep.recipes.analytic import MIXTURE
    from fewstep.training.run import Run

    run = trained(output_root, "analytic_dmd2")
    done = fewstep(output_root, "export", str(run), "--out", str(tmp_path / "student"))
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "student" / "student.json").read_text())
    assert about["num_inference_steps"] == 4 and about["renoise"] == "fresh" and about["path"] == {"kind": "rectified_flow"}
    config = from_yaml(Run, tmp_path / "student" / "config.yaml")
    student = config.networks.student.network.build()
    student.module.load_state_dict(load_file(tmp_path / "student" / "student.safetensors"))
    rng = Rng.of_samples(torch.arange(4096))
    made = samplers.few_step(student, rng.normal((2,)), about["times"], Condition(), renoise=about["renoise"], rng=rng)
    wanted = MIXTURE.build().sample(Rng(999, 0, torch.arange(4096)))
    assert RectifiedFlow() == student.path
    assert energy_distance(made, wanted) <= 0.02


def test_the_dry_run_of_the_readme_says_all_and_trains_nothing(output_root: Path) -> None:
    """That the commands of every document compose, tests/test_docs.py shows."""
    (line,) = re.findall(r"^fewstep (train --dryrun .*?) +#", (ROOT / "README.md").read_text(), re.MULTILINE)
    done = fewstep(output_root, *line.split(), "job.name=dry")
    assert done.returncode == 0, done.stderr
    folder = output_root / "analytic/basic/dry"
    assert done.stdout == (folder / "config.yaml").read_text() and [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert "on each GPU, at the worst moment" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["trainer.maxiter=3", "trainer.lr=1", "methd=kd", "optim.lrr=2", "data.nun=3"],
            ["did you mean trainer.max_iter?", "did you mean optim.lr?", "did you mean method?", "data.num?", "trainer.lr"],
        ),
        (["trainer.max_iter=abc", "optim.lr=fast"], ["trainer.max_iter: expected int", "optim.lr: expected"]),
        (["optim.lr=0"], ["optim.lr: is 0.0", "train nothing"]),
        (["method.t_list=[1.0,0.5]"], ["method.t_list: has 2 times for student_sample_steps=1"]),
        (["method.student_sample_steps=2", "method.t_list=[1.0,0.5]"], ["needs path, path_times", "data=teacher_pairs"]),
        (["optim.warmup_iters=99999"], ["optim.warmup_iters: is 99999, longer than the run"]),
    ],
    ids=["five wrong keys", "wrong types", "lr 0", "t_list", "missing batch field", "warm-up"],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str],
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    assert main(["train", "experiment=analytic_kd", *arguments]) == 2
    told = capsys.readouterr().err
    for part in said:
        assert part in told, told
    assert not list(tmp_path.iterdir())


def test_a_path_that_does_not_align_is_refused_before_training(output_root: Path) -> None:
    done = fewstep(
        output_root, "train", "experiment=analytic_kd_4step", "job.name=misaligned", "data.num=64",
        "networks.student.init=random", "job.after=[]", "data.path_times=[1.0,0.9,0.8,0.6]",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not align with the stored path" in done.stderr and "0.9375" in done.stderr and "0.9," in done.stderr
