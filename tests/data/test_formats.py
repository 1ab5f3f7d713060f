"""docs/formats.md: its examples run, and make a data set."""

import re
from pathlib import Path

import pytest
import torch

from fewstep.data.controls import Edge
from fewstep.data.folder.dataset import Folder

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_examples_make_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        exec(block, names)
    batch = Folder("DIR", num_frames=17, control=Edge(), pairs=("noise", "path")).open().batch(torch.tensor([0]))
    assert batch.x0 is not None and batch.x0.shape == (1, 3, 17, 64, 64)
    latents = Folder("DIR", x0="latents", pairs=("noise", "path")).open().batch(torch.tensor([0]))
    assert latents.x0 is not None and latents.x0.shape == (1, 16, 5, 8, 8)
