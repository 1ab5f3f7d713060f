"""Post-training for a shifted world, and what of it a student can have: four ways, on the toy stack. JSON on the last line.

    python benchmarks/portability.py STUDENT_RUN [--out portability] [--seeds 3] [--iters 300]

STUDENT_RUN is a four-step student of the shipped teacher (`fewstep demo` trains one: demo/toyworld/basic/toy_dmd2_4step). The
new world has objects of darker colours that fall twice as fast. The teacher is post-trained on 1024 clips of it, in full and
with adapters of rank 16; the student then gets there by

    distil     the adapters on the teacher, and DMD2 against that teacher, from the old student
    lay on     the teacher's adapters on the old student
    train on   adapters trained on the old student itself, by flow matching
    add        what the full post-training changed, added to the old student; equal to the student's delta on the tuned teacher

Each is scored on the new world by `fewstep evaluate`. Every step is a public command, printed before it runs; what is done is
not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.toyworld.demo.stages import SERIES, TOY

SHIFT = ("--gravity", "2", "--palette", "deep")
TEXT = ("--max-tokens", "40", "--mask-text")
TEACHER = ("--num-steps", "12", "--guidance", "2")
RANK = 16
SCORES = ("frechet", "adherence", "recall", "gravity_ratio")


@dataclass
class Bench:
    out: Path
    student: str
    iters: int
    num: int
    seconds: dict[str, float] = field(default_factory=dict)

    def fewstep(self, *words: str) -> None:
        print(f"$ OUTPUT_ROOT={self.out} fewstep {shlex.join(words)}", flush=True)
        environment = os.environ | {"OUTPUT_ROOT": str(self.out), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        subprocess.run([sys.executable, "-m", "fewstep", *words], check=True, env=environment, stdout=sys.stderr)

    def prepare(self) -> None:
        for world, shift in (("old", ()), ("new", SHIFT)):
            for name, num in (("heldout", 256), ("real", 1024), ("world", 1024)):
                folder = self.out / world / name
                if world == "old" and name == "world":
                    continue
                self.fewstep(
                    *("prepare", "toyworld", "--out", str(folder), "--num", str(num), "--seed", str(SERIES[name] + 1000)),
                    *("--workers", "0", "--only", "videos,metas", *shift),
                )
            for name in ("heldout", "world") if shift else ("heldout",):
                if not (self.out / world / name / "t5_xxl").is_dir():
                    self.fewstep("prepare", "text", str(self.out / world / name), "--text-encoder", str(TOY))
        if not (self.out / "new/world/latents").is_dir():
            self.fewstep("prepare", "latents", str(self.out / "new/world"), "--codec", str(TOY))

    def train(self, name: str, recipe: str, *settings: str, iters: int | None = None) -> str:
        """The address of the run, trained where it has not been."""
        start = time.monotonic()
        if not (self.out / "portability/runs" / name / "summary.json").is_file():
            self.fewstep(
                *("train", f"experiment={recipe}", "job.project=portability", "job.group=runs", f"job.name={name}"),
                *(f"data.dataset_dir={self.out}/new/world", f"trainer.max_iter={iters or self.iters}", "trainer.batch_size=32"),
                *("trainer.num_threads=1", *settings),
            )
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        run = f"portability/runs/{name}"
        self.seconds[name] = json.loads((self.out / run / "summary.json").read_text())["wall_s"]
        return run

    def export(self, run: str, name: str, *options: str) -> Path:
        folder = self.out / "models" / name
        if not folder.is_dir():
            self.fewstep("export", run, "--out", str(folder), *options)
        return folder

    def student_with(self, name: str, *files: Path) -> Path:
        adds = [word for file in files for word in ("--add", str(file))]
        return self.export(self.student, name, "--format", "diffusers", "--base", str(TOY), *adds)

    def score(self, model: Path | str, name: str, world: str, *options: str) -> dict[str, float]:
        file = self.out / "scores" / f"{name}_{world}.json"
        if not file.is_file():
            folder = self.out / world
            self.fewstep(
                *("evaluate", str(model), "--prompts", str(folder / "heldout"), "--real", str(folder / "real"), *TEXT),
                *("--out", str(file), "--num", str(self.num), "--sets", "1", "--keep", "2", *options),
            )
        scores = json.loads(file.read_text())["scores"]
        print(name, world, {key: round(scores[key]["value"], 3) for key in SCORES}, flush=True)
        return {key: scores[key]["value"] for key in SCORES}


def of_seed(bench: Bench, seed: int) -> dict[str, dict[str, float]]:
    """The scores of the post-trained teachers, and of the student by each way."""
    drawn = f"trainer.seed={seed}"
    full = bench.train(f"full_{seed}", "finetune", f"teacher={TOY}", drawn)
    lora = bench.train(f"lora_{seed}", "lora", f"teacher={TOY}", f"rank={RANK}", drawn)
    full_delta = bench.export(full, f"full_{seed}_delta", "--format", "delta") / "delta.safetensors"
    full_teacher = bench.export(full, f"full_{seed}", "--base", str(TOY))
    lora_file = bench.export(lora, f"lora_{seed}_file", "--format", "lora") / "pytorch_lora_weights.safetensors"
    lora_teacher = bench.export(lora, f"lora_{seed}", "--base", str(TOY))
    distilled = bench.train(
        *(f"distil_{seed}", "toy_dmd2_4step", f"networks.teacher.pretrained={lora_teacher}", drawn, "job.after=[]"),
        f"networks.student.init={bench.student}@latest:student.ema",
    )
    weights = bench.export(bench.student, "student_weights", "--format", "safetensors") / "student.safetensors"
    own = bench.train(f"own_{seed}", "lora", f"teacher={TOY}", f"rank={RANK}", f"networks.teacher_init={weights}", drawn)
    own_file = bench.export(own, f"own_{seed}_file", "--format", "lora") / "pytorch_lora_weights.safetensors"
    rows = {
        "teacher, full": bench.score(full_teacher, f"full_{seed}", "new", *TEACHER),
        "teacher, adapters": bench.score(lora_teacher, f"lora_{seed}", "new", *TEACHER),
        "distil": bench.score(
            bench.export(distilled, f"distil_{seed}", "--format", "diffusers", "--base", str(TOY)), f"distil_{seed}", "new"
        ),
        "lay on": bench.score(bench.student_with(f"lay_on_{seed}", lora_file), f"lay_on_{seed}", "new"),
        "train on": bench.score(bench.student_with(f"train_on_{seed}", own_file), f"train_on_{seed}", "new"),
        "add": bench.score(bench.student_with(f"add_{seed}", full_delta), f"add_{seed}", "new"),
    }
    if seed == 0:  # what is forgotten
        rows["teacher, full, old world"] = bench.score(full_teacher, f"full_{seed}", "old", *TEACHER)
        rows["teacher, adapters, old world"] = bench.score(lora_teacher, f"lora_{seed}", "old", *TEACHER)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("--out", type=Path, default=Path("portability"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--num", type=int, default=128, help="clips in an evaluation set, at most 256")
    options = parser.parse_args()
    bench = Bench(options.out.resolve(), str(Path(options.student).resolve()), options.iters, options.num)
    bench.prepare()
    student = bench.student_with("student")
    before = {
        "teacher": bench.score(str(TOY), "teacher", "new", *TEACHER),
        "student": bench.score(student, "student", "new"),
        "teacher, old world": bench.score(str(TOY), "teacher", "old", *TEACHER),
    }
    seeds = [of_seed(bench, seed) for seed in range(options.seeds)]
    rows: dict[str, Any] = {name: {key: [value] for key, value in scores.items()} for name, scores in before.items()}
    rows |= {name: {key: [seed[name][key] for seed in seeds if name in seed] for key in SCORES} for name in seeds[0]}
    print("\n| | " + " | ".join(SCORES) + " |\n|---|" + "---|" * len(SCORES))
    for name, scores in rows.items():
        cells = [
            f"{statistics.mean(v):.2f}" + (f" ({min(v):.2f} to {max(v):.2f})" if len(v) > 1 else "") for v in scores.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    found = {
        "benchmark": "portability",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "iters": options.iters,
        "num": options.num,
        "rows": rows,
        "seconds": bench.seconds,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
