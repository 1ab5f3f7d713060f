"""Whether clips show what their prompts say: a judge looks at a clip and a prompt, and gives a number.

    fewstep evaluate CLIPS --scorer adherence judge=clip judge.folder=CLIP_FOLDER --out scores.json
    fewstep evaluate CLIPS --scorer adherence judge=toyworld --out scores.json

`clip` is any CLIP of transformers in a folder. A judge of the user's own (a language model, a detector) is one class in a
file given with `--config`:

    @kind("my_judge", group="judge")
    @dataclass(frozen=True)
    class MyJudge(Judge):
        def scores(self, clips, prompts):                # clips: a list of uint8 T H W 3
            return [ask(clip, prompt) for clip, prompt in zip(clips, prompts)]

A raw score says little, since many prompts fit many clips: beside it stands the score of the same clips with the prompts of
others, which is chance.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch

from fewstep.config import OneOf, kind
from fewstep.errors import UserError
from fewstep.evaluation.features.contract import device, evenly, hash_of
from fewstep.evaluation.fidelity import of_anchor, split_anchors
from fewstep.evaluation.measured import Divisible, Measured
from fewstep.evaluation.score import Clip, ClipSet, Need, Record, Score, mean_over_clips
from fewstep.untrusted.text import fault_of

OTHERS = "the prompts of other clips"
_BATCH = 8  # clips that a judge receives together


class Judge(ABC):
    """Gives each clip a number for its prompt; higher is better."""

    label: ClassVar[str]  # what a reader calls it

    @property
    def fingerprint(self) -> str:
        """A hash of what decides its numbers, beyond its settings."""
        return ""

    @abstractmethod
    def scores(self, clips: Sequence[Clip], prompts: Sequence[str]) -> Sequence[float]:
        """One number for each clip."""


AnyJudge = Annotated[Judge, OneOf("judge")]


@kind("clip", group="judge")
@dataclass(frozen=True)
class ClipJudge(Judge):
    """Cosine of the embeddings of frames and prompt by a CLIP of transformers, mean over frames; weights from a folder."""

    folder: Path = Path("clip")  # of CLIPModel.save_pretrained, with its processor
    frames: int = 8  # of each clip, spread evenly

    label = "CLIP"

    @property
    def fingerprint(self) -> str:
        return _opened(self.folder)[2]

    def scores(self, clips: Sequence[Clip], prompts: Sequence[str]) -> list[float]:
        model, processor, _ = _opened(self.folder)
        out: list[float] = []
        for clip, prompt in zip(clips, prompts, strict=True):
            pictures = list(clip[evenly(self.frames, len(clip))])
            inputs = processor(text=[prompt], images=pictures, return_tensors="pt", padding=True, truncation=True).to(device())
            with torch.inference_mode():
                embeddings = model(**inputs)
            out.append(float((embeddings.image_embeds @ embeddings.text_embeds.T).mean()))
        return out


@functools.cache
def _opened(folder: Path) -> tuple[Any, Any, str]:
    from transformers import CLIPModel, CLIPProcessor

    if not (folder / "config.json").is_file():
        raise UserError(f"judge.folder: {folder} holds no CLIP. Give the folder that CLIPModel and CLIPProcessor were saved in")
    with fault_of(folder):
        own: dict[str, Any] = {"local_files_only": True}
        model: Any = CLIPModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **own)
        processor = CLIPProcessor.from_pretrained(folder, trust_remote_code=False, **own)
    return model.eval().to(device()), processor, hash_of(model.state_dict())


@kind("adherence", group="scorer")
@dataclass(frozen=True)
class Adherence(Divisible):
    """Whether clips show what their prompts say, by a judge: judge=clip, judge=toyworld, or one of your own."""

    judge: AnyJudge = ClipJudge()

    needs: ClassVar[frozenset[Need]] = frozenset({"prompts"})

    @property
    def legend(self) -> Sequence[Score]:
        return (
            Score(
                "prompt_score", "Prompt adherence", f"How well clips fit their prompts, by {self.judge.label}.", "higher", True
            ),
        )

    def protocol(self) -> Mapping[str, Any]:
        return {"features": {"judge": self.judge.fingerprint}}

    def measured(self, samples: ClipSet, numbers: Sequence[int]) -> Measured:
        prompts, num = samples.prompts, len(samples.clips)
        per_clip: dict[int, dict[str, float]] = {}
        for first in range(0, len(numbers), _BATCH):
            some = numbers[first : first + _BATCH]
            clips = [samples.clips[number] for number in some]
            own = self.judge.scores(clips, [prompts[number] for number in some])
            others = self.judge.scores(clips, [prompts[(number + max(1, num // 2)) % num] for number in some])
            for number, value, chance in zip(some, own, others, strict=True):
                per_clip[number] = {"prompt_score": float(value), **of_anchor(OTHERS, {"prompt_score": float(chance)})}
        return Measured(per_clip=per_clip)

    def summary(self, measured: Measured, samples: ClipSet, reference: Any) -> Record:
        columns, anchors = split_anchors(measured.columns())
        scores = {name: mean_over_clips(values) for name, values in columns.items()}
        return Record(f"prompts by {self.judge.label}", scores, anchors=anchors, per_clip=columns)
