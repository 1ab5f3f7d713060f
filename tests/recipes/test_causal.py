"""FastGen's causal stages: published numbers, and every toy twin trains."""

from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.config import build_recipe, check
from fewstep.methods import CausalKD, SelfForcing
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint

TOYS = [f"{family}_{stage}_toy" for family in ("CosmosPredict2", "WanT2V") for stage in ("kd_causal", "sf")]


@pytest.mark.parametrize(("family", "span", "guidance", "lr"), [("CosmosPredict2", 24, 3.0, 1e-5), ("WanT2V", 21, 5.0, 5e-6)])
def test_the_published_numbers(family: str, span: int, guidance: float, lr: float) -> None:
    kd, sf = (build_recipe(f"{family}_{stage}") for stage in ("kd_causal", "sf"))
    assert not check(kd) and not check(sf)
    assert isinstance(kd.method, CausalKD) and isinstance(sf.method, SelfForcing) and sf.method.gan is not None
    assert kd.method.t_list == sf.method.student.t_list == (0.999, 0.937, 0.833, 0.624)
    assert (sf.method.guidance, sf.method.gan.weight, sf.optim.lr, sf.networks.student.causal.span) == (
        guidance,
        0.003,
        lr,
        span,
    )
    assert sf.networks.student.init == f"fastgen/{family}/{family}_kd_causal@latest:student"


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_the_toy_twins_are_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"experiment={name}", "shape=4x6x4x4", "text=8x16"]) == 0
    assert "fits h100" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", TOYS)
def test_the_toy_twins_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    run = build_recipe(name)
    assert not check(run)
    trainer = replace(run.trainer, max_iter=3, log_every=1)
    assert train(replace(run, trainer=trainer, checkpoint=Checkpoint(3)))["step"] == 3
