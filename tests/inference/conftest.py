"""Small models that the tests of `fewstep generate` share: none of them changes one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.config import dump
from fewstep.data.files import video

sys.path.insert(0, str(Path(__file__).parent))
from generating import FIRST, NET, TIMES, write_parts


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_parts(folder)
    module: Any = NET.build().module
    module.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Cosmos2_5_PredictBasePipeline"}))
    return folder


@pytest.fixture(scope="session")
def student(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `fewstep export` writes it."""
    folder = tmp_path_factory.mktemp("student")
    write_parts(folder)
    module: Any = NET.build().module
    module.save_pretrained(folder / "transformer")
    sampler = {"kind": "student", "times": TIMES, "renoise": "fresh", "path": {"kind": "rectified_flow"}}
    told: dict[str, Any] = {"sampler": sampler, "envelope": FIRST}
    told["network"] = {"kind": "cosmos", **dump(NET)}
    (folder / "student.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (13, 16, 16, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    video.write(path, frames, 8.0, quality="lossless")
    return path
