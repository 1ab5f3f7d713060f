"""The command `fewstep generate`: our names, those of the original tools, files of prompts."""

from __future__ import annotations

import json
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import ConfigError
from fewstep.inference.coming_from_cosmos import ALWAYS, WITHOUT_EFFECT, Control
from fewstep.inference.command import read_command
from fewstep.inference.guardrails import Blocklist
from fewstep.inference.request import SamplerOptions
from fewstep.inference.upsamplers import CausalLm

SEED_COMMAND = (  # posttraining_video2world.md, "Running the inference"
    "--checkpoint_dir checkpoints --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained "
    "--input_image_or_video_path assets/diffusion/video2world_input0.jpg --num_input_frames 1 --offload_prompt_upsampler "
    "--video_save_name diffusion-video2world-7b-post-trained"
)


def test_the_inference_command_of_the_seed_is_read() -> None:
    told: list[str] = []
    asked = read_command(SEED_COMMAND.split(), told.append)
    assert asked.model == "checkpoints/Cosmos-Predict1-7B-Video2World_post-trained"
    (request,) = asked.clips
    assert (request.name, request.num_input_frames) == ("diffusion-video2world-7b-post-trained", 1)
    assert request.source == Path("assets/diffusion/video2world_input0.jpg")
    assert asked.out == Path("outputs")
    assert asked.published_guidance
    assert told == [
        "warning: there is no --prompt. The original's upsampler would describe the picture; here the prompt is empty"
    ]


def test_guidance_is_that_of_cosmos_in_a_command_of_cosmos_and_says_so() -> None:
    told: list[str] = []
    text = ["m", "--prompt", "a"]
    assert read_command([*text, "--guidance", "8"], told.append).sampling.guidance == 8
    assert not told
    assert read_command(["--video_save_name=a", *text, "--guidance", "7"], told.append).sampling.guidance == 8
    assert "w = 8" in told[0]
    assert read_command([*text, "--video_save_name", "a", "--guidance_scale", "3.0"], told.append).sampling.guidance == 3
    assert read_command(text).sampling == SamplerOptions()
    assert not read_command(text).published_guidance
    with pytest.raises(ConfigError, match="not both"):
        read_command(["m", "--guidance", "1", "--guidance_scale", "2"])


def test_a_command_of_cosmos_without_guidance_takes_that_of_the_original(tmp_path: Path) -> None:
    for command, wanted in (
        ("m --prompt a", False),
        ("m --prompt a --video_save_name a", True),
        ("m --prompt a --video_save_name a --guidance 0", False),
        ("m --prompt a --video_save_name a --guidance_scale 1", False),
        (f"m -i {tmp_path / 's.json'}", True),
    ):
        (tmp_path / "s.json").write_text('{"prompt": "a"}')
        assert read_command(command.split(), lambda text: None).published_guidance is wanted, command


def test_controls_of_specs_are_found_below_the_checkpoint_dir(tmp_path: Path) -> None:
    specs = tmp_path / "s.json"
    specs.write_text('{"prompt": "a", "edge": {"control_weight": 1.0}, "depth": {"input_control": "d.mp4"}}')
    place = "C/nvidia/Cosmos-Transfer1-7B"
    wanted = f"{place}/base_model.pt+edge={place}/edge_control.pt+depth={place}/depth_control.pt"
    command = ["--controlnet_specs", str(specs), "--input_video_path", "a.mp4"]
    assert read_command(["--checkpoint_dir", "C", *command], lambda text: None).model == wanted
    assert read_command(command, lambda text: None).model == wanted.replace("C/", "checkpoints/")
    assert read_command(["m", *command], lambda text: None).model == "m"
    (tmp_path / "tokenizer").mkdir()
    for folder, name, codec in ((tmp_path, "tokenizer", str(tmp_path / "tokenizer")), ("C", "tokenizer", "tokenizer")):
        request = read_command(["--checkpoint_dir", str(folder), "--tokenizer_dir", name, *command], lambda text: None)
        assert request.codec == codec


def test_every_name_of_the_predict1_and_transfer1_tools_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "visual_input": "a.mp4"}\n\n{"prompt": "b"}\n')
    names = (
        "--checkpoint_dir c --diffusion_transformer_dir d --tokenizer_dir t --negative_prompt n --guidance 7 --num_steps 35 "
        "--num_video_frames 121 --height 704 --width 1280 --fps 24 --seed 1 --num_gpus 4 --video_save_folder o --sigma_max 70 "
        "--disable_prompt_upsampler --offload_diffusion_transformer --offload_tokenizer --offload_text_encoder_model "
        "--offload_guardrail_models --disable_guardrail --prompt_upsampler_dir p --offload_prompt_upsampler --use_distilled "
        "--save_input_noise --benchmark"
    )
    asked = read_command([*names.split(), "--batch_input_path", str(tmp_path / "x.jsonl")], lambda text: None)
    assert (asked.sampling.num_steps, asked.num_frames, asked.height, asked.width, asked.fps) == (35, 121, 704, 1280, 24)
    assert (asked.sampling.sigma_max, asked.codec, asked.student_only, asked.save_noise) == (70, "t", True, True)
    first, second = asked.clips
    assert (first.name, first.prompt, first.source, first.num_input_frames, first.seed) == ("x_0000", "a", Path("a.mp4"), 1, 1)
    assert (second.name, second.source, second.seed, second.negative) == ("x_0001", None, 2, "n")


CONTROL = {"edge": Control()}
# Each argument of the inference commands in the original documents and in the READMEs that these name: what it becomes. A name
# with a dot is a field of the clip. docs/coming-from-cosmos.md has the same names.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "--checkpoint_dir C --diffusion_transformer_dir D": {"model": "C/D"},
    "--tokenizer_dir t": {"codec": "t"},
    "--input_image_or_video_path a.jpg": {".source": Path("a.jpg"), ".num_input_frames": 1},
    "--input_video_path a.mp4 --control edge": {".source": Path("a.mp4"), ".num_input_frames": 0, ".control": CONTROL},
    "--input_image_or_video_path a.mp4 --num_input_frames 9": {".num_input_frames": 9},
    "--prompt red": {".prompt": "red"},
    "--negative_prompt n": {".negative": "n"},
    "--num_steps 35": {"sampling.num_steps": 35},
    "--num_video_frames 121": {"num_frames": 121},
    "--height 704": {"height": 704},
    "--width 1280": {"width": 1280},
    "--fps 24": {"fps": 24.0},
    "--seed 1": {".seed": 1},
    "--sigma_max 70": {"sampling.sigma_max": 70.0},
    "--guidance 7": {"sampling.guidance": 7.0},
    "--guidance 7 --video_save_name a": {"sampling.guidance": 8.0},
    "--guidance_scale 3.0": {"sampling.guidance": 3.0},
    "--video_save_name v": {".name": "v"},
    "--video_save_folder o": {"out": Path("o")},
    "-o o": {"out": Path("o")},
    "--num_gpus 1": {"shard": False, "context": 1},
    "--use_distilled": {"student_only": True},
    "--save_input_noise": {"save_noise": True},
    "--inference-type=text2world": {".num_input_frames": 0},
    "--inference-type=video2world --input_path a.mp4": {".num_input_frames": 5},
    "--model=2B/distilled": {"model": "m"},
    "--num_frames_per_chunk 93 --num_ar_conditional_frames 5": {"chunk_frames": 93, "overlap": 5},
    "--chunk_size 77 --chunk_overlap 1": {"chunk_frames": 77, "overlap": 1},
    "--num_conditional_frames 1": {"overlap": 1},
    "--offload_diffusion_transformer": {"offload": {"network"}},
    "--offload_tokenizer": {"offload": {"codec"}},
    "--offload_guardrail_models": {"offload": {"guardrail"}},
    "--disable_guardrail": {"guardrails": ()},
    "--guardrail=blocklist=words.txt": {"guardrails": (Blocklist("words.txt"),)},
    "--disable_prompt_upsampler": {"upsampler": None},
    "--prompt_upsampler_dir p": {"upsampler": CausalLm("p")},
    "--prompt_upsampler_dir p --upsample_prompt": {"upsampler": CausalLm("p")},
    "--prompt_upsampler_dir p --disable_prompt_upsampler": {"upsampler": None},
    **{f"--{name}": {"model": "m"} for name in (*ALWAYS, *WITHOUT_EFFECT)},
}


@pytest.mark.parametrize("words", ARGUMENTS)
def test_each_argument_of_the_original_inference_commands_is_known_and_mapped_in_the_docs(words: str) -> None:
    told: list[str] = []
    model = [] if "diffusion_transformer_dir" in words else ["m"]
    asked = read_command([*model, "--prompt", "red", *words.split()], told.append)
    for name, value in ARGUMENTS[words].items():
        found = getattr(asked.clips[0], name[1:]) if name.startswith(".") else attrgetter(name)(asked)
        assert found == value, name
    page = (Path(__file__).parents[2] / "docs" / "coming-from-cosmos.md").read_text()
    for word in words.replace("=", " ").split():
        if word.startswith("-") and word != "--control":
            assert f"`{word}" in page or f" {word}" in page, word
    if words[2:] in WITHOUT_EFFECT:
        assert told == [f"warning: {words} has no effect: {WITHOUT_EFFECT[words[2:]]}"]


def test_a_specification_of_predict2_5_and_transfer2_5_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"prompt": "a robot"}')
    spec = {
        "name": "robot",
        "prompt_path": str(tmp_path / "p.json"),
        "video_path": "in.mp4",
        "guidance": 3,
        "seed": 2025,
        "num_steps": 4,
        "edge": {"control_path": "e.mp4", "control_weight": 0.5, "canny_threshold": "high"},
        "vis": {"control_weight": 0.5},
    }
    (tmp_path / "s.json").write_text(json.dumps(spec))
    told: list[str] = []
    asked = read_command(["folder", "-i", str(tmp_path / "s.json"), "-o", "out", "--model=edge/distilled"], told.append)
    assert (asked.model, asked.out, asked.sampling.num_steps, asked.sampling.guidance) == ("folder", Path("out"), 4, 4.0)
    (request,) = asked.clips
    assert (request.name, request.prompt, request.source, request.seed) == ("robot", "a robot", Path("in.mp4"), 2025)
    assert request.control == {"edge": Control(Path("e.mp4"), 0.5, "high"), "vis": Control(None, 0.5)}
    assert "because of -i" in told[0] and "--model edge/distilled says only that it is a student" in told[1]
    (tmp_path / "s.json").write_text(json.dumps({"inference_type": "image2world", "input_path": "a.png", "prompt": "x"}))
    (request,) = read_command(["m", "-i", str(tmp_path / "s.json")]).clips
    assert (request.num_input_frames, request.source) == (1, Path("a.png"))
    for wrong, said in (
        ({"resolution": "720"}, "unrecognized arguments: --resolution=720"),
        ({"edge": {"mask_path": "m.mp4"}}, "control edge: has 'mask_path', which is not read"),
        ({"inference_type": "x2y"}, "is none of text2world"),
        ({"name": "../../robot", "prompt": "x"}, "must be a plain file name"),
        (
            {"edge": {"canny_threshold": "strong"}},
            "its preset 'strong' is none of none, very_low, low, medium, high, very_high",
        ),
        ({"edge": {"blur_strength": "low"}}, "control edge: has 'blur_strength', which is not read"),
        ({"edge": {"control_weight": "w.pt"}}, "maps of weights"),
        ({"edge": {"control_weight": -1}}, "must not be negative"),
    ):
        (tmp_path / "s.json").write_text(json.dumps(wrong))
        with pytest.raises(ConfigError, match=said):
            read_command(["m", "-i", str(tmp_path / "s.json")])
    with pytest.raises(ConfigError, match="names of released models are not known"):
        read_command(["--model=2B/distilled", "--prompt", "a"])


def test_controls_by_name_and_by_a_spec_file(tmp_path: Path) -> None:
    spec = {
        "prompt": "a street",
        "input_video_path": "in.mp4",
        "sigma_max": 70,
        "edge": {"control_weight": 0.5},
        "depth": {"control_weight": 0.25, "input_control": "depth.mp4", "ckpt_path": "x"},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    asked = read_command(["m", "--controlnet_specs", str(tmp_path / "spec.json"), "--sigma_max", "80"])
    (request,) = asked.clips
    assert (request.prompt, request.source, request.num_input_frames) == ("a street", Path("in.mp4"), 0)
    assert request.control == {"edge": Control(None, 0.5), "depth": Control(Path("depth.mp4"), 0.25)}
    assert asked.sampling.sigma_max == 80  # the command line wins
    ours = read_command(["m", "--prompt", "p", "--control", "edge", "--control", "depth=d.mp4", "--input", "v.mp4"]).clips[0]
    assert ours.control == {"edge": Control(), "depth": Control(Path("d.mp4"))}
    row = {"prompt": "p", "name": "n", "control_overrides": {"edge": {"input_control": "e.mp4"}}, "seed": 9}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments = ["m", "--controlnet_specs", str(tmp_path / "spec.json"), "--prompts", str(tmp_path / "rows.jsonl")]
    with pytest.raises(ConfigError, match="--prompt or --prompts, not both"):
        read_command(arguments)
    (tmp_path / "spec.json").write_text(json.dumps({key: value for key, value in spec.items() if key != "prompt"}))
    changed = read_command(arguments).clips[0]
    assert changed.control["edge"] == Control(Path("e.mp4"), 0.5)
    assert (changed.name, changed.seed) == ("n", 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m", "--promt", "a"], "unrecognized arguments: --promt"),
        (["--prompt", "a"], "which model"),
        (["m", "--sampler", "ddim"], "invalid choice: 'ddim'"),
        (["m", "--num-input-frames", "1"], "needs --input"),
        (["m", "--prompts", "nowhere.txt"], "no such file"),
        (["m", "--num_gpus", "8"], "torchrun --nproc_per_node=8"),
        (["m", "--out", "clip.mp4"], "clip.mp4: names a folder"),
        (["m", "--controlnet_specs", "nowhere.json"], "--controlnet-specs nowhere.json: No such file or directory"),
        (["m", "--prompt", "a", "--num_video_frames", "0"], "--num_video_frames (here --num-frames) 0: at least 1"),
        (["m", "--prompt", "a", "--guidance", "nan"], "argument --guidance: nan is no finite number"),
        (["m"], "there is no prompt: give --prompt TEXT"),
        (["m", "--prompt", "a", "--name", "../../x"], "'../../x': must be a plain file name"),
        (["m", "--prompt", "a", "--name", ".."], "must be a plain file name"),
        (["m", "--prompt", "a", "--quality", "good"], "a CRF from 0 to 51, not 'good'"),
        (["m", "--prompt", "a", "--height", "0"], "--height 0: at least 1"),
        (["m", "--prompt", "a", "--fps", "0"], "--fps 0: above 0"),
        (["m", "--prompt", "a", "--guardrail"], "--guardrail: which one? no clip is made without it"),
        (["m", "--guardrail", "--prompt", "a"], "--guardrail KIND=ADDRESS; kinds are blocklist"),
        (["m", "--prompt", "a", "--guardrail", "none=x"], "there is no kind 'none'"),
        (["m", "--prompt", "a", "--guardrail", "blocklist"], "give its path: --guardrail blocklist=PATH"),
        (["m", "--prompt", "a", "--guardrail", "blocklist=a", "--disable_guardrail"], "not both"),
        (["m", "--prompt", "a", "--upsampler"], "--upsampler: which one?"),
        (["m", "--prompt", "a", "--upsample_prompt"], "with which model? Add --upsampler causal_lm=FOLDER"),
    ],
)
def test_wrong_use_is_refused_with_what_to_do(arguments: list[str], said: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_command(arguments)


def test_rows_of_prompts_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for text, said in (
        ('{"prompt": "a", "sed": 3}', "a row has 'sed'"),
        ("{", "line 1: is no json"),
        ("[1]", "is no json object"),
        ("\n", "is empty"),
        ('{"name": "../../a", "prompt": "a"}', "must be a plain file name"),
        ('{"name": "..", "prompt": "a"}', "must be a plain file name"),
        ('{"seed": 3}', "a row has no prompt"),
        ('{"prompt": 3}', "prompt of a row is 3, which is no str"),
        ('{"prompt": "a", "seed": "b"}', "seed of a row is 'b', which is no int"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_command(["m", "--prompts", str(path)])
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    found = read_command(["m", "--prompts", str(tmp_path / "p.txt"), "--name", "x", "--seed", "5"]).clips
    assert [(r.name, r.prompt, r.seed) for r in found] == [("x_0000", "one", 5), ("x_0001", "two", 6)]
