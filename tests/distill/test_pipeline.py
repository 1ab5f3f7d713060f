"""`fewstep pipeline` before anything runs: the commands of its stages, what is refused; and its gates."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
from score_records import record

from fewstep import TOY
from fewstep.cli import main
from fewstep.config import ConfigError, recipes
from fewstep.distill.chains import CHAINS, PipelineRequest
from fewstep.distill.pipeline import _judge, stages
from fewstep.errors import UserError
from fewstep.inference.teacher import teacher_at


def request(folder: Path, name: str = "cosmos_self_forcing", **more: Any) -> PipelineRequest:
    source: dict[str, Any] = {"prompts": folder / "prompts.txt"}
    if CHAINS[name].pairs is None:
        source = {"dataset": folder}
    return PipelineRequest(name, folder / "student", str(TOY), **source | more)


def road(asked: PipelineRequest) -> dict[str, list[str]]:
    return {stage.name: shlex.split(stage.commands[0]) for stage in stages(asked, teacher_at(asked.address))}


@pytest.mark.parametrize("name", CHAINS)
def test_every_stage_follows_from_the_ones_before(name: str, tmp_path: Path) -> None:
    asked = request(tmp_path, name)
    commands, work = road(asked), str(tmp_path / "student.work")
    assert list(commands) == list(asked.chain.stages)
    trainings = [training.name for training in asked.chain.trainings]
    for before, training in zip([None, *trainings], trainings, strict=False):
        words = commands[training]
        recipe = next(word for word in words if word.startswith("experiment=")).partition("=")[2]
        assert recipe in recipes() and words[0] == f"OUTPUT_ROOT={work}" and f"job.name={training}" in words
        source = {None: None, "tf": f"{work}/runs/causal/tf"}.get(before, f"{work}/bridge/student.safetensors")
        assert source is None or any(word.endswith(f"={source}") for word in words), words
    last = trainings[-1]
    assert commands["export"] == ["fewstep", "export", f"{work}/runs/causal/{last}", "--out", str(tmp_path / "student")]
    assert commands["bridge"][2] == f"{work}/runs/causal/{trainings[-2]}"


def test_the_seeds_three_stages_with_its_numbers_and_arguments_for_each(tmp_path: Path) -> None:
    words = ("pairs.num-frames=81", "pairs.precision=bf16", "kd.optim.lr=3e-5", "sf.trainer.max_iter=7", "scores.num=9")
    commands = road(request(tmp_path, processes=8, chunk=2, settings=words))
    pairs = " ".join(commands["pairs"])
    assert pairs.startswith("torchrun --standalone --nproc_per_node=8 -m fewstep pairs")
    assert "--sampler unipc --shift 5 --steps 35 --path-times 0.999,0.937,0.833,0.624 --guidance 3 --num-frames 81" in pairs
    assert pairs.endswith("--precision bf16") and pairs.count("--num-frames") == 1
    assert {"optim.lr=3e-5", "networks.student.causal.chunk=2"} <= set(commands["kd"])
    assert {"trainer.max_iter=7", "networks.student.causal.chunk=2"} <= set(commands["sf"])
    assert commands["sf_scores"][commands["sf_scores"].index("--num") + 1] == "9"
    options = ("pairs.quality=lossless", "pairs.negative=", "pairs.mask-text")
    plain, more = (road(request(tmp_path, settings=settings))["pairs"] for settings in ((), options))
    assert more == [*plain, "--quality", "lossless", "--negative", "", "--mask-text"]  # an empty value, and none


def test_what_is_wrong_is_said_before_anything_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right: dict[str, Any] = {"name": "self_forcing", "out": tmp_path / "s", "teacher": "t", "prompts": tmp_path / "p.txt"}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"prompts": None}, "begins with prompts; give --prompts"),
        ({"dataset": tmp_path}, "has no use for --dataset"),
        ({"teacher": None}, "of which teacher"),
        ({"only": ("foo",)}, "has the stages pairs, kd, kd_scores, bridge, sf"),
        ({"settings": ("kd",)}, "STAGE.KEY=VALUE"),
        ({"settings": ("cd.a=1",)}, "the stages are pairs, kd"),
    )
    for more, text in cases:
        with pytest.raises(ConfigError, match=text):
            PipelineRequest(**right | more)
    assert main(["pipeline", "self_forced", "--out", "s"]) == 2 and "is not one of self_forcing" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a ball\n")
    prompts = str(tmp_path / "p.txt")
    assert main(["pipeline", "toy_self_forcing", "--prompts", prompts, "--out", "s", "--bound", "frechet"]) == 2
    assert "is written SCORE=VALUE" in capsys.readouterr().err


def test_a_gate_prints_both_students_and_ends_where_a_bound_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request(tmp_path, bounds={"frechet": 20.0})
    for name, value in (("kd", 15.0), ("sf", 25.0)):
        record(tmp_path / "student.work" / "scores", name, frechet=value)
    _judge(asked, "kd_scores")
    with pytest.raises(UserError, match=r"sf_scores: frechet is 25, and its bound is 20 \(lower is better\)"):
        _judge(asked, "sf_scores")
    capsys.readouterr()
    _judge(request(tmp_path), "sf_scores")
    shown = capsys.readouterr().out
    assert "15 +- 0.3" in shown and "the student is WORSE than kd" in shown
    with pytest.raises(UserError, match="is no score of"):
        _judge(request(tmp_path, bounds={"fid": 1.0}), "kd_scores")
