"""Prompt upsamplers of `fewstep generate`: plug-ins that rewrite a short prompt into the long ones that models are trained on.

    --upsampler causal_lm=Qwen/Qwen2.5-7B-Instruct

None is on by default. One that is asked for and missing stops the command. NAME.txt has the prompt that was used, NAME.json has
both. One of your own is a class like the one below in a file given with --config.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fewstep.config import OneOf, kind
from fewstep.errors import UserError
from fewstep.inference import pretrained

INSTRUCTION = (
    "You write prompts for a video generator. Rewrite the user's prompt as one paragraph of at most 120 words that describes "
    "the scene, its objects, their motion, the light and the camera. Keep everything the prompt says, and add nothing that "
    "contradicts it. Answer with the paragraph alone."
)


class Upsampler(ABC):
    """An upsampler's settings. The first field of a class is what follows `=` on the command line."""

    def check(self) -> None:  # noqa: B027  # one that needs nothing leaves it as it is
        """Raises UserError if something that it needs is not there. Reads no weights."""

    @abstractmethod
    def open(self, device: Any) -> Callable[[str], str]:  # Any: torch.device, which this file does not import
        """What rewrites one prompt. Raises UserError if it cannot be opened."""


AnyUpsampler = Annotated[Upsampler, OneOf("upsampler")]


@kind("causal_lm", group="upsampler")
@dataclass(frozen=True)
class CausalLm(Upsampler):
    """A causal language model that follows instructions. It does not sample: the same prompt is always rewritten alike."""

    model: str  # folder or hub id
    instruction: str = INSTRUCTION
    max_new_tokens: int = 256

    def check(self) -> None:
        config = pretrained.expect(self.model, "prompt upsampler")
        if "vision_config" in config:
            raise UserError(f"{self.model}: reads pictures as well; this upsampler is for language models that read text alone")

    def open(self, device: Any) -> Callable[[str], str]:
        from transformers import AutoModelForCausalLM

        self.check()
        tokenizer = pretrained.tokenizer(self.model)
        model = pretrained.load(AutoModelForCausalLM, self.model, device)

        def rewrite(prompt: str) -> str:
            if tokenizer.chat_template:
                ids = pretrained.chat(tokenizer, ("system", self.instruction), ("user", prompt))
            else:
                ids = tokenizer(f"{self.instruction}\n\nPrompt: {prompt}\nParagraph:", return_tensors="pt")
            text = " ".join(pretrained.continuation(model, tokenizer, ids, self.max_new_tokens).split())
            if not text:
                raise UserError(f"the prompt upsampler {self.model} answers nothing to {prompt!r}. Leave --upsampler out")
            return text

        return rewrite
