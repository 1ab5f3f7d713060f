"""A teacher that was post-trained stays a teacher: from clips to its run, its pairs, its export, and clips with guidance."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fewstep import TOY


def test_a_finetune_run_makes_pairs_and_its_export_takes_guidance(tmp_path: Path) -> None:
    environment = os.environ | {"OUTPUT_ROOT": "out"}
    data, run = "datasets/toyworld/train", "out/toyworld/basic/toy_teacher"
    pairs = f"--num 2 --steps 4 --max-tokens 40 --mask-text --codec {TOY}"
    for command in (
        f"prepare toyworld --out {data} --num 8 --seed 11 --only videos,metas",
        f"prepare text {data} --encoder {TOY}",
        f"prepare latents {data} --codec {TOY}",
        "train experiment=toy_teacher trainer.max_iter=1 optim.warmup_iters=0 trainer.batch_size=4",
        f"pairs {run} {data} --out pairs --path-times 2 {pairs}",
        f"export {run} --out exported --base {TOY}",
        f"pairs exported {data} --out pairs_of_export {pairs}",
        "generate exported --out clips --seed 3 --guidance 2 --num-steps 4 --num-frames 17 --height 32 --width 32 --prompt",
    ):
        words = [sys.executable, "-m", "fewstep", *command.split()]
        words += ["a red sphere rolls right"] if command.endswith("--prompt") else []
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    record = json.loads((tmp_path / "pairs" / "pairs.json").read_text())
    assert record["sampler"]["solver"] == "unipc" and record["path_times"][0] == 1.0
    made = json.loads((tmp_path / "clips" / "output.json").read_text())
    assert made["sampler"]["guidance"] == 2.0 and made["sampler"]["num_steps"] == 4
    weights = (tmp_path / folder / "pairs.json" for folder in ("pairs", "pairs_of_export"))
    assert len({json.loads(path.read_text())["codec"] for path in weights}) == 1
