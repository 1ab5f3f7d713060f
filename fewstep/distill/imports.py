"""Imported once by the process of which the commands of a road are copies: what they all would import, and nothing else.

No import here may start a thread, which a copy would not have.
"""

from __future__ import annotations

import os
from importlib import import_module

from fewstep.registry import entries, groups

for name in (
    "diffusers.models",
    "fewstep.cli",
    "fewstep.inference.evaluate",
    "fewstep.inference.generate",
    "fewstep.prepare.commands",
    "fewstep.training.command",
):
    import_module(name)
for group in groups():
    entries(group)
os.setsid()  # a closed terminal ends the road, which then waits for the copies; their server has to live as long
