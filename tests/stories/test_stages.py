"""A stage of the demo: lanes side by side, commands of a lane in order, a failure that ends its lane alone, no second run."""

import sys
from pathlib import Path

import pytest

from fewstep.distill.stages import Stage, run


def says(file: Path, text: str, then: str = "") -> tuple[str, ...]:
    return (sys.executable, "-c", f"open({str(file)!r}, 'a').write({text!r}); {then}")


def test_lanes_keep_their_order_and_a_done_stage_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    slow = (sys.executable, "-c", f"import time\nwhile open({str(b)!r}).read() != '12': time.sleep(.05)")
    b.write_text("")
    stage = Stage("both", "two lanes", ((slow, says(a, "1")), (says(b, "1"), says(b, "2"))))  # the first waits for the second
    run(stage, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1", "12")
    run(stage, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1", "12")
    assert "done earlier" in capsys.readouterr().out


def test_a_command_that_fails_ends_its_lane_and_the_stage_is_to_be_run_again(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    fails = says(a, "1", "raise SystemExit(3)")
    stage = Stage("one", "one of two fails", ((fails, says(a, "2")), (says(b, "1"), says(b, "2"))))
    with pytest.raises(ValueError, match="stage 'one' failed"):
        run(stage, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1", "12")
    mended = Stage("one", "now it does not", ((says(a, "x"),), (says(b, "x"),)))
    run(mended, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1x", "12x")
