"""Imported once by the process of which the demo's commands are copies: what they all would import, and nothing else.

No import here may start a thread, which a copy would not have.
"""

from __future__ import annotations

import os

import diffusers.models  # noqa: F401

import fewstep.cli
import fewstep.inference.evaluate
import fewstep.inference.generate
import fewstep.inference.pairs
import fewstep.prepare.commands
import fewstep.toyworld.dataset
import fewstep.training.command  # noqa: F401
from fewstep.registry import entries, groups

for group in groups():
    entries(group)
os.setsid()  # a closed terminal ends the demo, which then waits for the copies; their server has to live as long
