"""The road of `fewstep distill` before anything runs: commands, defaults, costs, what is refused; and the verdict."""

from __future__ import annotations

import html
import json
import shlex
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "stories"))
import materials
from tiny_pipelines import clips

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
from score_records import record

from fewstep import TOY
from fewstep.cli import main
from fewstep.distill import cost
from fewstep.distill.facts import facts_of
from fewstep.distill.request import DistillRequest
from fewstep.distill.road import stages, stamp_of
from fewstep.distill.stages import claim, marker_of
from fewstep.inference.record import weights_stamp
from fewstep.networks.families.cosmos.models import MODELS, transfer1_7b

WAN_VAE = {"_class_name": "AutoencoderKLWan", "z_dim": 16, "temperal_downsample": [False, True, True]}
COSMOS_VAE = {"_class_name": "AutoencoderKLCosmos", "latent_channels": 16, "temporal_compression_ratio": 8}
COSMOS_VAE |= {"spatial_compression_ratio": 8}
COSMOS = {"_class_name": "CosmosTransformer3DModel", "in_channels": 17, "out_channels": 16, "patch_size": [1, 2, 2]}
FOLDERS: dict[str, dict[str, Any]] = {
    "wan": {
        "model_index": {"_class_name": "WanPipeline"},
        "transformer/config": {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2]},
        "text_encoder/config": {"model_type": "umt5", "d_model": 4096},
        "scheduler/scheduler_config": {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0},
        "vae/config": WAN_VAE,
    },
    "predict1": {
        "model_index": {"_class_name": "CosmosTextToWorldPipeline"},
        "transformer/config": COSMOS | {"max_size": [128, 240, 240]},
        "text_encoder/config": {"model_type": "t5", "d_model": 1024},
        "vae/config": COSMOS_VAE,
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of two pipelines, without weights, and four clips of 12 frames."""
    folder = tmp_path_factory.mktemp("road")
    for name, files in FOLDERS.items():
        for path, content in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / f"{path}.json").write_text(json.dumps(content))
    clips(folder / "clips", num=4, frames=12)
    return folder


def request(world: Path, teacher: str = "wan", **more: Any) -> DistillRequest:
    return DistillRequest(str(world / teacher), world / "clips", world / "student", **more)


def commands(asked: DistillRequest) -> dict[str, list[str]]:
    return {stage.name: stage.commands for stage in stages(facts_of(asked))}


def test_the_stages_and_their_commands_for_wan(world: Path) -> None:
    road = commands(request(world))
    assert list(road) == ["check", "memory", "text", "latents", "pairs", "kd", "dmd2", "export", "scores", "report"]
    teacher, data, work = str(world / "wan"), str(world / "clips"), str(world / "student.work")
    assert road["text"] == [f"fewstep prepare text {data} --text-encoder {teacher} --negative-prompt ''"]
    # The longest window that the codec takes: 9 of 12 frames, side by side.
    assert road["latents"] == [f"fewstep prepare latents {data} --codec {teacher} --num-frames 9 --start-frame-interval 9"]
    assert road["pairs"] == [
        f"fewstep pairs {teacher} {data} --out {work}/pairs --num 4 --guidance 5 --max-tokens 512 --negative negative.pickle "
        "--path-times 4 --student-shift 5"
    ]
    assert road["kd"][0].startswith(f"OUTPUT_ROOT={work} fewstep train experiment=kd teacher={teacher} steps=4 ")
    dmd2 = shlex.split(road["dmd2"][0])
    assert {"guidance=5", f"networks.student.init={work}/runs/student/kd", f"data.dataset_dir={data}"} <= set(dmd2)
    assert road["export"] == [
        f"OUTPUT_ROOT={work} fewstep export {work}/runs/student/dmd2 --out {world}/student --format diffusers --base {teacher}"
    ]
    assert [line.split(" --")[0].removeprefix("fewstep evaluate ") for line in road["scores"]] == [
        teacher, teacher, f"{work}/runs/student/kd", f"{world}/student",
    ]  # fmt: skip


def test_a_teacher_of_cosmos_1_and_other_methods(world: Path) -> None:
    own = ("dmd2.optim.lr=1e-6", "dmd2.trainer.max_iter=9")
    road = commands(request(world, "predict1", method="dmd2", rank=8, processes=2, settings=own))
    assert "pairs" not in road and "kd" not in road and "--negative-prompt" not in road["text"][0]
    assert road["latents"][0].endswith("--scale 0.5 --num-frames 9 --start-frame-interval 9")
    words = shlex.split(road["dmd2"][0])
    assert words[1:5] == ["torchrun", "--standalone", "--nproc_per_node=2", "-m"]
    assert [word for word in words if "max_iter" in word] == ["trainer.max_iter=9"]  # the user's replaces ours
    assert {"rank=8", "guidance=6", "optim.lr=1e-6"} <= set(words) and not any("init=" in word for word in words)
    assert "gpus=2" in road["memory"][0] and "shape=16x2x4x4 text=512x1024" in road["memory"][0]
    one = commands(request(world, method="kd", steps=1))
    assert "--path-times" not in one["pairs"][0] and "dmd2" not in one
    assert one["export"][0].split()[3].endswith("runs/student/kd") and len(one["scores"]) == 3


def test_the_toy_teacher_has_a_mask_and_a_branch(world: Path) -> None:
    road = commands(DistillRequest(str(TOY), world / "clips", world / "toy", control="edge", text_encoder=str(world / "wan")))
    assert road["controls"] == [f"fewstep prepare controls {world / 'clips'} --type edge"]
    assert all("--control edge" in road[name][0] for name in ("latents", "pairs", "scores"))
    assert "data.max_tokens=512" in road["kd"][0] and "data.mask_text=false" in road["kd"][0]  # those of the other encoder
    assert road["export"][0].endswith(f"--format diffusers --base {TOY} --text-encoder {world / 'wan'}")


@pytest.mark.parametrize(("control", "form"), [("edge", "pt-original"), (None, "diffusers")])
def test_a_teacher_in_files_of_the_original_code(world: Path, tmp_path: Path, control: str | None, form: str) -> None:
    sizes: dict[str, Any] = {
        "latent_channels": 16, "num_heads": 2, "head_dim": 12, "num_layers": 2, "mlp_ratio": 2.0, "text_dim": 8,
        "adaln_lora_dim": 4, "max_size": [4, 8, 8],
    }  # fmt: skip
    own = {"num_control_blocks": 1, "hint_channels": 16} if control else {}
    spec = replace(transfer1_7b("edge") if control else MODELS["predict1_7b_text2world"], **sizes, **own)
    torch.save(materials.original_weights(spec, "1"), tmp_path / "model.pt")
    described = {f.name: getattr(spec, f.name) for f in fields(spec) if getattr(spec, f.name) != f.default}
    materials.settings(tmp_path / "network.yaml", {"kind": "cosmos_control" if control else "cosmos", **described})
    teacher, parts = str(tmp_path / "model.pt"), str(world / "predict1")
    asked = DistillRequest(teacher, world / "clips", tmp_path / "student", control=control, codec=parts, text_encoder=parts)
    facts = facts_of(asked)
    assert facts.batch == 16 and facts.form_of_student == form  # small, by the shapes of its weights
    road = {stage.name: stage.commands for stage in stages(facts)}
    assert road["latents"][0].count("--scale 0.5") == 1
    assert f"--codec {parts}" in road["pairs"][0] and f"teacher={teacher}" in road["kd"][0]
    wanted = f"--format {form}" + (f" --codec {parts} --text-encoder {parts}" if form == "diffusers" else "")
    assert road["export"][0].endswith(wanted)
    assert (f"--codec {parts}" in road["scores"][-1]) == (form == "pt-original")
    if control is not None:
        assert (
            all("--control edge" in road[name][0] for name in ("latents", "pairs", "scores"))
            and "control=edge" in road["kd"][0]
        )
        with pytest.raises(ValueError, match="One is distilled at a time"):
            facts_of(replace(asked, control=None))
    with pytest.raises(ValueError, match="Add --codec FOLDER and --text-encoder FOLDER"):
        facts_of(replace(asked, codec=None))


def test_iterations_and_costs_follow_from_the_data(world: Path) -> None:
    facts = facts_of(request(world))
    assert (facts.iters("kd"), facts.iters("dmd2")) == (250, 600)  # of few clips, the least
    many = replace(facts, clips=replace(facts.clips, num=50_000))
    assert many.num_pairs == 10_000 and many.iters("kd") == 10_000 and many.iters("dmd2") == 24_000
    some = replace(facts, clips=replace(facts.clips, num=1000))
    assert some.batch == 8 and some.iters("dmd2") == 64 * 1000 // 8
    costs = cost.cost_of(facts)
    assert costs["pairs"].calls == 4 * 70  # 35 steps with guidance
    assert costs["latents"].gib * 2**30 == 4 * 2 * 16 * 3 * 4 * 4
    # A student turn in five: 2.5 calls on average, backward 2, critic 1, teacher 2; the others: 2.5, then forward and backward.
    assert costs["dmd2"].calls == pytest.approx(600 * 8 * (7.5 / 5 + 5.5 * 4 / 5))
    assert cost.speed(facts, world) is None and "hours" not in cost.table(facts, None)
    hours = cost.table(facts, 10.0).splitlines()[-1].split()
    assert float(hours[-1]) == pytest.approx(sum(one.calls for one in costs.values()) / 36000, abs=0.006)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"size": (20, 32)}, "takes multiples of 16. Choose a size, --height 16 --width 32"),
        ({"num_frames": 20}, "the shortest clip of .* has 12 frames"),
        ({"teacher_steps": 4}, "--teacher-steps 4: the pairs of a student of 4 steps need at least 8"),
        ({"control": "edge"}, "--control edge: .* has no branch for it"),
    ],
)
def test_what_cannot_be_distilled_is_refused_before_anything_runs(world: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        facts_of(request(world, **more))


def test_clips_of_several_sizes_and_one_without_a_caption(world: Path, tmp_path: Path) -> None:
    clips(tmp_path / "odd", num=3, frames=12)
    clips(tmp_path / "wide", num=1, frames=9, side=48)
    (tmp_path / "wide/videos/clip_000.mp4").rename(tmp_path / "odd/videos/\u00fc \u6c34.mp4")
    asked = replace(request(world), dataset=tmp_path / "odd")
    with pytest.raises(ValueError, match=r"1 of 4 lack metas/.*: \u00fc \u6c34. Write one for each clip"):
        facts_of(asked)
    (tmp_path / "odd/metas/\u00fc \u6c34.txt").write_text("a square\n")
    with pytest.raises(
        ValueError, match=r"several sizes \(32 x 32, 48 x 48; height x width\). Choose one, --height 32 --width 32"
    ):
        facts_of(asked)
    (latents,) = commands(replace(asked, size=(32, 32)))["latents"]
    assert latents.endswith("--num-frames 9 --start-frame-interval 9 --height 32 --width 32 --resize crop")


def test_wrong_use_and_a_dry_run_by_the_command(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", str(world / "wan"), str(world / "clips"), "--out", str(world / "student")]
    assert main([*words, "--dryrun", "--calls-per-s", "100"]) == 0
    text = capsys.readouterr().out
    assert "--- dmd2" in text and "hours" in text and not (world / "student.work").exists()
    assert main([*words, "kd.optim.lr"]) == 2 and main([*words, "--method", "kd", "dmd2.optim.lr=1"]) == 2
    assert main([*words, "--method", "sid"]) == 2
    capsys.readouterr()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert main([*words[:-1], str(tmp_path / "other")]) == 2 and "holds something else" in capsys.readouterr().err
    for file in (bare := clips(tmp_path / "bare", num=1)).glob("metas/*"):
        file.unlink()
    assert main([*words[:2], str(bare), "--out", str(tmp_path / "s")]) == 1 and "--prompt TEXT" in capsys.readouterr().err


def test_stages_from_the_first_that_changed_are_done_anew(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = request(world, work=tmp_path / "work")
    road = stages(facts_of(asked))

    def done_after(**changes: Any) -> list[str]:
        for stage in road:
            marker_of(asked.work_dir, stage.name).parent.mkdir(parents=True, exist_ok=True)
            marker_of(asked.work_dir, stage.name).write_text(json.dumps({"commands": stage.commands}))
        claim(stages(facts_of(replace(asked, **changes))), asked.work_dir)
        return [stage.name for stage in road if marker_of(asked.work_dir, stage.name).exists()]

    names = [stage.name for stage in road]
    assert done_after() == names and capsys.readouterr().out == ""
    assert done_after(num_eval=2) == names[: names.index("scores")]
    assert "have changed: --num 4 -> --num 2\n  it is done anew, and so is report\n" in capsys.readouterr().out
    (tmp_path / "work" / "runs" / "student" / "dmd2").mkdir(parents=True)
    assert done_after(iters=7) == names[: names.index("dmd2")]
    said = capsys.readouterr().out
    assert "stage 'dmd2' have changed: trainer.max_iter=600 checkpoint.save_iter=150 trainer.log_every=50 -> " in said
    assert "and so are export, scores, report; kept: " in said and said.endswith("runs/student/dmd2 as dmd2.001\n")
    assert done_after(settings=("dmd2.optim.lr=1e-5",)) == [n for n in names[: names.index("dmd2")] if n != "memory"]
    assert done_after(steps=2) == ["check", "text", "latents"]  # pairs have other states


def test_clips_and_captions_are_known_again_wherever_they_lie(tmp_path: Path) -> None:
    before = stamp_of(data := clips(tmp_path / "clips", num=2))
    assert stamp_of(Path(shutil.copytree(data, tmp_path / "copy"))) == before  # with other times of change
    (data / "metas" / "clip_001.txt").write_text("a green dot")
    edited = stamp_of(data)
    shutil.copy(data / "videos" / "clip_000.mp4", data / "videos" / "clip_002.mp4")
    assert len({before, edited, stamp_of(data)}) == 3


def test_a_teacher_of_other_weights_at_the_same_place_is_noticed(world: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(world / "wan", tmp_path / "wan"))
    asked = replace(request(world), teacher=str(teacher))
    reads = next(stage.reads for stage in stages(facts_of(asked)) if stage.name == "pairs")
    assert reads is not None and reads() == ""  # as of a name on the hub
    (teacher / "transformer" / "model.safetensors").write_bytes(bytes(10**6))
    before = reads()
    assert before == weights_stamp(str(shutil.copytree(teacher, tmp_path / "copy")))
    (teacher / "transformer" / "model.safetensors").write_bytes(bytes(5 * 10**5) + 5 * 10**5 * b"1")
    assert len({"", before, reads()}) == 3


def test_clips_larger_than_the_teacher_was_trained_on_are_a_warning_in_terminal_and_report(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = clips(tmp_path / "big", num=2, frames=25, side=64)
    words = ["distill", str(TOY), str(big), "--out", str(tmp_path / "student")]
    sentence = (
        "the clips are larger (25 frames of 64 x 64 pixels) than those that the teacher was trained on (17 of 32 x 32). Nobody "
        "knows what it makes at that size"
    )
    assert main([*words, "--dryrun"]) == 0
    text = capsys.readouterr().out
    assert f"warning   {sentence}" in text  # at the top
    assert f"--verdict student:teacher_few --verdict student:kd --warning '{sentence}" in text.replace('"', "'")
    assert main([*words, "--dryrun", "--num-frames", "17", "--height", "32", "--width", "32"]) == 0
    assert "warning" not in capsys.readouterr().out
    published = facts_of(replace(request(world), dataset=big))
    assert published.warnings == []  # Wan is published for 81 frames of 720 x 1280
    (warning,) = replace(published, size=(1280, 1280)).warnings
    assert "(25 frames of 1280 x 1280 pixels)" in warning and "(81 of 720 x 1280)" in warning


def test_the_end_of_the_command_says_what_the_report_says(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fewstep.distill.run import _judge  # pyright: ignore[reportPrivateUsage]

    asked = replace(request(world), out=world / "judged", strict=True)
    facts = replace(facts_of(asked), size=(1280, 1280))
    for name, value in (("teacher", 1.0), ("teacher_few", 2.0), ("kd", 2.0), ("student", 2.2)):
        more = {"num_calls": 8 if name == "teacher_few" else 4} | ({"sampler": "unipc"} if "teacher" in name else {})
        record(asked.out / "scores", name, more, frechet=value)
    _judge(facts)
    said = capsys.readouterr().out
    report = shlex.split({stage.name: stage.commands for stage in stages(facts)}["report"][0])[1:]
    words = [word for word in report if not word.startswith(str(asked.work_dir))]  # the runs, which are not there
    assert main(words) == 0
    page = html.unescape((asked.out / "report.html").read_text())
    for sentence in (
        facts.warnings[0],
        "frechet: the student is as good, as far as these clips tell, as its teacher in 8 calls",
        "As far as 8 clips can tell, the student is as good as its teacher in 8 calls: no score tells",
        "As far as 8 clips can tell, the student is as good as kd",
    ):
        assert sentence in said and sentence in page, sentence
    assert "teacher in few steps, 8 calls" in said and "student, 4 calls" in said
    record(asked.out / "scores", "student", {"num_calls": 4}, frechet=3.0)
    with pytest.raises(ValueError, match="the student is worse than its teacher in 8 calls, which --strict does not accept"):
        _judge(facts)
    assert "The last training made the student worse in frechet than kd: train it longer" in capsys.readouterr().out
