"""The demo's commands are those of `fewstep distill`, with the settings of the toy world's own recipes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from fewstep import TOY
from fewstep.cli import main
from fewstep.config.command import compose, read_command
from fewstep.distill.facts import Facts, facts_of
from fewstep.distill.stages import Stage, marker_of
from fewstep.files import write_json
from fewstep.inference.model import changed, open_model
from fewstep.inference.request import SamplerOptions
from fewstep.toyworld.demo import demo
from fewstep.toyworld.demo.stages import GUIDANCE, PLANS, STEPS, STUDENTS, request, stages, students
from fewstep.toyworld.recipes import TEACHER
from fewstep.training.run import Run

SAME = ("method", "optim", "critic_optim", "head_optim", "ema", "trainer", "checkpoint", "parallel")  # not what only watches
SIZES = (
    "latent_channels",
    "num_heads",
    "head_dim",
    "num_layers",
    "text_dim",
    "adaln_lora_dim",
    "max_size",
    "rope_scale",
    "padding_mask",
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    out = tmp_path_factory.mktemp("demo")
    for name in ("world", "heldout"):
        words = ["--num", "2", "--seed", "1", "--workers", "0", "--only", "videos,metas"]
        assert main(["prepare", "toyworld", "--out", str(out / name), *words]) == 0
    return facts_of(request(out, "default", str(TOY), "4step"))


def trainings(facts: Facts) -> dict[str, Run]:
    """The runs of the demo by the names of the toy world's recipes."""
    stages = {stage.name: stage for stage in students(facts.request.work_dir, "default", facts)}
    runs: dict[str, Run] = {}
    for training in ("kd", "dmd2"):
        for (command,), student in zip(stages[training].lanes, STUDENTS, strict=True):
            assert command[1:3] == ("fewstep", "train")
            runs[f"toy_{training}_{student}"] = compose(read_command(list(command[3:])), Run)
    return runs


def test_each_training_is_that_of_the_toy_worlds_recipe(facts: Facts) -> None:
    plan = PLANS["default"]
    runs = trainings(facts)
    for number, student in enumerate(STUDENTS):
        for training, much in (("kd", plan.kd[number]), ("dmd2", plan.dmd2[number])):
            name = f"toy_{training}_{student}"
            sizes = [f"trainer.max_iter={much.iters}", f"trainer.batch_size={much.batch_size}"]
            sizes += [f"checkpoint.save_iter={min(much.iters, 200)}", *much.more]
            sizes += [f"trainer.log_every={max(1, min(640 // much.batch_size, much.iters // 4))}"]
            found, wanted = runs[name], compose(read_command([f"experiment={name}", *sizes]), Run)
            for part in SAME:
                assert getattr(found, part) == getattr(wanted, part), (name, part)
            data: tuple[Any, Any] = found.data, wanted.data
            assert replace(data[0], dataset_dir="") == replace(data[1], dataset_dir=""), name
            spec: Any = found.networks.teacher
            assert type(spec) is type(TEACHER) and spec.pretrained == str(TOY)
            own = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name not in (*SIZES, "pretrained")}
            assert own == {name: getattr(TEACHER, name) for name in own}  # how the network of that folder is called
            assert found.networks.critic == wanted.networks.critic or training == "kd"


def test_the_pairs_are_solved_as_before(facts: Facts) -> None:
    sampler: Any = open_model(TOY).sampler
    assert facts.sampler == changed(sampler, SamplerOptions(STEPS, "unipc", guidance=GUIDANCE))
    stages = {stage.name: stage for stage in students(facts.request.work_dir, "default", facts)}
    (one,), (two,) = stages["pairs"].lanes
    assert one[:2] == ("RANK=0", "WORLD_SIZE=2") and two[:2] == ("RANK=1", "WORLD_SIZE=2") and one[2:] == two[2:]
    words = " ".join(one)
    for option in ("--negative zeros", "--max-tokens 40 --mask-text", "--path-times 4 --student-shift 3", "--quality lossless"):
        assert option in words


def test_a_demo_goes_on_at_the_first_stage_whose_commands_have_changed(
    facts: Facts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EnoughError(Exception):  # what the later stages would make is not looked at
        pass

    def run(stage: Stage, *_: Any, **more: Any) -> None:
        if stage.name == "export":
            raise EnoughError

    out = facts.request.work_dir
    for stage in stages(out, "default", from_scratch=False):
        lines = [line.replace("trainer.max_iter=250", "trainer.max_iter=200") for line in stage.commands]
        write_json(marker_of(out, stage.name), {"commands": lines})
    (out / "runs" / "1step" / "kd").mkdir(parents=True)
    monkeypatch.setattr("fewstep.toyworld.demo.run.run", run)
    with pytest.raises(EnoughError):
        demo(out)
    there = {path.stem for path in (out / "stages").iterdir()}
    assert there == {"world", "text", "latents", "pairs"}
    text = capsys.readouterr().out
    assert "the commands of stage 'kd' have changed: trainer.max_iter=200 -> trainer.max_iter=250\n" in text
    assert f"and so are dmd2, export, scores, report; kept: {out}/runs/1step/kd as kd.001" in text
