"""Adapters on one backbone against full copies, by what they learn: DMD2 on the toy world. JSON on the last line.

    python benchmarks/lora_roles.py [--out lora_roles] [--steps 4] [--iters 350] [--batch 32] [key=value ...]

Two runs from the same start, the shipped teacher, on the same data, noise and number of iterations: student and critic as full
copies, and as adapters (the recipe toy_dmd2_4step_lora or toy_dmd2_1step_lora). Each is scored by `fewstep evaluate`; `start`
is the student of no iterations. The value is the distance of the adapters over that of the full copies. Every step is a public
command, told before it runs; what is done is not done again. `key=value` goes to the run with adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.toyworld.demo.stages import SERIES, TOY

BOUND = 1.15
FULL = ("networks.student.network=none", "networks.student.init=teacher", "networks.critic=full", "job.after=[]")
START = ("optim.lr=1e-12", "optim.warmup_iters=0", "critic_optim.lr=1e-12")  # one iteration that moves nothing


def fewstep_(out: Path, *words: str) -> None:
    print(f"$ OUTPUT_ROOT={out} fewstep {shlex.join(words)}", flush=True)
    environment = os.environ | {"OUTPUT_ROOT": str(out), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([sys.executable, "-m", "fewstep", *words], check=True, env=environment, stdout=sys.stderr)


def prepare(out: Path, num: int) -> None:
    """Prompts and shapes to learn from, prompts to be scored on, and clips that everything is compared with."""
    for name, count in (("world", 1536), ("heldout", num), ("real", 2048)):
        if not (out / name).is_dir():
            where = ("--out", str(out / name), "--num", str(count), "--seed", str(SERIES[name]), "--workers", "1")
            fewstep_(out, "prepare", "toyworld", *where, "--only", "videos,metas")
    for name in ("world", "heldout"):
        if not (out / name / "t5_xxl").is_dir():
            fewstep_(out, "prepare", "text", str(out / name), "--encoder", str(TOY))
    if not (out / "world" / "latents").is_dir():
        fewstep_(out, "prepare", "latents", str(out / "world"), "--codec", str(TOY))


def distance(out: Path, name: str, recipe: str, num: int, sets: int, *settings: str) -> dict[str, Any]:
    """The toy Frechet distance of a run's student, trained first where it has not been."""
    run, model, scores = f"toyworld/basic/{name}", str(out / "students" / name), out / "scores" / f"{name}.json"
    if not scores.is_file():
        fewstep_(out, "train", f"experiment={recipe}", f"job.name={name}", *settings)
        where = ("--prompts", str(out / "heldout"), "--real", str(out / "real"), "--out", str(scores))
        fewstep_(out, "export", run, "--out", model, "--format", "diffusers", "--base", str(TOY))
        text = ("--max-tokens", "40", "--mask-text")
        fewstep_(out, "evaluate", model, *where, *text, "--num", str(num), "--sets", str(sets))
    told = json.loads((out / run / "summary.json").read_text())
    found = json.loads(scores.read_text())["scores"]["frechet"]
    print(f"{name}: toy Frechet {found['value']:.1f} +- {found['spread']:.1f}, n {found['num']}", flush=True)
    return {
        **{key: found[key] for key in ("value", "spread", "num", "per_set")},
        "summary": {key: told[key] for key in ("step", "samples", "wall_s", "peak_memory_gib")},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("lora_roles"))
    parser.add_argument("--steps", type=int, choices=(1, 4), default=4)
    parser.add_argument("--iters", type=int, default=350)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--num", type=int, default=512, help="clips in an evaluation set")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--name", default="lora", help="of the run with adapters: another for other settings")
    asked, settings = parser.parse_known_args()
    out, recipe = asked.out.resolve(), f"toy_dmd2_{asked.steps}step"
    prepare(out, asked.num)
    sizes = (f"trainer.batch_size={asked.batch}", f"checkpoint.save_iter={min(asked.iters, 50)}")
    iters, sets = f"trainer.max_iter={asked.iters}", (asked.num, asked.sets)
    first = (*FULL, *START, sizes[0], "trainer.max_iter=1", "trainer.log_every=1")
    found = {
        "full": distance(out, f"{recipe}_full", recipe, *sets, *FULL, *sizes, iters),
        "lora": distance(out, f"{recipe}_{asked.name}", f"{recipe}_lora", *sets, *sizes, iters, *settings),
        "start": distance(out, f"{recipe}_start", recipe, *sets, *first),
    }
    full, lora = found["full"], found["lora"]
    ratio = lora["value"] / full["value"]
    print(
        json.dumps(
            {
                "name": f"lora_roles_{asked.steps}step",
                "value": ratio,
                "unit": "of the distance of full roles",
                "bound": BOUND,
                "better": "lower",
                "runs": asked.sets,
                "spread": ratio * ((lora["spread"] / lora["value"]) ** 2 + (full["spread"] / full["value"]) ** 2) ** 0.5,
                "iterations": asked.iters,
                "batch": asked.batch,
                "settings": settings,
                "measured": found,
                "device": platform.processor() or platform.machine() or "cpu",
                "versions": {"torch": torch.__version__, "fewstep": fewstep.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
