"""Every block of docs/tutorials.md runs, with a few iterations and clips in place of hundreds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from shell import ROOT, walk

from fewstep import TOY
from fewstep.data.files import video

BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/tutorials.md").read_text(), flags=re.MULTILINE | re.DOTALL)
FEWER = (
    (r"prepare toyworld", "prepare toyworld --workers 0"),
    (r"--num(-eval)? \d+", r"--num\1 12"),
    (r"trainer\.max_iter=\d+", "trainer.max_iter=2 trainer.batch_size=2"),
    (r"--(kd-iters|iters) \d+", r"--\1 2"),
    (r"--(num-|teacher-)?steps 12", r"--\1steps 8"),
)
MADE = (  # by each tutorial: a film or a file
    "edge_clips/output.mp4", "video_clips/picture.mp4", "quick_student/report.html", "scores_adapted.json",
    "long_clip/output.mp4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_a_tutorial_is_walked(number: int, tmp_path: Path) -> None:
    assert len(BLOCKS) == 1 + len(MADE)
    script = BLOCKS[0] + BLOCKS[number]
    for long, short in FEWER:
        script = re.sub(long, short, script)
    (tmp_path / "tutorial.sh").write_text(script.replace("fewstep/toyworld/stack", str(TOY)))
    walk(str(tmp_path / "tutorial.sh"), tmp_path, real=False)
    made = tmp_path / MADE[number - 1]
    assert made.stat().st_size > 100
    if made.suffix == ".mp4":
        assert video.probe(made).num_frames >= 17
