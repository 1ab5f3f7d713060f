"""student.json: what is written is read; whatever is damaged in it is one error that names the file and the key."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.diffusion import EDM, StudentSampler, TeacherSampler
from fewstep.errors import UserError
from fewstep.inference.card import Envelope, StudentCard
from fewstep.networks.encoders.codecs import Form
from fewstep.networks.tiny import TinySpec

CARD = StudentCard(
    network={"kind": "tiny", "width": 8},
    sampler=StudentSampler((80.0, 2.5), EDM(sigma_data=0.5), "same"),
    envelope=Envelope((4, 3, 8, 8), 9, 64, 64, fps=16.0, num_inference_steps=2, guidance_in_teacher=3.0),
    source="kd",
    role="student.ema",
    step=500,
    notes=("read this",),
    files=("README.md", "student.json"),
    pipeline={"schedule": [{"a": 1.0}], "latent_channels": 4},
)


TEACHER = replace(CARD, sampler=TeacherSampler(num_steps=12, shift=3.0), envelope=Envelope(num_inference_steps=12))


@pytest.mark.parametrize(
    "card", [CARD, TEACHER, StudentCard(network=CARD.network, sampler=CARD.sampler, envelope=Envelope(num_inference_steps=2))]
)
def test_a_card_is_read_as_it_was_written(card: StudentCard, tmp_path: Path) -> None:
    card.write(tmp_path)
    assert StudentCard.read(tmp_path, "Export it again") == card
    assert card.spec() == TinySpec(width=8)


def in_sampler(**change: Any) -> dict[str, Any]:
    return {"sampler": CARD.as_json()["sampler"] | change}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (in_sampler(times=None), r"sampler\.times: expected"),
        (in_sampler(times="soon"), r"sampler\.times"),
        (in_sampler(times=[1.0, "x"]), r"sampler\.times\.1: expected"),
        (in_sampler(renoise="never"), r"sampler\.renoise: expected"),
        (in_sampler(path={"kind": "detour"}), r"sampler\.path: no path is named 'detour'"),
        (in_sampler(path=3), r"sampler\.path: expected"),
        ({"sampler": {"kind": "guess"}}, "sampler: no sampler is named 'guess'"),
        ({"network": None}, "network: needs a mapping"),
        ({"network": {"width": 8}}, "network: needs a mapping with the kind"),
        ({"envelope": []}, "envelope: expected"),
        ({"envelope": {"latent_shape": [1, 2]}}, r"envelope\.latent_shape: expected"),
        ({"envelope": {"fps": "many"}}, r"envelope\.fps: expected"),
        ({"step": "ten"}, "step: expected"),
        ({"notes": [[]]}, r"notes\.0: expected"),
        ({"surprise": 1}, "surprise: no such setting"),
    ],
)
def test_what_is_damaged_is_named_with_its_file_and_key(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(json.dumps(CARD.as_json() | change))
    with pytest.raises(UserError, match=rf"student\.json is damaged: .*{words}.*Export it again") as error:
        StudentCard.read(tmp_path, "Export it again")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["sampler", "network"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    content = CARD.as_json()
    del content[key]
    (tmp_path / "student.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"student\.json is damaged: {key}: needs"):
        StudentCard.read(tmp_path, "Export it again")


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000])
def test_what_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(text)
    with pytest.raises(UserError, match=r"student\.json"):
        StudentCard.read(tmp_path, "Export it again")


def test_an_envelope_of_latents_and_one_of_pixels_are_the_same_through_a_codec() -> None:
    form = Form(channels=4, time=4, space=8, frames_step=4)
    latents, pixels = Envelope(latent_shape=(4, 3, 8, 6)), Envelope(num_frames=9, height=64, width=48)
    assert latents.with_codec(form) == pixels.with_codec(form) == replace(latents, num_frames=9, height=64, width=48)
    pictures = replace(form, sees_time=False)
    assert latents.with_codec(pictures).num_frames == 3
    assert Envelope(fps=8.0).with_codec(form) == Envelope(fps=8.0)
