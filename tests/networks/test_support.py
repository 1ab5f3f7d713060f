"""`fewstep ls networks`: the matrix of support, at once, and stored plans that are those of `fewstep plan`."""

import json
import subprocess
import sys

import pytest

from fewstep.cli import main
from fewstep.config import compose, read_command
from fewstep.config.types import kind_of
from fewstep.networks.families.published import PUBLISHED
from fewstep.networks.support import PLANS, StoredPlan
from fewstep.training.plan.plan import GIB, measure, mock_batch
from fewstep.training.plan.request import PlanRequest, memory_of, split_words
from fewstep.training.run import Run


def run_of(plan: StoredPlan) -> tuple[Run, PlanRequest]:
    program, verb, *words = plan.command.split()
    assert (program, verb) == ("fewstep", "plan")
    overrides, request = split_words(words)
    return compose(read_command(overrides), Run), request


def test_the_matrix_names_every_model_its_size_its_licence_and_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "networks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for model in PUBLISHED:
        (line,) = [line for line in lines if line.startswith(f"{model.model}  ")]
        assert f"  {model.network}  " in line and f"  {model.size}  " in line and line.endswith(f"  {model.license}")
    for plan in PLANS:
        assert f"  {plan.command}" in lines
        (line,) = [line for line in lines if line.startswith(plan.recipe)]
        assert f"{plan.needed_gib:.2f}" in line
    assert any("check the model card" in line for line in lines)


def test_as_json_it_has_names_models_and_plans(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "networks", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert all(row["about"] for row in rows.values())
    assert {model["model"] for row in rows.values() for model in row["models"]} == {model.model for model in PUBLISHED}
    assert [m["total"] for m in rows["experts"]["models"]] == [2 * 14_288_491_584, 2 * 14_288_901_184]
    for family in ("cosmos", "cosmos_control"):
        assert [p["recipe"] for p in rows[family]["plans"]] == [p.recipe for p in PLANS if p.network == family] != []
    assert rows["tiny"]["models"] == rows["tiny"]["plans"] == []


def test_it_answers_without_torch() -> None:
    code = "import sys; from fewstep.cli import main; main(['ls', 'networks']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.recipe)
def test_a_stored_plan_names_a_run_there_is_and_a_gpu_it_fits(plan: StoredPlan) -> None:
    run, request = run_of(plan)
    assert kind_of(run.networks.teacher or run.networks.student.network) == ("network", plan.network)
    assert ("x".join(map(str, request.shape or ())), request.gpus, request.gpu) == (plan.shape, plan.gpus, plan.gpu)
    assert plan.peak_gib < plan.needed_gib <= memory_of(plan.gpu)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.recipe)
def test_a_stored_plan_is_what_is_planned(plan: StoredPlan) -> None:
    run, request = run_of(plan)
    told = measure(run, mock_batch(run, request.shape, request.text)).on(plan.gpus)
    assert abs(told.peak_gib - plan.peak_gib) < 0.01 and abs(told.needed_gib - plan.needed_gib) < 0.01
    parts = {name: size / GIB for name, size in told.parts.items()}
    for name, gib in plan.largest:
        assert abs(parts[name.replace(" ", ".")] - gib) < 0.01
