"""The names that scripts of other people import: docs/rooms.md, "What holds still"."""

import re
import runpy
from pathlib import Path

import pytest

import fewstep

ROOT = Path(__file__).parent.parent


def test_what_holds_still_can_be_imported() -> None:
    page = (ROOT / "docs/rooms.md").read_text()
    block = re.search(r"## What holds still\n.*?```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    names: dict[str, object] = {}
    exec(block[1], names)
    for name in (
        *("EDM", "RectifiedFlow", "TrigFlow", "VP", "Prediction", "on_path", "guided", "Rng", "samplers", "GaussianMixture"),
        *("Finetune", "KD", "DMD2", "load_pickle"),
        *("frechet_distance", "precision_recall", "blur_ssim", "canny_f1", "depth_rmse", "mean_iou"),
    ):
        assert name in names, name


def test_every_name_of_the_package_itself_is_there_and_no_other() -> None:
    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trainn'"):
        _ = fewstep.trainn


@pytest.mark.filterwarnings("default")  # as in a notebook
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    runpy.run_path(str(ROOT / "examples/notebook.py"), run_name="__main__")
    said = capsys.readouterr().out
    distance = re.search(r"energy distance to the data: (\S+)", said)
    assert distance is not None and float(distance[1]) < 0.02, said
    assert "2 clips, B C T H W: (2, 3, " in said
