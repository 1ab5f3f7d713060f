"""Recipes for any teacher: what they read from its folder, and that a configuration which contradicts a folder is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import TOY
from fewstep.cli import main
from fewstep.config import ConfigError, check, compose, from_yaml, read_command, to_yaml
from fewstep.data.mix import Mix
from fewstep.diffusion import EDM, VP, RectifiedFlow
from fewstep.errors import UserError
from fewstep.inference.model import open_model
from fewstep.inference.teacher import teacher_at
from fewstep.methods import DMD2, KD, Finetune
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full
from fewstep.parallel import World
from fewstep.training.run import Parallel, Run
from fewstep.training.run_folder import refuse_parted_branches

T5, UMT5 = {"model_type": "t5"}, {"model_type": "umt5"}
UNIPC = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}
COSMOS = {"_class_name": "CosmosTransformer3DModel", "in_channels": 17, "out_channels": 16}
FOLDERS = {  # of each pipeline: its class, and the configurations of its network, text encoder and scheduler
    "wan": ("WanPipeline", {"_class_name": "WanTransformer3DModel"}, UMT5, UNIPC),
    "predict1": ("CosmosVideoToWorldPipeline", COSMOS, T5, {"_class_name": "EDMEulerScheduler"}),
    "predict2": ("Cosmos2VideoToWorldPipeline", COSMOS, T5, {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
}


PARTS = ("transformer/config", "text_encoder/config", "scheduler/scheduler_config")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their small files alone: a recipe reads no weights."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, (pipeline, *configs) in FOLDERS.items():
        write(root / name / "model_index.json", {"_class_name": pipeline})
        for part, config in zip(
            ("transformer/config", "text_encoder/config", "scheduler/scheduler_config"), configs, strict=True
        ):
            write(root / name / f"{part}.json", config)
    return root


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def run(*words: str) -> Run:
    made = compose(read_command(words), Run)
    assert from_yaml(Run, to_yaml(made)) == made  # its config.yaml is complete
    assert not check(made)
    return made


def test_a_wan_teacher(pipelines: Path) -> None:
    teacher = f"teacher={pipelines / 'wan'}"
    kd, dmd2 = run("experiment=kd", teacher), run("experiment=dmd2", teacher, "steps=2", "rank=4")
    assert isinstance(kd.method, KD) and kd.method.t_list == (1.0, 0.9375, 0.8333333333333334, 0.625)  # of shift 5
    assert kd.networks.teacher == WanSpec(pretrained=str(pipelines / "wan")) and kd.networks.student == Full()
    assert kd.data.max_tokens == 512 and not kd.data.mask_text and kd.data.pairs == ("path",)  # type: ignore[attr-defined]
    assert isinstance(dmd2.method, DMD2) and dmd2.method.student.t_list == (1.0, 0.8333333333333334)
    assert dmd2.method.guidance == 5.0 and dmd2.data.negative == "negative.pickle"  # type: ignore[attr-defined]
    assert dmd2.networks.student == dmd2.networks.critic == Lora(rank=4) and dmd2.optim.lr == pytest.approx(5e-5)
    assert run("experiment=dmd2", teacher, "guidance=3", "shift=3").method.guidance == 3.0  # type: ignore[attr-defined]
    assert run("experiment=kd", teacher, "steps=1").data.pairs == ("noise",)  # type: ignore[attr-defined]
    finetune = run("experiment=finetune", teacher).method
    assert isinstance(finetune, Finetune) and finetune.times.mean == math.log(3)  # type: ignore[attr-defined]


def test_a_teacher_of_cosmos_1_is_edm(pipelines: Path) -> None:
    teacher = f"teacher={pipelines / 'predict1'}"
    kd, dmd2 = run("experiment=kd", teacher, "steps=2"), run("experiment=dmd2", teacher)
    assert isinstance(kd.networks.teacher, CosmosSpec) and kd.networks.teacher.use_fps
    assert kd.networks.teacher.path == EDM(sigma_data=0.5)
    assert isinstance(kd.method, KD) and kd.method.t_list == pytest.approx((80.0, 40 / 9))  # half of 80/85, shifted by 5
    assert isinstance(dmd2.method, DMD2) and dmd2.method.student.t_list[0] == 80 and dmd2.method.guidance == 6.0
    finetune = run("experiment=finetune", teacher).method
    assert isinstance(finetune, Finetune)
    assert (finetune.space, finetune.weighting, finetune.sigma_data) == ("x0", "edm", 0.5)


def test_the_toy_teacher_with_its_mask_and_its_branch() -> None:
    made = run("experiment=dmd2", f"teacher={TOY}", "control=edge")
    assert isinstance(made.networks.teacher, CosmosControlSpec) and made.networks.teacher.controls == ("edge",)
    assert made.data.max_tokens == 40 and made.data.mask_text and made.data.negative == "zeros"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"control: seg: .* has branches for edge only"):
        run("experiment=kd", f"teacher={TOY}", "control=edge,seg")
    with pytest.raises(ConfigError, match="teacher: which"):
        run("experiment=kd")
    with pytest.raises(ConfigError, match="steps: must be at least 1"):
        run("experiment=kd", f"teacher={TOY}", "steps=0")


def test_one_student_for_several_controls(tmp_path: Path) -> None:
    for name in ("edge", "vis", "depth"):
        write(tmp_path / f"controlnet_{name}" / "config.json", json.loads((TOY / "controlnet_edge/config.json").read_text()))
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        write(tmp_path / name, json.loads((TOY / name).read_text()))
    teacher = (f"teacher={tmp_path}", "control=edge,vis,depth")
    kd = run("experiment=kd", *teacher, "data.sources.1.data.dataset_dir=vis_pairs")
    dmd2 = run("experiment=dmd2", *teacher, "data.block=32", "trainer.batch_size=32")
    for made, places in ((kd, ["datasets/pairs/edge", "vis_pairs", "datasets/pairs/depth"]), (dmd2, ["datasets/clips"] * 3)):
        data: Any = made.data
        assert isinstance(data, Mix) and made.data.fields >= made.method.needs
        assert [source.data.dataset_dir for source in data.sources] == places
        assert [source.data.control.folder for source in data.sources] == ["edge", "vis", "depth"]
        assert {source.weight for source in data.sources} == {1.0} and data.block % made.trainer.batch_size == 0
        assert set(made.networks.teacher.control_branches) == {"edge", "vis", "depth"}  # type: ignore[union-attr]
    sharded, world = replace(dmd2, parallel=Parallel("fsdp")), World(0, 3, torch.device("cpu"), None)
    refuse_parted_branches(replace(dmd2, parallel=Parallel("ddp")), world)
    refuse_parted_branches(replace(sharded, data=replace(data, block=96)), world)
    with pytest.raises(UserError, match=r"data\.block=32: 3 processes share the weights .* Set data\.block=96"):
        refuse_parted_branches(sharded, world)


def test_a_teachers_path_is_that_of_its_network(pipelines: Path) -> None:
    assert teacher_at(str(pipelines / "predict2")).path == RectifiedFlow() and not isinstance(teacher_at(str(TOY)).path, VP)
    toy = teacher_at(str(TOY))
    assert toy.num_weights == sum(weight.numel() for weight in open_model(TOY).network.module.parameters()) and toy.is_small


@pytest.mark.parametrize(("name", "wrong"), [("predict1", "family"), ("predict2", "use_fps")])
def test_a_configuration_that_contradicts_the_folder_is_refused(
    name: str, wrong: str, pipelines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    folder = pipelines / name
    words = ["experiment=toy_kd_1step", "networks.teacher=cosmos", f"networks.teacher.pretrained={folder}"]
    words += [f"data.dataset_dir={tmp_path / 'clips'}", "data.x0=pixels", "data.text=none", "data.pairs=[]", "method=finetune"]
    words += ["trainer.max_iter=1", "optim.warmup_iters=0", "trainer.batch_size=1"]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert f"networks.teacher.{wrong}: is" in said and f"teacher={folder}" in said
    assert main(["train", "--dryrun", *words]) == 2
