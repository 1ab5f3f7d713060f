"""The command `fewstep generate`: our names, those of the seeds' tools, files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.config import ConfigError
from fewstep.inference.asked import Control, read_command

SEED_COMMAND = (  # posttraining_video2world.md, "Running the inference"
    "--checkpoint_dir checkpoints --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained "
    "--input_image_or_video_path assets/diffusion/video2world_input0.jpg --num_input_frames 1 --offload_prompt_upsampler "
    "--video_save_name diffusion-video2world-7b-post-trained"
)


def test_the_inference_command_of_the_seed_is_read() -> None:
    told: list[str] = []
    asked = read_command(SEED_COMMAND.split(), told.append)
    assert asked.model == "checkpoints/Cosmos-Predict1-7B-Video2World_post-trained"
    (request,) = asked.requests
    assert (request.name, request.num_input_frames) == ("diffusion-video2world-7b-post-trained", 1)
    assert request.source == Path("assets/diffusion/video2world_input0.jpg")
    assert asked.out == Path("outputs")
    assert told == ["warning: --offload_prompt_upsampler has no effect: there is no prompt upsampler"]


def test_guidance_is_that_of_cosmos_in_a_command_of_cosmos_and_says_so() -> None:
    told: list[str] = []
    assert read_command(["m", "--guidance", "8"], told.append).guidance == 8
    assert not told
    assert read_command(["--video_save_name=a", "m", "--guidance", "7"], told.append).guidance == 8
    assert "w = 8" in told[0]
    assert read_command(["m", "--video_save_name", "a", "--guidance_scale", "3.0"], told.append).guidance == 3
    assert read_command(["m"]).guidance == 1
    with pytest.raises(ConfigError, match="not both"):
        read_command(["m", "--guidance", "1", "--guidance_scale", "2"])


def test_every_name_of_the_predict1_and_transfer1_tools_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "visual_input": "a.mp4"}\n\n{"prompt": "b"}\n')
    names = (
        "--checkpoint_dir c --diffusion_transformer_dir d --tokenizer_dir t --negative_prompt n --guidance 7 --num_steps 35 "
        "--num_video_frames 121 --height 704 --width 1280 --fps 24 --seed 1 --num_gpus 4 --video_save_folder o --sigma_max 70 "
        "--disable_prompt_upsampler --offload_diffusion_transformer --offload_tokenizer --offload_text_encoder_model "
        "--offload_guardrail_models --disable_guardrail --prompt_upsampler_dir p --upsample_prompt --use_distilled "
        "--save_input_noise --benchmark"
    )
    asked = read_command([*names.split(), "--batch_input_path", str(tmp_path / "x.jsonl")], lambda text: None)
    assert (asked.num_steps, asked.num_frames, asked.height, asked.width, asked.fps) == (35, 121, 704, 1280, 24)
    assert (asked.sigma_max, asked.codec, asked.wants_student, asked.save_noise) == (70, "t", True, True)
    first, second = asked.requests
    assert (first.name, first.prompt, first.source, first.num_input_frames, first.seed) == ("x_0000", "a", Path("a.mp4"), 1, 1)
    assert (second.name, second.source, second.seed, second.negative) == ("x_0001", None, 2, "n")


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
    (request,) = asked.requests
    assert (request.prompt, request.source, request.num_input_frames) == ("a street", Path("in.mp4"), 0)
    assert request.control == {"edge": Control(None, 0.5), "depth": Control(Path("depth.mp4"), 0.25)}
    assert asked.sigma_max == 80  # the command line wins
    ours = read_command(["m", "--control", "edge", "--control", "depth=d.mp4", "--input", "v.mp4"]).requests[0]
    assert ours.control == {"edge": Control(), "depth": Control(Path("d.mp4"))}
    row = {"prompt": "p", "name": "n", "control_overrides": {"edge": {"input_control": "e.mp4"}}, "seed": 9}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    arguments = ["m", "--controlnet_specs", str(tmp_path / "spec.json"), "--prompts", str(tmp_path / "rows.jsonl")]
    with pytest.raises(ConfigError, match="--prompt or --prompts, not both"):
        read_command(arguments)
    (tmp_path / "spec.json").write_text(json.dumps({key: value for key, value in spec.items() if key != "prompt"}))
    changed = read_command(arguments).requests[0]
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
        (["m", "--controlnet_specs", "nowhere.json"], "controlnet_specs nowhere.json"),
    ],
)
def test_wrong_use_is_refused_with_what_to_do(arguments: list[str], said: Any) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        read_command(arguments)


def test_rows_of_prompts_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for text, said in (
        ('{"prompt": "a", "sed": 3}', "a row has 'sed'"),
        ("{", "line 1: is no json"),
        ("[1]", "is no json object"),
        ("\n", "is empty"),
        ('{"name": "../../a"}', "must be a file's name"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_command(["m", "--prompts", str(path)])
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    found = read_command(["m", "--prompts", str(tmp_path / "p.txt"), "--name", "x", "--seed", "5"]).requests
    assert [(r.name, r.prompt, r.seed) for r in found] == [("x_0000", "one", 5), ("x_0001", "two", 6)]
