"""The first story: one command, and KD and DMD2 recover a known distribution; a method of the user's own does too."""

import json
import re
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
# In fewer iterations, to the same bounds; [] is the whole recipe.
SHORT = {
    "analytic_kd": ["trainer.max_iter=300", "data.num=16384"],
    "analytic_kd_4step": ["trainer.max_iter=400", "data.num=16384"],
    "analytic_dmd2": ["trainer.max_iter=1500"],
    "analytic_dmd2_onestep": [],
    "my_reflow": ["trainer.max_iter=400", "data.num=16384"],
}
STAGES = """
from dataclasses import replace
from fewstep.config import recipe
from fewstep.recipes.analytic import analytic_finetune, analytic_kd

def short(run, name, after, student):
    job, student = replace(run.job, name=name, after=after), replace(run.networks.student, init=student)
    trainer, optim = replace(run.trainer, max_iter=2, batch_size=8), replace(run.optim, warmup_iters=0)
    return replace(run, job=job, networks=replace(run.networks, student=student), trainer=trainer, optim=optim, preview=None)

@recipe("short_first")
def first():
    return short(analytic_finetune(), "short_first", (), "random")

@recipe("short_second")
def second():
    run = analytic_kd()
    run = replace(run, data=replace(run.data, num=64))
    return short(run, "short_second", ("short_first",), "analytic/basic/short_first@latest:student.ema")
"""


@pytest.fixture(scope="module")
def short_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short run of the stage that they all start from."""
    folder = tmp_path_factory.mktemp("short")
    trained(folder, "analytic_finetune", "trainer.max_iter=500")
    return folder


@pytest.fixture(scope="module")
def whole_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def trained(root: Path, name: str, *settings: str) -> Path:
    """The run folder of a recipe; the same command again finds it finished."""
    extra = ["--config", str(ROOT / "examples/my_method.py")] if name == "my_reflow" else []
    assert run(root, "train", *extra, f"experiment={name}", *settings) == 0
    return next(root.glob(f"*/*/{name}"))


def run(root: Path, *words: str) -> int:
    """The exit status of a command whose runs are below `root`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPUT_ROOT", str(root))
        return main(list(words))


def assert_recovers(run: Path, name: str) -> None:
    summary = json.loads((run / "summary.json").read_text())
    after, before = BOUNDS[name]
    assert summary["energy_distance"] <= after, summary
    assert summary["energy_distance_undistilled"] >= before, summary
    assert len(list(run.glob("previews/*.svg"))) >= 2, "a picture of before and one of after"


@pytest.mark.parametrize("name", BOUNDS)
def test_a_recipe_recovers_the_known_distribution(name: str, short_root: Path) -> None:
    assert_recovers(trained(short_root, name, *SHORT[name]), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, settings in SHORT.items() if settings])
def test_so_does_the_whole_recipe(name: str, whole_root: Path) -> None:
    assert_recovers(trained(whole_root, name), name)


def test_a_stage_that_is_not_there_yet_is_trained_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stages.py").write_text(STAGES)
    words = ["train", "--config", str(tmp_path / "stages.py"), "experiment=short_second"]
    assert run(tmp_path, *words) == 0
    assert "short_second starts from short_first, which is not there yet: training it first" in capsys.readouterr().err
    assert {path.parent.name for path in tmp_path.glob("analytic/basic/*/summary.json")} == {"short_first", "short_second"}
    assert run(tmp_path, *words, "trainer.max_iter=3") == 0
    assert "starts from" not in capsys.readouterr().err


def test_the_student_leaves_as_safetensors_and_samples_alike_elsewhere(short_root: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from fewstep.batch import Condition
    from fewstep.config import from_yaml
    from fewstep.diffusion import RectifiedFlow, Rng, samplers
    from fewstep.evaluation import energy_distance
    from fewstep.recipes.analytic import MIXTURE
    from fewstep.training.run import Run

    folder = trained(short_root, "analytic_dmd2", *SHORT["analytic_dmd2"])
    assert main(["export", str(folder), "--out", str(tmp_path / "student")]) == 0
    about = json.loads((tmp_path / "student" / "student.json").read_text())
    sampler = about["sampler"]
    assert about["num_inference_steps"] == 4 and sampler["renoise"] == "fresh" and sampler["path"] == {"kind": "rectified_flow"}
    config = from_yaml(Run, tmp_path / "student" / "config.yaml")
    student = config.networks.student.network.build()
    student.module.load_state_dict(load_file(tmp_path / "student" / "student.safetensors"))
    rng = Rng.of_samples(torch.arange(4096))
    made = samplers.few_step(student, rng.normal((2,)), sampler["times"], Condition(), renoise=sampler["renoise"], rng=rng)
    wanted = MIXTURE.build().sample(Rng(999, 0, torch.arange(4096)))
    assert RectifiedFlow() == student.path
    assert energy_distance(made, wanted) <= 0.02


def test_the_dry_run_of_the_readme_says_all_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That the commands of every document compose, tests/test_docs.py shows."""
    (line,) = re.findall(r"^fewstep (train --dryrun .*?) +#", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert run(tmp_path, *line.split(), "job.name=dry") == 0
    said = capsys.readouterr()
    folder = tmp_path / "analytic/basic/dry"
    assert said.out == (folder / "config.yaml").read_text() and [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert "in each process, at the worst moment" in said.err


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
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, "train", "experiment=analytic_kd", *arguments) == 2
    told = capsys.readouterr().err
    for part in said:
        assert part in told, told
    assert not list(tmp_path.iterdir())


def test_a_path_that_does_not_align_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train", "experiment=analytic_kd_4step", "job.name=misaligned", "data.num=64",
        "networks.student.init=random", "job.after=[]", "data.path_times=[1.0,0.9,0.8,0.6]",
    ]  # fmt: skip
    assert run(tmp_path, *words) == 1
    said = capsys.readouterr().err
    assert "does not align with the stored path" in said and "0.9375" in said and "0.9," in said
