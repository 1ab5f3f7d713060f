"""What `fewstep evaluate` decides before anything is scored."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fewstep
from fewstep.batch import Batch, Condition
from fewstep.data.files import video
from fewstep.diffusion import StudentSampler, TeacherSampler
from fewstep.evaluation.score import Value, over_sets
from fewstep.inference import latency
from fewstep.inference.clip_sets import Source
from fewstep.inference.evaluate import line, run
from fewstep.inference.evaluation import Evaluation
from fewstep.inference.model import Model, codec_of, open_model
from fewstep.inference.request import SamplerOptions
from fewstep.toyworld.scores import ToyWorld

TOY = str(fewstep.TOY)


def test_a_model_without_a_codec_asks_for_one_and_takes_the_one_that_is_named() -> None:
    whole = open_model(TOY)
    bare = Model(whole.network, whole.spec, whole.sampler, folder=None)  # as a run's own checkpoint is
    with pytest.raises(ValueError, match=r"somebody/run: has no codec beside it\. Add --codec"):
        codec_of(bare, "somebody/run")
    assert codec_of(bare, "somebody/run", TOY).fingerprint == codec_of(whole, TOY).fingerprint


def test_latency_counts_network_calls_and_names_what_a_rate_is_of() -> None:
    """Counted by the network itself: guidance calls it twice a step. The end to end is the sum of the stages."""
    model = open_model(TOY)
    codec, calls = codec_of(model, TOY), [0]
    assert isinstance(model.sampler, TeacherSampler)
    sampler = replace(model.sampler, num_steps=3, guidance=2.0)
    text = torch.zeros(1, 4, 64)
    cond = Condition(text=text, text_mask=torch.ones(1, 4, dtype=torch.bool))
    model.network.module.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    batch = Batch(x0=torch.zeros(1, 3, 17, 32, 32), cond=cond, negative=cond)
    found = latency.measure(model, sampler, codec, batch, "a red sphere is dropped.", 2, "cpu")
    assert found["network_calls"] == 6 == sampler.num_calls
    assert calls[0] in (4 * 6, 4 * 3)  # two timed, one to warm up, one for the decoder; guidance may share a batch
    seconds = found["seconds"]
    assert set(seconds) == {"text", "denoise", "decode", "end_to_end"} and found["has_text"]
    assert all(row["p5"] <= row["median"] <= row["p95"] for row in seconds.values())
    assert found["frames_per_s_denoise_only"] == pytest.approx(17 / seconds["denoise"]["median"])
    assert found["frames_per_s_end_to_end"] == pytest.approx(17 / seconds["end_to_end"]["median"])


def test_guidance_pushes_away_from_the_whole_negative_text() -> None:
    """SDXL and Flux read a pooled vector, too: that of the negative text is another one."""
    model, seen = open_model(TOY), list[Condition]()
    codec = codec_of(model, TOY)
    cond, negative = (Condition(text=torch.full((1, 4, 64), value), pooled=torch.full((1, 6), value)) for value in (1.0, 0.0))

    def sampler(_network: object, noise: torch.Tensor, _cond: Condition, _rng: object, other: Condition) -> torch.Tensor:
        seen.append(other)
        return noise

    class Data:
        def batch(self, index: torch.Tensor) -> Batch:
            return Batch(x0=torch.zeros(1, 3, 5, 32, 32), cond=cond, negative=negative, index=index)

    source = Source(model, sampler, codec, Data())  # pyright: ignore[reportArgumentType]  # as much of them as is used
    source.generated(Evaluation("m", None, None, Path("scores.json"), batch_size=1, device="cpu"), 1, 0)
    assert seen[0].text is not None and seen[0].pooled is not None
    assert not seen[0].text.any() and not seen[0].pooled.any()


def test_what_would_have_no_effect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score is of what was asked for: options of a teacher's sampling are refused elsewhere, not passed over."""
    whole = open_model(TOY)
    student = replace(whole, sampler=StudentSampler((1.0, 0.5), whole.network.path, "fresh"))
    monkeypatch.setattr("fewstep.inference.clip_sets.open_model", lambda _, controls: student)
    monkeypatch.setattr("fewstep.inference.clip_sets.opened", lambda _task, **_more: None)
    here, clips = tmp_path / "x", tmp_path / "clips"
    (clips / "videos").mkdir(parents=True)
    (here / "videos").mkdir(parents=True)
    job = Evaluation("a/student", here, here, here / "x.json", num=512, scorers=(ToyWorld(),))
    with pytest.raises(ValueError, match=r"^this student takes 2 steps"):
        run(replace(job, sampling=SamplerOptions(8)))
    with pytest.raises(ValueError, match=r"^--calls and --num-steps: give one of them"):
        run(replace(job, sampling=SamplerOptions(2), calls=4))
    with pytest.raises(ValueError, match=r"^--guidance: this is a student"):
        run(replace(job, sampling=SamplerOptions(8, guidance=2.0)))
    with pytest.raises(ValueError, match=r"^--calls: .*clips holds clips that are made already"):
        run(replace(job, what=str(clips), calls=4))
    with pytest.raises(ValueError, match=r"^--shift: codec:x is a codec"):
        run(replace(job, what="codec:x", sampling=SamplerOptions(shift=3.0)))
    student = whole
    with pytest.raises(ValueError, match=r"^--calls: finds steps, sampler and shift by itself; leave out --num-steps"):
        run(replace(job, calls=4, sampling=SamplerOptions(8, guidance=2.0)))
    with pytest.raises(ValueError, match=r"^--num 11: a set needs at least 12 clips"):
        run(replace(job, num=11))


def test_a_set_in_which_nothing_could_be_measured_has_no_part_in_the_mean() -> None:
    nan = math.nan

    both = over_sets([Value(1.0, 0.1, 3), Value(2.0, 0.3, 3)])
    assert both == Value(1.5, pytest.approx(math.sqrt(0.5)), 6, (1.0, 2.0))  # type: ignore[comparison-overlap]
    one = over_sets([Value(1.0, 0.1, 3), Value(nan, nan, 0)])
    assert one[:3] == (1.0, 0.1, 3) and math.isnan(one.per_set[1])
    none = over_sets([Value(nan, nan, 0), Value(nan, nan, 0)])
    assert math.isnan(none.value) and math.isnan(none.spread)


def test_clips_in_which_nothing_falls_are_scored_all_the_same(tmp_path: Path) -> None:
    """What a collapsed student makes: no object, so no flight, and no gravity to be fitted. (JSON knows no nan.)"""
    rng = np.random.default_rng(0)
    for where, noise in (("grey", 2), ("real", 60)):
        for n in range(24):
            clip = np.clip(128 + noise * rng.standard_normal((17, 32, 32, 3)), 0, 255).astype(np.uint8)
            video.write(tmp_path / where / "videos" / f"{n}.mp4", clip, 16.0, quality="lossless")
            (tmp_path / where / "metas").mkdir(exist_ok=True)
            (tmp_path / where / "metas" / f"{n}.txt").write_text("a red sphere is dropped.")
    out = tmp_path / "scores.json"
    told = run(Evaluation(str(tmp_path / "grey"), tmp_path / "grey", tmp_path / "real", out, num=12, sets=3))
    assert told is not None
    assert told["notes"][0].startswith("2 of 3 sets: ")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(out.read_text(), parse_constant=refuse) == json.loads(json.dumps(told))
    assert told["scores"]["gravity_ratio"]["value"] is None
    assert told["scores"]["adherence"]["value"] == 0.0 and told["scores"]["frechet"]["value"] > 10
    assert "adherence 0" in line(told)
