"""Guardrails of `fewstep generate`: plug-ins that judge a prompt before its clip is made, or the frames after.

    --guardrail blocklist=words.txt                      words that no prompt may have, one a line
    --guardrail llama_guard=meta-llama/Llama-Guard-3-1B  a language model that answers "safe" or "unsafe"
    --guardrail text_classifier=FOLDER                   a classifier of texts, with a label for what is safe
    --guardrail frame_classifier=FOLDER                  a classifier of pictures, asked for every 8th frame

None is on by default. One that is asked for is closed: where its model is missing or damaged no clip is made, and whatever it
does not call safe is blocked. One of your own is a class like those below in a file given with --config.
"""

from __future__ import annotations

import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fewstep.config import OneOf, kind
from fewstep.errors import UserError
from fewstep.inference import pretrained
from fewstep.untrusted.text import read_text

Judge = Callable[[Any], "str | None"]  # of a prompt (str) or of frames (uint8 T H W 3): why it is blocked; None: it passes
SAFE_LABELS = ("safe", "normal", "sfw", "neutral", "benign", "non-toxic", "not_toxic")


class Guardrail(ABC):
    """A guardrail's settings. The first field of a class is what follows `=` on the command line."""

    judges: ClassVar[Literal["prompt", "frames"]]

    def check(self) -> None:  # noqa: B027  # one that needs nothing leaves it as it is
        """Raises UserError if something that it needs is not there. Reads no weights."""

    @abstractmethod
    def open(self, device: Any) -> Judge:  # Any: torch.device, which this file does not import
        """What judges a prompt or frames. Raises UserError if it cannot be opened."""


AnyGuardrail = Annotated[Guardrail, OneOf("guardrail")]


@kind("blocklist", group="guardrail")
@dataclass(frozen=True)
class Blocklist(Guardrail):
    """Blocks prompts that contain a word or phrase of a text file, one a line; # begins a comment."""

    judges: ClassVar[Literal["prompt", "frames"]] = "prompt"

    path: str

    def check(self) -> None:
        self._words()

    def open(self, device: Any) -> Judge:
        words = self._words()

        def judge(prompt: str) -> str | None:
            text = f" {_plain(prompt)} "
            return next((f"it contains {word!r}" for word in words if f" {word} " in text), None)

        return judge

    def _words(self) -> list[str]:
        try:
            lines = read_text(self.path).splitlines()
        except (OSError, UserError) as error:
            raise UserError(f"the guardrail's list of words {self.path} cannot be read: {error}") from None
        words = [word for line in lines if (word := _plain(line.partition("#")[0]))]
        if not words:
            raise UserError(f"the guardrail's list of words {self.path} is empty")
        return words


@kind("llama_guard", group="guardrail")
@dataclass(frozen=True)
class LlamaGuard(Guardrail):
    """Blocks prompts that a causal language model of the Llama Guard kind does not answer with "safe".

    Its categories are in its chat template. Answers of Qwen3Guard ("Safety: Safe") are understood, too.
    """

    judges: ClassVar[Literal["prompt", "frames"]] = "prompt"

    model: str  # folder or hub id
    max_new_tokens: int = 32

    def check(self) -> None:
        pretrained.expect(self.model, "guardrail")

    def open(self, device: Any) -> Judge:
        from transformers import AutoModelForCausalLM

        tokenizer = pretrained.tokenizer(self.model)
        if not tokenizer.chat_template:
            raise UserError(f"{self.model}: is no guardrail of this kind, its tokenizer has no chat template")
        model = pretrained.load(AutoModelForCausalLM, self.model, device)

        def judge(prompt: str) -> str | None:
            answer = pretrained.continuation(
                model, tokenizer, pretrained.chat(tokenizer, ("user", prompt)), self.max_new_tokens
            )
            verdict = next(iter(answer.splitlines()), "").strip().lower()
            is_safe = re.fullmatch(r"(safety:\s*)?safe", verdict) is not None
            return None if is_safe else f"the model answers {' '.join(answer.split())[:80]!r}"

        return judge


@dataclass(frozen=True)
class _Classifier(Guardrail):
    model: str  # folder or hub id
    safe: tuple[str, ...] = SAFE_LABELS  # labels that pass, in lower case; all others are blocked

    def check(self) -> None:
        labels = {str(label).lower() for label in pretrained.expect(self.model, "guardrail").get("id2label", {}).values()}
        if not labels & set(self.safe):
            names = ", ".join(sorted(labels)) or "none"
            raise UserError(
                f"{self.model}: none of its labels ({names}) is known as safe ({', '.join(self.safe)}): say which is with "
                f"--guardrail {self.kind}={self.model},safe=[LABEL]"  # pyright: ignore[reportAttributeAccessIssue]  # @kind sets it
            )

    def reason(self, model: Any, logits: Any) -> str | None:
        """Why one row of logits is blocked."""
        probabilities = logits.float().softmax(-1)
        place = int(probabilities.argmax())
        label = str(model.config.id2label[place])
        return None if label.lower() in self.safe else f"{label} ({float(probabilities[place]):.2f})"


@kind("text_classifier", group="guardrail")
@dataclass(frozen=True)
class TextClassifier(_Classifier):
    """Blocks prompts whose most probable label, by a sequence classifier, is none of `safe`."""

    judges: ClassVar[Literal["prompt", "frames"]] = "prompt"

    def open(self, device: Any) -> Judge:
        import torch
        from transformers import AutoModelForSequenceClassification

        self.check()
        model, tokenizer = (
            pretrained.load(AutoModelForSequenceClassification, self.model, device),
            pretrained.tokenizer(self.model),
        )

        @torch.no_grad()
        def judge(prompt: str) -> str | None:
            ids = tokenizer(prompt, return_tensors="pt", truncation=True).to(device)
            return self.reason(model, model(input_ids=ids.input_ids, attention_mask=ids.attention_mask).logits[0])

        return judge


@kind("frame_classifier", group="guardrail")
@dataclass(frozen=True)
class FrameClassifier(_Classifier):
    """Blocks clips of which a frame's most probable label, by a classifier of pictures such as SigLIP's, is none of `safe`."""

    judges: ClassVar[Literal["prompt", "frames"]] = "frames"

    every: int = 8  # asked for each 8th frame and the last

    def open(self, device: Any) -> Judge:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        from fewstep.networks.files.folders import load_reader

        self.check()
        processor = load_reader(AutoImageProcessor, self.model, backend="pil")  # the other one needs torchvision
        model = pretrained.load(AutoModelForImageClassification, self.model, device)
        dtype = next(model.parameters()).dtype

        @torch.no_grad()
        def judge(frames: Any) -> str | None:
            for place in sorted({*range(0, len(frames), self.every), len(frames) - 1}):
                pixels = processor(images=[frames[place]], return_tensors="pt").pixel_values.to(device, dtype)
                reason = self.reason(model, model(pixel_values=pixels).logits[0])
                if reason is not None:
                    return f"frame {place} is {reason}"
            return None

        return judge


def _plain(text: str) -> str:
    """Lower case, without accents, with single spaces for whatever is neither letter nor digit."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", letters))
