"""A teacher that was post-trained stays a teacher: from clips to its run, its pairs, its export, and clips with guidance."""

import json
import sys
from pathlib import Path

from fewstep import TOY
from fewstep.inference.teacher import teacher_at

sys.path.insert(0, str(Path(__file__).parent))
from shell import IN_BOTH_FORMS, walk


@IN_BOTH_FORMS
def test_a_finetune_run_makes_pairs_and_its_export_takes_guidance(tmp_path: Path, real: bool) -> None:
    walk("post_trained_teacher.sh", tmp_path, real=real, TOY=str(TOY))
    record = json.loads((tmp_path / "pairs" / "pairs.json").read_text())
    assert record["sampler"]["solver"] == "unipc" and record["path_times"][0] == 1.0
    made = json.loads((tmp_path / "clips" / "output.json").read_text())
    assert made["sampler"]["guidance"] == 2.0 and made["sampler"]["num_steps"] == 4
    weights = (tmp_path / folder / "pairs.json" for folder in ("pairs", "pairs_of_export"))
    assert len({json.loads(path.read_text())["codec"] for path in weights}) == 1
    run, toy = teacher_at(str(tmp_path / "out/toyworld/basic/toy_teacher")), teacher_at(str(TOY))
    assert run.num_weights == toy.num_weights and run.is_small  # the settings of its trainings follow from sizes
