"""`fewstep generate` with controls equals the pieces by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.batch import Condition
from fewstep.config import dump
from fewstep.data.files import video
from fewstep.diffusion import Rng, StudentSampler
from fewstep.inference.model import open_model
from fewstep.networks.encoders.codecs import open_codec
from fewstep.networks.encoders.text import open_text_encoder
from fewstep.networks.families.cosmos.control import CosmosControlSpec

sys.path.insert(0, str(Path(__file__).parent))
from generating import FIRST, NET, TIMES, made, write_parts


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with branches for edge and depth."""
    spec = CosmosControlSpec(
        **{f: getattr(NET, f) for f in NET.__dataclass_fields__}, controls=("edge", "depth"), num_control_blocks=2
    )
    torch.manual_seed(0)
    network = spec.build()
    for weight in network.module.parameters():
        weight.data = torch.randn_like(weight) * 0.2
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("controlled")
    write_parts(folder)
    state = {name: value.contiguous().clone() for name, value in network.module.state_dict().items()}
    save_file(state, folder / "student.safetensors")
    sampler = {"kind": "student", "times": TIMES, "renoise": "same", "path": {"kind": "rectified_flow"}}
    told: dict[str, Any] = {"sampler": sampler, "envelope": FIRST}
    told["network"] = {"kind": "cosmos_control", **dump(spec)}
    (folder / "student.json").write_text(json.dumps(told))
    return folder


@torch.no_grad()
def test_controls_are_encoded_or_made_from_the_input(controlled: Path, tmp_path: Path, clip: Path) -> None:
    folder = controlled
    asked = [str(folder), "--prompt", "a ball", "--input", str(clip)]
    made(tmp_path / "made", *asked, "--control", "edge")
    from fewstep.data.controls import Edge, made_of

    edges = made_of(Edge(), video.read(clip, 0, 9).frames, 0)
    video.write(tmp_path / "edges.mp4", edges, 8.0, quality="lossless")
    made(tmp_path / "file", *asked, "--control", f"edge={tmp_path / 'edges.mp4'}")
    first, second = (video.read(tmp_path / name / "output.mp4").frames for name in ("made", "file"))
    np.testing.assert_array_equal(first, second)
    made(tmp_path / "both", *asked, "--control", "edge", "--control", f"depth={clip}")
    assert (video.read(tmp_path / "both" / "output.mp4").frames != first).any()
    with pytest.raises(ValueError, match="control 'depth' cannot be made from a video here, as edge and vis can"):
        made(tmp_path / "x", *asked, "--control", "depth")
    with pytest.raises(ValueError, match="control 'seg': this network is led by edge, depth"):
        made(tmp_path / "x", *asked, "--control", f"seg={clip}")


@torch.no_grad()
def test_a_long_clip_begins_with_given_frames_and_follows_two_weighted_controls(
    controlled: Path, tmp_path: Path, clip: Path
) -> None:
    """As a loop by hand: each chunk has its slice of the controls, whose weights of 1.5 in all are scaled down to 1."""
    from fewstep.data.controls import Edge, made_of

    frames = video.read(clip).frames
    depth = np.ascontiguousarray(frames[:, ::-1])
    video.write(tmp_path / "depth.mp4", depth, 8.0, quality="lossless")
    spec = {
        "prompt": "a ball",
        "input_video_path": str(clip),
        "edge": {"control_weight": 0.9, "canny_threshold": "low"},
        "depth": {"control_weight": 0.6, "input_control": str(tmp_path / "depth.mp4")},
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    asked = [str(controlled), "--controlnet_specs", str(tmp_path / "spec.json"), "--num_input_frames", "5", "--seed", "3"]
    made(tmp_path / "out", *asked, "--num-frames", "13", "--overlap", "5", "--save-controls")
    model, codec = open_model(controlled), open_codec(controlled)
    network = replace(model.network, control_weights={"edge": 0.6, "depth": 0.4})  # type: ignore[type-var]
    text, text_mask = open_text_encoder(controlled).encode(["a ball"])

    def pixels(part: np.ndarray) -> Tensor:
        return torch.from_numpy(part.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    signals = {"edge": made_of(Edge("low"), frames, 3), "depth": depth}
    begins, clips = pixels(frames[:5]), list[Tensor]()
    assert isinstance(model.sampler, StudentSampler)
    for number, first in enumerate((0, 4)):
        given = codec.encode(torch.cat([begins, begins[:, :, -1:].expand(-1, -1, 4, -1, -1)], 2))
        control = {name: codec.encode(pixels(signal[first : first + 9])) for name, signal in signals.items()}
        mask = torch.tensor([[1.0, 1.0, 0.0]])
        cond = Condition(text, text_mask, frames=given, frame_mask=mask, control=control, fps=torch.tensor([8.0]))
        rng = Rng(0, number, [3])
        clips.append(codec.decode(model.sampler(network, rng.normal((2, 3, 4, 4)), cond, rng)))
        begins = clips[-1][:, :, -5:].clamp(-1, 1)
    whole = torch.cat([clips[0], clips[1][:, :, 5:]], 2).clamp(-1, 1)
    wanted = ((whole + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()[0]
    np.testing.assert_array_equal(video.read(tmp_path / "out" / "output.mp4").frames, wanted)
    for name, signal in signals.items():
        np.testing.assert_array_equal(video.read(tmp_path / "out" / name / "output.mp4").frames, signal)
