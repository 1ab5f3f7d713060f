"""What a model card tells people to run."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fewstep.data.files import video
from fewstep.diffusion import RectifiedFlow, StudentSampler
from fewstep.export.model_card import model_card
from fewstep.inference.card import Envelope, StudentCard


def card(network: dict[str, Any]) -> StudentCard:
    sampler = StudentSampler((1.0, 0.5), RectifiedFlow(), "fresh")
    return StudentCard(sampler=sampler, envelope=Envelope(), network=network, source="run", role="student", step=9)


def code_of(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_the_card_of_a_controlled_student_gives_the_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code, run with the file of a control, hands over what the pipeline reads: 1 3 T H W, -1 to 1."""
    frames = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    video.write(tmp_path / "EDGE.mp4", frames, 8.0, quality="lossless")
    calls: list[tuple[Any, Any]] = []

    def pipe(prompt: str, **words: Any) -> Any:
        calls.append((prompt, words))
        return SimpleNamespace(frames=["a clip"])

    opens = SimpleNamespace(from_pretrained=lambda folder, trust_remote_code: pipe)
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(DiffusionPipeline=opens))
    monkeypatch.chdir(tmp_path)
    text = model_card(card({"kind": "cosmos_control", "controls": ["edge"]}), {}, {}, "diffusers", pipeline=None)
    values: dict[str, Any] = {}
    exec(code_of(text), values)
    ((prompt, words),) = calls
    assert prompt == "PROMPT" and list(words) == ["control"] and values["video"] == "a clip"
    np.testing.assert_allclose(words["control"][0].permute(1, 2, 3, 0).numpy(), frames / 127.5 - 1, atol=1e-6)


def test_a_student_without_a_control_is_called_with_a_prompt_alone() -> None:
    code = code_of(model_card(card({"kind": "wan"}), {}, {}, "diffusers", pipeline=None))
    assert code.splitlines()[0] == "from diffusers import DiffusionPipeline"
    assert code.splitlines()[-1] == 'video = pipe("PROMPT").frames[0]'


def test_the_call_of_a_pipeline_of_diffusers_has_the_students_steps_and_no_guidance() -> None:
    code = code_of(model_card(card({"kind": "wan"}), {}, {}, "diffusers", pipeline="WanPipeline"))
    assert code.splitlines()[-1] == 'video = pipe("PROMPT", num_inference_steps=2, guidance_scale=1.0).frames[0]'
