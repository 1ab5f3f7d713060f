"""Whose turn it is in methods that train the student and its critic alternately."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Warmup:
    steps: int = 0  # first turns of the run, all of one role
    role: Literal["student", "critic"] = "critic"  # student: Predict2.5


def is_student_turn(step: int, student_update_freq: int, warmup: Warmup) -> bool:
    """Turns 0, freq, 2 freq, .. are the student's, counted from the start of the run whatever the warm-up is."""
    if step < warmup.steps:
        return warmup.role == "student"
    return step % student_update_freq == 0


def problems_of_frequency(student_update_freq: int) -> Iterable[tuple[str, str]]:
    if student_update_freq < 1:
        yield "student_update_freq", f"must be at least 1 (1: every turn is the student's), not {student_update_freq}"
    elif student_update_freq == 1:
        yield "warn:student_update_freq", "is 1: the critic is never trained after the warm-up"
