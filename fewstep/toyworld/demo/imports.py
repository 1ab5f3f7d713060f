"""Imported once by the process of which the demo's commands are copies: what every road imports, and the toy world."""

from __future__ import annotations

import fewstep.distill.imports as everything
import fewstep.toyworld.dataset as world

__all__ = ["everything", "world"]
