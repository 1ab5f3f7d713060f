"""`fewstep demo --quick`, whole: every stage a command, every number with its spread and its n, and a page that plays."""

import html
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))
import chromium

import fewstep
from fewstep.batch import Condition
from fewstep.diffusion import Rng, StudentSampler
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.toyworld.demo import page
from fewstep.toyworld.demo.stages import CALLS, runs_of
from fewstep.toyworld.demo.verdict import warnings_of

TOY, SHAPE = fewstep.TOY, (8, 5, 4, 4)
RESULTS = Path(__file__).parents[2] / "docs" / "results"
FRAMES = "[...document.querySelectorAll('.gallery')].map(g => +g.dataset.at)"
NAMES = (
    *("frechet_teacher", "frechet_ratio_4step", "frechet_ratio_1step", "frechet_teacher_4calls", "frechet_teacher_1call"),
    *("gap_closed_4step", "gap_closed_1step", "frechet_tokenizer", "frechet_real"),
    *(f"{score}_{who}" for score in ("recall", "adherence") for who in ("teacher", "4step", "1step")),
    *(f"clips_per_s_{who}" for who in ("teacher", "4step", "1step")),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done = quick(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for command in (
        "prepare toyworld",
        "prepare text",
        "prepare latents",
        "pairs",
        "train experiment=kd",
        "export",
        "evaluate",
    ):
        assert f"fewstep {command}" in done.stdout, command
    (folder / "demo" / "said.txt").write_text(done.stdout)
    return folder / "demo"


def test_it_ends_in_a_sentence_and_says_that_so_few_clips_rank_nothing(made: Path) -> None:
    summary, page = json.loads((made / "summary.json").read_text()), html.unescape((made / "report.html").read_text())
    lines = (made / "said.txt").read_text().splitlines()
    end = f"Look at {made.resolve()}/report.html; every number with its spread is in demo/summary.json."
    assert lines[-1].startswith("The demo took ") and lines[-1].endswith(end)
    (warning,) = warnings_of(summary)
    assert f"warning: {warning}" in lines and warning in page and "the student is" not in page
    spreads = [summary[f"frechet_{name}_spread"] for name in ("teacher", "4step", "1step")]
    assert warning.startswith(
        f"128 clips rank nothing. Their distances to real clips, {summary['frechet_teacher']:.1f} (teacher,"
    )
    assert f"have spreads of {min(spreads):.1f} to {max(spreads):.1f}: a student 1.5 times as far" in warning
    assert any(line.startswith("student, 4 steps, 4 calls  ") for line in lines)
    assert any(line.startswith("teacher, 4 calls  ") for line in lines)
    assert warnings_of(kept()) == []  # of 3 sets of 512


def quick(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fewstep", "demo", "--quick", *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_number_is_there_with_its_spread_and_its_n(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    for name in NAMES:
        assert math.isfinite(summary[name]), name
        assert math.isfinite(summary[f"{name}_spread"]), name
        assert summary[f"{name}_n"] > 0, name
    assert (
        summary["network_calls_teacher"] == 70 and summary["network_calls_4step"] == 4 and summary["network_calls_1step"] == 1
    )
    # What cannot fail however short the training: the tokenizer costs something by every measure, fewer calls are faster.
    # In spreads: 1.9, 4.3 and 7.6 of these 128 clips; the kept result's 1536, which the next test ties to these, tell it well.
    assert all(seen > least for seen, least in zip(cost_of_tokenizer(summary), (1, 2.5, 5), strict=True))
    assert all(seen > least for seen, least in zip(cost_of_tokenizer(kept()), (2, 4, 10), strict=True))
    assert summary["frechet_teacher_1call"] > 1.5 * summary["frechet_teacher"]
    assert min(summary[f"clips_per_s_{name}"] for name in ("1step", "4step", "teacher")) > 0


def cost_of_tokenizer(summary: dict[str, float]) -> list[float]:
    """How far real clips through the tokenizer lie beyond real ones, in spreads: by Frechet, MMD and the untrained witness."""
    found: list[float] = []
    for score in ("frechet", "mmd", "frechet_random_net"):
        apart = math.hypot(summary[f"{score}_tokenizer_spread"], summary[f"{score}_real_spread"])
        found.append((summary[f"{score}_tokenizer"] - summary[f"{score}_real"]) / apart)
    return found


def kept() -> dict[str, float]:
    return json.loads(sorted(RESULTS.glob("demo_default_*.json"))[-1].read_text())


def test_a_few_clips_tell_of_the_shipped_weights_what_many_told(made: Path) -> None:
    """Against the kept result of twelve times as many clips: an estimate that left its bias in would lie far above it."""
    few = json.loads((made / "summary.json").read_text())
    many = kept()
    for name in ("real", "tokenizer", "teacher", "teacher_4calls", "teacher_1call"):
        for score in ("frechet", "mmd"):
            key = f"{score}_{name}"
            apart = math.hypot(few[f"{key}_spread"], many[f"{key}_spread"])
            assert abs(few[key] - many[key]) < 3 * apart, (key, few[key], many[key], apart)
    assert few["frechet_tokenizer_n"] < many["frechet_tokenizer_n"] / 3


def test_what_a_collapsed_student_does_not_show_is_left_out_of_the_page(made: Path, tmp_path: Path) -> None:
    """No object, no flight, no gravity: `evaluate` writes null. (JSON knows no nan, and neither do browsers.)"""
    out = Path(shutil.copytree(made, tmp_path / "demo"))
    path = out / "scores" / "1step.json"
    told = json.loads(path.read_text())
    told["scores"]["gravity_ratio"] = {"value": None, "spread": None, "num": 0, "per_set": [None]}
    path.write_text(json.dumps(told))
    page.main(out, "quick", str(TOY))
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert summary["gravity_ratio_1step"] is None and summary["gravity_ratio_1step_n"] == 0
    before, after = ((folder / "report.html").read_text() for folder in (made, out))
    assert after.count("<td>&ndash;</td>") == before.count("<td>&ndash;</td>") + 1


def test_plain_diffusers_sampled_the_exported_students(made: Path) -> None:
    from fewstep.data.files import video

    for student in ("4step", "1step"):
        frames = video.read(made / "samples" / student / "00.mp4").frames
        assert frames.shape == (17, 32, 32, 3)
        assert frames.std() > 10  # a floor and a wall differ by more


def test_the_same_command_again_does_nothing_and_another_size_is_refused(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    done = quick(made.parent)
    assert done.returncode == 0 and done.stdout.count("done earlier") == len(list((made / "stages").glob("*.json")))
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    other = subprocess.run([sys.executable, "-m", "fewstep", "demo"], cwd=made.parent, capture_output=True, text=True)
    assert other.returncode == 1 and "holds another demo" in other.stderr


PLAIN = """
import sys
sys.modules["fewstep"] = None
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
student, given, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(student, custom_pipeline=f"{student}/pipeline.py", trust_remote_code=True)
given = load_file(given)
renoise = [given[name] for name in sorted(given) if name.startswith("renoise")] or None
pixels = pipe(["a red sphere rolls to the left."], latents=given["noise"], renoise=renoise, output_type="pt").frames
save_file({"pixels": pixels.contiguous()}, out)
"""


@pytest.mark.parametrize("student", ["4step", "1step"])
def test_plain_diffusers_makes_our_frames(made: Path, tmp_path: Path, student: str) -> None:
    model, encoder, codec = open_model(made / "students" / student), open_text_encoder(TOY), open_codec(TOY)
    assert isinstance(model.sampler, StudentSampler)
    text, mask = encoder.encode(["a red sphere rolls to the left."])
    rng, again = Rng.of_samples([5]), Rng.of_samples([5])
    with torch.no_grad():
        latents = model.sampler(model.network, rng.normal(SHAPE), Condition(text=text, text_mask=mask), rng)
        ours = (codec.decode(latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    given = {"noise": again.normal(SHAPE)}
    if model.sampler.renoise == "fresh":
        given |= {f"renoise{i}": again.normal(SHAPE) for i in range(len(model.sampler.times) - 1)}
    save_file(given, tmp_path / "given.safetensors")
    files = (made / "students" / student, tmp_path / "given.safetensors", tmp_path / "out.safetensors")
    subprocess.run([sys.executable, "-c", PLAIN, *map(str, files)], check=True, cwd=tmp_path)
    theirs = load_file(tmp_path / "out.safetensors")["pixels"]
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert float(ours.std()) > 0.05


@pytest.mark.skipif(chromium.found() is None, reason="no Chromium here: apt-get install chromium")
def test_the_page_opens_without_complaint_and_every_clip_is_there(made: Path) -> None:
    with chromium.browser() as page:
        page.open(made / "report.html", 360, 800)
        page.wait("document.documentElement.dataset.ready === 'yes'")
        assert page.errors == []
        assert page.js("document.documentElement.scrollWidth") <= 360
        # Eight prompts by real, tokenizer, teacher at 70, 4 and 1 calls and both students; then what plain diffusers made.
        assert page.js("document.querySelectorAll('canvas.live').length") == 8 * 7 + 4 * 2
        page.js("document.querySelector('.gallery').scrollIntoView()")  # below the verdict: only what is looked at plays
        before = page.js(FRAMES)
        page.wait(f"JSON.stringify({FRAMES}) !== '{json.dumps(before, separators=(',', ':'))}'")


def test_the_page_has_further_methods_over_the_number_of_calls(made: Path, tmp_path: Path) -> None:
    """With scores written by hand: what the next test makes by its commands."""
    out = Path(shutil.copytree(made, tmp_path / "demo"))
    record = json.loads((out / "scores" / "4step.json").read_text())
    for method in ("rcm", "flow_map"):
        for run in runs_of(out, method):
            shutil.copytree(out / "runs" / "4step" / "dmd2", run)
    for number, name in enumerate(("kd", "dmd2", "rcm", "flow_map")):
        for calls in CALLS:
            record["scores"]["frechet"]["value"] = 10.0 + number + 8 / calls
            (out / "scores" / f"{name}_{calls}calls.json").write_text(json.dumps(record))
    page.main(out, "quick", str(TOY), ["rcm", "flow_map"])
    summary, text = json.loads((out / "summary.json").read_text()), (out / "report.html").read_text()
    assert summary["frechet_rcm_4calls"] == 14.0 and summary["train_s_rcm"] == summary["train_s_dmd2"] > 0
    assert summary["train_s_flow_map"] == 2 * summary["train_s_dmd2"]  # of both its stages
    assert all(name in text for name in ("rCM, 4 calls", "flow map, 16 calls", "DMD2, 1 call", "KD, 8 calls"))
    assert 'id="bounds"' not in text  # so few clips meet none
    gates = {gate.name: gate for gate in page.gates_of_methods(summary, ["rcm", "flow_map"])}
    assert [gate.is_met for gate in gates.values()] == [True, True, True, True, summary["frechet_teacher"] * 1.15 >= 14.0]
    assert gates["rCM, 4 calls: distance, as a multiple of DMD2's"].value == 14 / 13
    assert gates["flow map, 8 calls: distance, as a multiple of its own at 4"].value == 14 / 15


@pytest.mark.slow
def test_further_methods_join_a_finished_demo(made: Path, tmp_path: Path) -> None:
    """Trained, scored at 1 to 16 calls beside KD and DMD2, and in the report; what was done before is not done again."""
    shutil.copytree(made, tmp_path / "demo")
    done = quick(tmp_path, "--method", "flow_map", "--method", "rcm")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("done earlier") == len(list((made / "stages").glob("*.json"))) - 1  # all but the report
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for student in ("kd", "dmd2", "rcm", "flow_map"):
        assert summary[f"train_s_{student}"] > 0
        for calls in (1, 2, 4, 8, 16):
            for score in ("frechet", "recall", "adherence"):
                name = f"{score}_{student}_{calls}calls"
                assert math.isfinite(summary[name]) and summary[f"{name}_n"] > 0
    page = (tmp_path / "demo" / "report.html").read_text()
    assert all(name in page for name in ("rCM, 4 calls", "flow map, 16 calls", "DMD2, 1 call", "KD, 8 calls"))
    # DMD2 at its own number of calls is the student that the demo scored before, on the same noise.
    assert summary["frechet_dmd2_4calls"] == pytest.approx(summary["frechet_4step"], rel=1e-3)


@pytest.mark.slow
def test_from_scratch_it_makes_every_part_of_the_stack_and_uses_it(tmp_path: Path) -> None:
    done = quick(tmp_path, "--from-scratch")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made, shipped = tmp_path / "demo" / "toy", TOY
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in shipped.iterdir())
    assert str(shipped) not in done.stdout and "fewstep/toyworld/stack" not in done.stdout  # no command names the shipped one
    codec = (made / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert codec != (shipped / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (tmp_path / "demo" / "students" / "1step" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == codec
    assert json.loads((tmp_path / "demo" / "summary.json").read_text())["frechet_tokenizer"] > 50  # of 40 steps


@pytest.mark.slow
@pytest.mark.skipif(chromium.found() is None, reason="no Chromium here: apt-get install chromium")
def test_both_chains_to_a_causal_student(tmp_path: Path) -> None:
    """`--causal`: every number with its spread, the gate, the films of training's length and ten times as long."""
    done = quick(tmp_path, "--causal")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for who in ("sf", "sf_consistency"):
        for name in ("frechet", "frechet_ratio", "adherence", "long_drift", "long_sink_rise"):
            assert math.isfinite(summary[f"{name}_{who}"]) and math.isfinite(summary[f"{name}_{who}_spread"]), name
            assert summary[f"{name}_{who}_n"] >= 64
        ratio = summary[f"frechet_{who}"] / summary["frechet_4step"]
        assert summary[f"frechet_ratio_{who}"] == pytest.approx(ratio) and summary[f"core_seconds_{who}"] > 1
    text = (tmp_path / "demo" / "report.html").read_text()
    assert "the better chain: distance, as a multiple of the bidirectional student" in text
    with chromium.browser() as page:
        page.open(tmp_path / "demo" / "report.html", 360, 800)
        page.wait("document.documentElement.dataset.ready === 'yes'")
        assert page.errors == [] and page.js("document.documentElement.scrollWidth") <= 360
        # Eight prompts by real, tokenizer, teacher and five students; four long ones by the four causal students.
        assert page.js("document.querySelectorAll('canvas.live').length") == 8 * 8 + 4 * 4
    again = quick(tmp_path, "--causal")
    assert again.returncode == 0 and again.stdout.count("done earlier") == 8
