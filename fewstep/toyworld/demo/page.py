"""The demo's last stage: writes summary.json and report.html from the files of the other stages.

python -m fewstep.toyworld.demo.page demo --size default
"""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import fewstep
from fewstep.data.files import video
from fewstep.diffusion import TeacherSampler
from fewstep.evaluation.report import Chart, Film, Gallery, Gate, Model, Report, Row, Score, Stage, Value, curves_of, write
from fewstep.evaluation.report.contents import Kind
from fewstep.files import write_json
from fewstep.inference.clip_sets import Source, opened
from fewstep.inference.evaluate import speed
from fewstep.inference.evaluation import Evaluation
from fewstep.inference.model import changed, codec_of, open_model
from fewstep.inference.request import SamplerOptions
from fewstep.toyworld.demo.stages import AGAIN, CALLS, FEW, GUIDANCE, METHODS, STEPS, STUDENTS, TITLES, TOY, runs_of
from fewstep.toyworld.demo.verdict import verdicts_of, warnings_of
from fewstep.untrusted.text import read_json, read_text

STUDENT_TITLES = {"kd": "KD", "dmd2": "DMD2", **METHODS}  # of those scored at several numbers of calls
NUM_SHOWN = 8
TEACHER = SamplerOptions(STEPS, "unipc", guidance=GUIDANCE)
BOUNDS = {  # (ratio to the teacher's distance, share of the gap closed): set before the numbers were known
    "default": {"4step": (1.5, 0.60), "1step": (2.0, 0.50)},
    "long": {"4step": (1.2, 0.85), "1step": (1.5, 0.75)},
}


def main(out: Path, size: str, toy: str, methods: Sequence[str] = ()) -> None:
    records = {name: read_json(out / "scores" / f"{name}.json", AGAIN) for name in TITLES}
    torch.set_num_threads(1)
    rates = measured_speed(out, toy)
    show_teacher(out, toy)
    curves = curves_over_calls(out, methods)
    summary = summarised(records, rates) | of_curves(curves, out) | {"size": size, "seconds": seconds(out)}
    write_json(out / "summary.json", summary)
    warnings = warnings_of(summary)
    report = Report(
        title="A many-step world model becomes a one-step and a four-step student",
        summary=_summary_text(summary),
        verdicts=verdicts_of(out, summary),
        warnings=warnings,
        galleries=galleries(out),
        gates=[] if warnings else [*gates(summary, size), *gates_of_methods(summary, methods)],  # too few clips meet no bound
        models=[
            *(model_of(name, records[name], rates.get(name)) for name in TITLES),
            *(point_of(name, num, record, summary) for name, curve in curves.items() for num, record in curve.items()),
        ],
        scores=[Score(**score) for score in records["real"]["legend"]],
        charts=charts(out, methods),
        limits=LIMITS,
    )
    write_with_origin(report, out, size, records["real"])


def write_with_origin(report: Report, out: Path, size: str, real: Mapping[str, Any]) -> None:
    """Writes report.html, with the stages that have run, their seconds, and the machine. real: the record of real clips."""
    stages = [Stage(s["name"], "\n".join(s["commands"]), s["seconds"]) for s in ran(out)]
    environment = {
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fewstep": fewstep.__version__,
        "size": size,
        "feature network": real["measured_by"],
    }
    write(replace(report, stages=stages, environment=environment), out / "report.html")
    print(f"{out}/report.html, {out}/summary.json")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def summarised(records: dict[str, Any], rates: dict[str, Value]) -> dict[str, Any]:
    """Every number with NAME_spread and NAME_n; None if it could not be measured (no free flight, no gravity)."""
    out = {key: number for who in TITLES for key, number in numbers_of(records[who], who).items()}

    def put(name: str, value: float, spread: float, num: int) -> None:
        out.update(numbered(name, value, spread, num))

    teacher = records["teacher"]["scores"]["frechet"]
    for name in STUDENTS:
        mine, few = records[name]["scores"]["frechet"], records[FEW[name]]["scores"]["frechet"]
        put(f"frechet_ratio_{name}", *ratio_of(mine, teacher), mine["num"])
        gap = few["value"] - teacher["value"]
        closed = (few["value"] - mine["value"]) / gap
        # Derivatives of (f - s) / (f - t) by s, f and t.
        parts = (mine["spread"] / gap, few["spread"] * (1 - closed) / gap, teacher["spread"] * closed / gap)
        put(f"gap_closed_{name}", closed, math.hypot(*parts), mine["num"])
    for who, rate in rates.items():
        put(f"clips_per_s_{who}", rate.value, rate.spread, rate.num)
        calls = 2 * STEPS if who == "teacher" else records[who]["num_calls"]
        put(f"network_calls_{who}", calls, 0.0, 1)
    return out


def numbered(name: str, value: float | None, spread: float | None, num: int) -> dict[str, Any]:
    return {name: value, f"{name}_spread": spread, f"{name}_n": num}


def numbers_of(record: Mapping[str, Any], who: str, prefix: str = "") -> dict[str, Any]:
    """The scores of a record as numbers of the summary: SCORE_WHO with its spread and n."""
    out: dict[str, Any] = {}
    for name, score in record["scores"].items():
        out |= numbered(f"{prefix}{name}_{who}", score["value"], score["spread"], score["num"])
    return out


def ratio_of(one: Mapping[str, float], other: Mapping[str, float]) -> tuple[float, float]:
    """One score over another, with its spread."""
    ratio = one["value"] / other["value"]
    return ratio, ratio * math.hypot(*(score["spread"] / score["value"] for score in (one, other)))


def measured_speed(out: Path, toy: str) -> dict[str, Value]:
    """Clips per second, noise to pixels, on one thread, one model after the other. Read from the file if measured before."""
    path = out / "scores" / "speed.json"
    if not path.is_file():
        models = {"teacher": (toy, TEACHER)} | {name: (str(out / "students" / name), SamplerOptions()) for name in STUDENTS}
        rates = {
            name: speed(_job(out, address, Path("-"), sampling=sampling))[:3] for name, (address, sampling) in models.items()
        }
        write_json(path, rates, indent=None)
    return {name: Value(*row) for name, row in read_json(path, AGAIN).items()}


def gates(summary: dict[str, float], size: str) -> list[Gate]:
    bounds = BOUNDS.get(size, BOUNDS["default"])
    out = [Gate(*row) for name in STUDENTS for row in _student_gates(name, summary, bounds[name])]
    tokenizer = summary["frechet_teacher"] / summary["frechet_tokenizer"]
    out.append(Gate("teacher: distance, as a multiple of the tokenizer's", tokenizer, 3.0, "lower"))
    few = summary["frechet_teacher_4calls"] / summary["frechet_teacher"]
    out.append(Gate("teacher at 4 calls: distance, as a multiple of its own at 35 steps", few, 2.0, "higher"))
    return out


def _student_gates(name: str, summary: dict[str, float], bounds: tuple[float, float]) -> Iterable[tuple[Any, ...]]:
    who = TITLES[name]
    for key, bound, better, what in (
        ("frechet_ratio", bounds[0], "lower", "distance, as a multiple of the teacher's"),
        ("gap_closed", bounds[1], "higher", "share of the gap closed"),
    ):
        yield f"{who}: {what}", summary[f"{key}_{name}"], bound, better, summary[f"{key}_{name}_spread"]
    for key in ("recall", "coverage"):
        most = summary[f"{key}_teacher"]
        share = summary[f"{key}_{name}"] / most if most else 1.0  # of nothing, nothing can be lost
        yield f"{who}: {key}, as a share of the teacher's", share, 0.85, "higher"
    points = 100 * (summary["adherence_teacher"] - summary[f"adherence_{name}"])
    yield f"{who}: adherence, points below the teacher's", points, 10.0, "lower"


# ---- further methods, and scores over the number of calls ------------------------------------------------------------


def curves_over_calls(out: Path, methods: Sequence[str]) -> dict[str, dict[int, Any]]:
    """The records of each student at each number of calls; of KD and DMD2, too, if there are further methods."""
    names = ("kd", "dmd2", *methods) if methods else ()
    return {name: {num: read_json(out / "scores" / f"{name}_{num}calls.json", AGAIN) for num in CALLS} for name in names}


def of_curves(curves: Mapping[str, Mapping[int, Any]], out: Path) -> dict[str, Any]:
    """SCORE_STUDENT_NUMcalls with its spread and n, and train_s_STUDENT: seconds of its own trainings, on one thread."""
    summary: dict[str, Any] = {}
    for name, curve in curves.items():
        summary[f"train_s_{name}"] = sum(read_json(run / "summary.json", AGAIN)["wall_s"] for run in runs_of(out, name))
        for num, record in curve.items():
            summary |= numbers_of(record, f"{name}_{num}calls")
    return summary


def point_of(name: str, num: int, record: Mapping[str, Any], summary: Mapping[str, Any]) -> Model:
    title = STUDENT_TITLES[name]
    model = model_of("4step", {**record, "num_calls": num}, None)
    return replace(
        model,
        name=f"{title}, {num} {'call' if num == 1 else 'calls'}",
        line=title,
        note=f"its own training took {summary[f'train_s_{name}']:.0f} s on one thread",
        is_featured=num == 4,
    )


def gates_of_methods(summary: Mapping[str, Any], methods: Sequence[str]) -> Iterable[Gate]:
    """The bounds of the further methods: set before the numbers were known."""

    def ratio(one: str, other: str) -> tuple[float, float]:
        both = [{"value": summary[f"frechet_{who}"], "spread": summary[f"frechet_{who}_spread"]} for who in (one, other)]
        return ratio_of(*both)

    if "rcm" in methods:
        value, spread = ratio("rcm_4calls", "dmd2_4calls")
        yield Gate("rCM, 4 calls: distance, as a multiple of DMD2's", value, 1.1, "lower", spread)
        spread = math.hypot(*(summary[f"recall_{name}_4calls_spread"] for name in ("rcm", "dmd2")))
        gained = summary["recall_rcm_4calls"] - summary["recall_dmd2_4calls"]
        yield Gate("rCM, 4 calls: recall beyond DMD2's", gained, 0.0, "higher", spread)
    if "flow_map" in methods:
        for more, fewer in ((8, 4), (4, 2)):
            value, spread = ratio(f"flow_map_{more}calls", f"flow_map_{fewer}calls")
            yield Gate(f"flow map, {more} calls: distance, as a multiple of its own at {fewer}", value, 1.0, "lower", spread)
        value, spread = ratio("flow_map_8calls", "teacher")
        yield Gate("flow map, 8 calls: distance, as a multiple of the teacher's", value, 1.15, "lower", spread)


# ---- page ------------------------------------------------------------------------------------------------------------


def model_of(name: str, record: dict[str, Any], rate: Value | None) -> Model:
    calls, guidance = record.get("num_calls"), record.get("guidance")
    if name == "teacher":
        calls, guidance = 2 * STEPS, GUIDANCE
    return Model(
        kind=kind_of(name),
        name=TITLES[name],
        num_calls=calls,
        guidance=guidance,
        scores=values_of(record["scores"]),
        clips_per_s=rate,
        line="teacher, best sampler" if name.startswith("teacher") else "",
        note=record.get("sampler", "unipc, guidance baked in pairs" if name == "teacher" else ""),
        is_featured=name in ("tokenizer", "teacher", *STUDENTS),
    )


def kind_of(name: str) -> Kind:
    kinds: dict[str, Kind] = {"real": "real", "tokenizer": "codec"}
    return kinds.get(name, "teacher" if name.startswith("teacher") else "student")


def values_of(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    """Scores as the report shows them, without what could not be measured: no flight, no gravity."""
    return {
        key: Value(v["value"], math.nan if v["spread"] is None else v["spread"], v["num"])
        for key, v in scores.items()
        if v["value"] is not None
    }


def show_teacher(out: Path, toy: str) -> None:
    """The teacher's clips for the first held-out prompts, from the students' noise. Written once."""
    folder = out / "scores" / "teacher_shown"
    if (folder / f"{NUM_SHOWN - 1:02d}.mp4").is_file():
        return
    job = _job(out, toy, out / "scores" / "teacher_shown.json", num=NUM_SHOWN)
    model = open_model(toy)
    assert isinstance(model.sampler, TeacherSampler)
    source = Source(model, changed(model.sampler, TEACHER), codec_of(model, toy), opened(job))
    clips = source.generated(job.batched(), NUM_SHOWN, 0)
    for n, clip in enumerate(clips):
        video.write(folder / f"{n:02d}.mp4", clip, 16.0, quality="lossless")


def _job(out: Path, what: str, file: Path, **more: Any) -> Evaluation:
    """An evaluation of a model on the held-out prompts, with the text as the toy network receives it."""
    return Evaluation(what, out / "heldout", out / "real", file, max_tokens=40, mask_text=True, **more)


def captions(out: Path) -> list[str]:
    """Of the held-out prompts whose clips are shown."""
    return [read_text(path).strip() for path in sorted((out / "heldout" / "metas").glob("*.txt"))[:NUM_SHOWN]]


def films(files: Mapping[str, Path], titles: Mapping[str, str], about: str = "") -> list[Film]:
    """The clips that are there, by the names of those that made them."""
    there = {name: video.read(path).frames for name, path in files.items() if path.is_file()}
    return [Film(titles[name], frames, kind_of(name), about) for name, frames in there.items()]


def galleries(out: Path) -> list[Gallery]:
    names = ("real", "tokenizer", "teacher_shown", "teacher_4calls", "4step", "teacher_1call", "1step")
    titles = TITLES | {"teacher_shown": TITLES["teacher"]}
    held_out = [
        Row(caption, films({name: out / "scores" / name / f"{n:02d}.mp4" for name in names}, titles))
        for n, caption in enumerate(captions(out))
    ]
    plain = [
        Row(
            read_text(out / "samples" / "4step" / f"{n:02d}.txt").strip(),
            films({name: out / "samples" / name / f"{n:02d}.mp4" for name in STUDENTS}, TITLES, "plain diffusers"),
        )
        for n in range(4)
    ]
    return [
        Gallery("Held-out prompts, the same noise for all", held_out, fps=16, about="No model was trained on these prompts."),
        Gallery("Exported, and sampled by plain diffusers", plain, fps=16),
    ]


def charts(out: Path, methods: Sequence[str]) -> list[Chart]:
    runs = {f"{name} {training}": out / "runs" / name / training for training in ("kd", "dmd2") for name in STUDENTS}
    for name in methods:
        first, *later = runs_of(out, name)
        runs |= {METHODS[name]: first, **{f"{METHODS[name]}, second stage": run for run in later}}
    return [chart for name, run in runs.items() for chart in curves_of(run, name)]


def ran(out: Path) -> list[dict[str, Any]]:
    stages = [read_json(path, AGAIN) for path in (out / "stages").glob("*.json")]
    return sorted(stages, key=lambda stage: stage.get("order", 0))


def seconds(out: Path) -> dict[str, float]:
    return {stage["name"]: stage["seconds"] for stage in ran(out)}


def _summary_text(s: dict[str, float]) -> str:
    faster = {name: s[f"clips_per_s_{name}"] / s["clips_per_s_teacher"] for name in STUDENTS}
    return (
        f"The teacher asks its network {2 * STEPS} times for a clip and lies {s['frechet_teacher']:.0f} from real clips. The "
        f"four-step student lies {s['frechet_4step']:.0f} away and is {faster['4step']:.0f} times as fast; the one-step one "
        f"{s['frechet_1step']:.0f} away and {faster['1step']:.0f} times as fast. The teacher itself, at 4 calls and at 1, lies "
        f"{s['frechet_teacher_4calls']:.0f} and {s['frechet_teacher_1call']:.0f} away."
    )


LIMITS = (
    "A toy: clips of 17 frames of 32 x 32 pixels, a closed language of 26 words, a teacher of 2.8 million weights. What holds "
    "here for a method need not hold at 7 billion; that the code paths, formats and commands are the same ones does.",
    "The distance is that of a small network trained on this world's own labels. It over-weighs noise and says nothing about "
    "natural video. All distances are against 2048 held-out real clips, extrapolated to infinitely many made ones.",
    "The tokenizer learned to look right to a network of the same form as the one that scores (from other clips and other "
    "first weights). The untrained network's distance beside it is a witness without a part in any training.",
    "Teacher and students share one tokenizer; what it blurs, all of them blur. Its own distance is the floor of theirs.",
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="default")
    parser.add_argument("--toy", default=str(TOY))
    parser.add_argument("--methods", default="", help="further methods, separated by commas")
    options = parser.parse_args()
    main(options.out, options.size, options.toy, [name for name in options.methods.split(",") if name])
