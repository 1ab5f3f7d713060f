"""The first story: one command, and KD and DMD2 recover a known distribution; a method of the user's own does too."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("document", ["README.md", "docs/configuration.md"])
def test_the_commands_of_a_document_are_understood(document: str, output_root: Path) -> None:
    """Every `fewstep train` and torchrun line composes (--dryrun); `ls` lines run. The training itself is shown above."""
    text = (ROOT / document).read_text()
    lines = [
        line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()
    ]
    known = [line for line in lines if line.startswith(("fewstep train", "fewstep ls", "torchrun")) and "NAME" not in line]
    for line in known:
        words = re.sub(r"^torchrun .*-m fewstep.train", "fewstep train", line).split()
        if "FILE.py" in line or "..." in line or words[2:3] == ["run.yaml"]:
            continue
        extra = ["--dryrun"] if words[1] == "train" and "--dryrun" not in words else []
        done = fewstep(output_root, *words[1:], *extra)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert document != "README.md" or len(known) >= 7


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
def test_bad_input_is_one_clear_message(arguments: list[str], said: list[str], output_root: Path) -> None:
    done = fewstep(output_root, "train", "experiment=analytic_kd", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in said:
        assert part in done.stderr, done.stderr


def test_a_path_that_does_not_align_is_refused_before_training(output_root: Path) -> None:
    done = fewstep(
        output_root, "train", "experiment=analytic_kd_4step", "job.name=misaligned", "data.num=64",
        "networks.student.init=random", "job.after=[]", "data.path_times=[1.0,0.9,0.8,0.6]",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not align with the stored path" in done.stderr and "0.9375" in done.stderr and "0.9," in done.stderr
