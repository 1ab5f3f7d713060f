"""Files of scores written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def record(folder: Path, name: str, more: Mapping[str, Any] | None = None, **values: float | None) -> Path:
    """Headline scores of 8 clips with a spread of .3 each; frechet is better where it is lower, recall where it is higher."""
    about: dict[str, Any] = {"title": "", "meaning": "", "is_headline": True}
    better = {"frechet": "lower", "recall": "higher"}
    legend = [about | {"name": score, "better": better.get(score, "as real")} for score in values]
    scores = {score: {"value": value, "spread": 0.3, "num": 8} for score, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "what": name,
        "legend": legend,
        "scores": scores,
        "sets": [{"per_clip": {}}],
        "protocol": {},
        **(more or {}),
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / f"{name}.json"
