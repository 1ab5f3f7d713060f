"""The prompts of a command before their clips are made: judged by guardrails, and rewritten by an upsampler.

One model at a time is in memory: it is opened, reads the prompts of all clips, and is released.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from fewstep.errors import UserError, some
from fewstep.inference.coming_from_cosmos import Print
from fewstep.inference.guardrails import Guardrail
from fewstep.inference.request import ClipRequest, GenerateRequest
from fewstep.inference.stages import release_memory


class Blocked(UserError):  # noqa: N818  # reads as what it is
    """Clips that a guardrail does not let pass; the others are made."""

    def __init__(self, reasons: Mapping[str, str], num_clips: int):
        rows = some([f"'{name}' ({reason})" for name, reason in reasons.items()])
        super().__init__(f"{len(reasons)} of {num_clips} clip(s) blocked by a guardrail and not written: {rows}")
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class Prepared:
    """Clips with the prompts that they are made with, and why others are blocked, by name."""

    clips: Sequence[ClipRequest]
    blocked: Mapping[str, str] = field(default_factory=dict[str, str])


def check_plugins(request: GenerateRequest) -> None:
    """Refuses a guardrail or an upsampler that is not there, before anything is opened."""
    for guardrail in request.guardrails:
        guardrail.check()
    if request.upsampler is not None:
        request.upsampler.check()


def prepare(clips: Sequence[ClipRequest], request: GenerateRequest, device: torch.device, say: Print) -> Prepared:
    """The clips whose prompts pass, before and after they are rewritten."""
    judges = [guardrail for guardrail in request.guardrails if guardrail.judges == "prompt"]
    prepared = _judged(Prepared(clips), judges, device, say)
    if request.upsampler is None or not prepared.clips:
        return prepared
    rewritten = _rewritten(prepared.clips, request, device, say)
    return _judged(Prepared(rewritten, prepared.blocked), judges, device, say)


def blocks(guardrail: Guardrail, reason: str) -> str:
    """Why a clip is blocked, with the kind of the guardrail."""
    return f"{guardrail.kind}: {reason}"  # pyright: ignore[reportAttributeAccessIssue]  # @kind sets it


def _judged(prepared: Prepared, judges: Iterable[Guardrail], device: torch.device, say: Print) -> Prepared:
    passed, blocked = list(prepared.clips), dict(prepared.blocked)
    for guardrail in judges:
        if not passed:
            break
        reasons = _reasons(guardrail, passed, device)
        for name, reason in reasons.items():
            say(f"clip '{name}' is blocked: {reason}")
        blocked |= reasons
        passed = [clip for clip in passed if clip.name not in reasons]
    return Prepared(passed, blocked)


def _reasons(guardrail: Guardrail, clips: Sequence[ClipRequest], device: torch.device) -> dict[str, str]:
    judge = guardrail.open(device)
    reasons: dict[str, str] = {}
    for clip in clips:
        if clip.label is not None:
            continue
        unreadable = "it has an embedding instead of a prompt, which no guardrail can read"
        reason = unreadable if clip.embedding is not None else judge(clip.prompt)
        if reason is not None:
            reasons[clip.name] = blocks(guardrail, reason)
    del judge
    release_memory()
    return reasons


def _rewritten(clips: Sequence[ClipRequest], request: GenerateRequest, device: torch.device, say: Print) -> list[ClipRequest]:
    assert request.upsampler is not None
    rewrite = request.upsampler.open(device)
    rewritten: list[ClipRequest] = []
    for clip in clips:
        has_prompt = clip.embedding is None and clip.label is None
        rewritten.append(replace(clip, prompt=rewrite(clip.prompt)) if has_prompt else clip)
        if has_prompt:
            say(f"prompt of '{clip.name}': {rewritten[-1].prompt}")
    del rewrite
    release_memory()
    return rewritten
