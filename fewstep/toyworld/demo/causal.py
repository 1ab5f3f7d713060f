"""`fewstep demo --causal`: two chains from the toy teacher to a student that streams, side by side at equal cost.

    pairs -> toy_kd_causal -> toy_sf                                                FastGen's three stages
    toy_causal_finetune -> toy_causal_consistency -> toy_sf_consistency             without pairs
    toy_kd_4step -> toy_dmd2_4step                                                  the bidirectional student beside them

Each chain has one core in every stage, and the iterations of the second are cut to what pairs and CausalKD take; the page shows
the seconds of both.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from fewstep.distill.stages import Command, Stage
from fewstep.toyworld.demo.stages import PLANS, STEPS, TEXT, TOY, Size, beginning, evaluation, kept_for_the_page, shared
from fewstep.toyworld.recipes import GUIDANCE, STUDENT_SHIFT

NUM_LONG, LONG_FRAMES = 64, 197  # clips of ten times the latent frames of training: 1 + 4 x 49
STUDENTS = {  # the name of its scores, and its run
    "kd_causal": "toy_kd_causal",
    "consistency": "toy_causal_consistency",
    "sf": "toy_sf",
    "sf_consistency": "toy_sf_consistency",
}
TITLES = {
    "real": "real clips",
    "tokenizer": "tokenizer",
    "teacher": f"teacher, {STEPS} steps",
    "4step": "bidirectional student, 4 steps",
    "kd_causal": "CausalKD",
    "consistency": "causal consistency",
    "sf": "CausalKD, then Self-Forcing",
    "sf_consistency": "consistency, then Self-Forcing",
}
LEARNING: dict[Size, dict[str, int]] = {  # iterations of 32 clips
    "quick": {"kd": 20, "finetune": 20, "consistency": 20, "sf": 20},
    "default": {"kd": 600, "finetune": 300, "consistency": 150, "sf": 300},
    "long": {"kd": 2000, "finetune": 800, "consistency": 500, "sf": 1200},
}


def stages(out: Path, size: Size) -> list[Stage]:
    plan, much, toy = PLANS[size], LEARNING[size], str(TOY)
    world, heldout, pairs = (str(out / name) for name in ("world", "heldout", "pairs"))

    def train(recipe: str, iters: int) -> Command:
        sizes = (f"trainer.max_iter={iters}", f"checkpoint.save_iter={min(iters, 50)}", "health.every=none", "preview=none")
        sizes += ("trainer.batch_size=8",) if size == "quick" else ()
        return (f"OUTPUT_ROOT={out}", "fewstep", "train", f"experiment={recipe}", *sizes)

    def runs_of(*recipes: str) -> tuple[Path, ...]:
        return tuple(out / "toyworld" / "basic" / recipe for recipe in recipes)

    def run_of(recipe: str) -> str:
        return str(*runs_of(recipe))

    score = partial(evaluation, out, plan)

    def student(name: str) -> Command:
        return score(name, run_of(STUDENTS[name]), "--codec", toy)

    def long(name: str) -> Command:
        words = ("--prompts", heldout, "--codec", toy, *TEXT, "--scorer", "long_run", "--num-frames", str(LONG_FRAMES))
        words += ("--num", str(min(NUM_LONG, plan.num_eval)), "--sets", "1")
        return ("fewstep", "evaluate", run_of(STUDENTS[name]), *words, "--out", str(out / "scores" / f"long_{name}.json"))

    def half_of_the_pairs(rank: int) -> Command:
        words = ("fewstep", "pairs", toy, world, "--out", pairs, "--num", str(plan.num_pairs), *TEXT)
        words += ("--steps", str(STEPS), "--sampler", "unipc", "--guidance", str(GUIDANCE))
        return shared((*words, "--path-times", "4", "--student-shift", str(STUDENT_SHIFT)), rank)

    page = (sys.executable, "-m", "fewstep.toyworld.demo.causal_page", str(out), "--size", size)
    return [
        *beginning(out, size, None),
        Stage(
            "latents",
            "captions become embeddings, clips latents of the video tokenizer; real clips are compared with others",
            (
                (
                    ("fewstep", "prepare", "text", world, "--text-encoder", toy),
                    ("fewstep", "prepare", "latents", world, "--codec", toy),
                ),
                (("fewstep", "prepare", "text", heldout, "--text-encoder", toy), score("real", heldout)),
            ),
        ),
        Stage(
            "pairs",
            f"the teacher makes clips from noise, {2 * STEPS} calls each",
            tuple((half_of_the_pairs(rank),) for rank in range(2)),
            resumes=(out / "pairs",),
        ),
        Stage(
            "begin",
            "both chains to the student that Self-Forcing begins with, on a core each; beside them the bidirectional student",
            (
                (
                    train("toy_kd_causal", much["kd"]),
                    train("toy_kd_4step", plan.kd[0].iters),
                    train("toy_dmd2_4step", plan.dmd2[0].iters),
                ),
                (
                    train("toy_causal_finetune", much["finetune"]),
                    train("toy_causal_consistency", much["consistency"]),
                ),
            ),
            resumes=runs_of("toy_kd_causal", "toy_kd_4step", "toy_dmd2_4step", "toy_causal_finetune", "toy_causal_consistency"),
        ),
        Stage(
            "sf",
            "Self-Forcing from both: the students learn on clips that they generate from their own chunks",
            ((train("toy_sf", much["sf"]),), (train("toy_sf_consistency", much["sf"]),)),
            resumes=runs_of("toy_sf", "toy_sf_consistency"),
        ),
        Stage(
            "scores",
            "scores on clips of the length of training; beside them the teacher and a bidirectional student of four steps",
            (
                (
                    score("4step", run_of("toy_dmd2_4step"), "--codec", toy),
                    student("kd_causal"),
                    score("teacher", pairs),
                ),
                (student("consistency"), student("sf"), student("sf_consistency"), score("tokenizer", f"codec:{toy}")),
            ),
        ),
        Stage(
            "long",
            f"clips of {LONG_FRAMES} frames, ten times the length of training: drift, and return to the beginning",
            ((long("kd_causal"), long("sf")), (long("consistency"), long("sf_consistency"))),
        ),
        Stage("report", "one page to look at", ((page,),), resumes=tuple(kept_for_the_page(out))),
    ]
