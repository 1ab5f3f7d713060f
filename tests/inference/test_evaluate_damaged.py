"""A model damaged on purpose is called worse, with an interval, by a score that names the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep.cli import main
from fewstep.evaluation.clips import AnyClips
from fewstep.evaluation.compare import compare
from fewstep.evaluation.features.descriptors import Descriptors
from fewstep.evaluation.features.random_network import RandomNetwork
from fewstep.inference import clip_sets, evaluate
from fewstep.inference.evaluation import Evaluation
from fewstep.inference.model import Model, open_model
from fewstep.inference.request import SamplerOptions

pytestmark = pytest.mark.slow
TOY = str(fewstep.TOY)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Scores the toy teacher at eight steps on 32 held-out prompts, damaged as asked for."""
    root = tmp_path_factory.mktemp("damaged")
    for name, num, seed in (("held", 32, 71), ("real", 64, 72)):
        words = ("--out", str(root / name), "--num", str(num), "--seed", str(seed), "--workers", "1")
        assert main(["prepare", "toyworld", *words]) == 0

    def score(name: str, damage: Callable[[Model], None] = lambda model: None, guidance: float = 2.0, **sampling: Any) -> Path:
        out = root / f"{name}.json"
        with pytest.MonkeyPatch.context() as patch:

            def opened(address: str, **more: object) -> Model:
                model = open_model(address)
                damage(model)
                return model

            patch.setattr(clip_sets, "open_model", opened)
            sampler = SamplerOptions(8, guidance=guidance, **sampling)
            scorer = AnyClips((Descriptors(), RandomNetwork()))
            task = Evaluation(
                TOY,
                root / "held",
                root / "real",
                out,
                32,
                1,
                sampling=sampler,
                max_tokens=40,
                mask_text=True,
                scorers=(scorer,),
            )
            evaluate.run(replace(task, keep=0))
        return out

    return score


def noised(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    for number, tensor in enumerate(model.network.module.parameters()):
        if number % 3 == 0:
            tensor.data += 0.7 * tensor.data.std().nan_to_num(0) * torch.randn(tensor.shape, generator=generator)


def test_noised_weights_too_much_guidance_and_a_wrong_schedule_are_called_worse(scored: Callable[..., Path]) -> None:
    intact = scored("intact")
    again = scored("again")
    assert {row.verdict for row in compare([intact, again])} <= {"no difference", "not measured"}
    damaged = {
        "noised": scored("noised", noised),
        "doubled": scored("doubled", guidance=4.0),
        "guided": scored("guided", guidance=8.0),
        "schedule": scored("schedule", shift=0.1),
    }
    for name, path in damaged.items():
        worse = {row.score: row for row in compare([intact, path]) if row.verdict == "worse"}
        # What the damage did to the clips; guidance that is only doubled does not make them flicker yet.
        reasons = {"sharpness", "motion", "flicker", "warping_error", "niqe_like"} & worse.keys()
        assert reasons and all(worse[score].low > 0 and worse[score].how == "clip by clip" for score in reasons), (name, worse)
        if name == "noised":  # too much guidance makes clips flicker, and hardly moves the distances of 32 clips
            assert any(score.startswith("mmd_") and row.how == "same halves" for score, row in worse.items()), sorted(worse)
