"""The commands of docs/own-data.md, pasted: a folder of clips and a tiny Wan pipeline to a student; a teacher adapted before or
afterwards. A tiny training stands for a long one; nothing else is added."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # run from anywhere
from shell import IN_BOTH_FORMS, ROOT, walk
from tiny_pipelines import clips, wan

PAGE = (ROOT / "docs" / "own-data.md").read_text()
SHORT = {  # what is added to the commands of the page
    "train": " trainer.max_iter=3 trainer.batch_size=4 checkpoint.save_iter=3 trainer.log_every=1",
    "pairs": " --steps 8 --num 4",
    "generate": " --device cpu",
    "evaluate": " --num 4 --sets 1",
}
PLAIN = """
import sys
sys.modules["fewstep"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
asked = {"num_inference_steps": int(sys.argv[2]), "guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 9}
frames = pipe("a red square", generator=torch.Generator().manual_seed(0), output_type="np", **asked).frames
print(type(pipe).__name__, frames.shape, float(frames.std()))
"""


def commands(heading: str) -> list[str]:
    """The commands of a section of the page, with a short training."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```bash\n(.*?)```", section, re.S) for line in block.splitlines()]
    bare = [re.sub(r"\s+#.*", "", line).replace("TEACHER", "teacher") for line in lines]
    return [line + SHORT.get(line.split()[1], "") for line in bare]


def pasted(folder: Path, real: bool, *headings: str) -> None:
    script = folder / "story.sh"
    script.write_text("export OUTPUT_ROOT=.\n" + "\n".join(line for name in headings for line in commands(name)) + "\n")
    walk(str(script), folder, real=real)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    wan(folder / "teacher")
    clips(folder / "clips", num=4)
    return folder


@IN_BOTH_FORMS
def test_own_clips_to_a_student(world: Path, tmp_path: Path, real: bool) -> None:
    folder = Path(shutil.copytree(world, tmp_path / "own"))
    pasted(folder, real, "By hand")
    index = json.loads((folder / "student" / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"  # upstream's own samples it: shift 5 is that of a published scheduler
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["num_calls"] == 4 and scores["scores"]
    teacher, kd, student = (weights(folder / place) for place in ("teacher", "runs/own/kd", "student"))
    assert changed(teacher, student) and changed(kd, student) and changed(teacher, kd)
    if real:
        done = subprocess.run([sys.executable, "-c", PLAIN, "student", "4"], cwd=folder, capture_output=True, text=True)
        assert done.stdout.startswith("WanPipeline (1, 9, 32, 32, 3)"), done.stdout + done.stderr


def weights(place: Path) -> torch.Tensor:
    """A weight matrix that every training changes, of a folder or of a run's moving average."""
    if (place / "transformer").is_dir():
        tensors = load_file(place / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        from fewstep.networks.weights.addresses import read

        tensors = read(str(place))
    return tensors["blocks.0.ffn.net.2.weight"].float()


def changed(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-6)


@pytest.mark.slow
def test_a_teacher_is_adapted_before_or_after_it_is_distilled(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world, tmp_path / "own"))
    pasted(folder, False, "By hand", "A teacher of one's own first, or afterwards")
    base, adapted, first, later = (
        weights(folder / name) for name in ("teacher", "adapted", "student_adapted", "student_later")
    )
    assert changed(base, adapted) and changed(adapted, first) and changed(adapted, later)
    card = json.loads((folder / "adapted" / "student.json").read_text())
    assert card["sampler"]["kind"] == "teacher"
    for name, steps in (("student_adapted", 2), ("student_later", 4)):
        assert json.loads((folder / name / "student.json").read_text())["num_inference_steps"] == steps
        done = subprocess.run([sys.executable, "-c", PLAIN, name, str(steps)], cwd=folder, capture_output=True, text=True)
        words: Any = done.stdout.split()
        assert words[0] == "WanPipeline" and np.isfinite(float(words[-1])), done.stdout + done.stderr
