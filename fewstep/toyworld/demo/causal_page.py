"""The last stage of `fewstep demo --causal`: writes summary.json and report.html from the files of the other stages.

python -m fewstep.toyworld.demo.causal_page demo --size default
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fewstep.data.files import video
from fewstep.evaluation.long_run import LongRun, looks
from fewstep.evaluation.plot import Series
from fewstep.evaluation.report import Chart, Gallery, Gate, Model, Report, Row, Score, curves_of
from fewstep.files import write_json
from fewstep.toyworld.demo.causal import LONG_FRAMES, STUDENTS, TITLES
from fewstep.toyworld.demo.page import (
    captions,
    films,
    kind_of,
    numbered,
    numbers_of,
    ran,
    ratio_of,
    show_teacher,
    values_of,
    write_with_origin,
)
from fewstep.toyworld.demo.stages import AGAIN, STEPS, TOY
from fewstep.untrusted.text import read_json

BOUND = 1.3  # distance of the better chain over that of the bidirectional four-step student
CHAINS = {
    "sf": ("toy_kd_causal", "toy_sf"),
    "sf_consistency": ("toy_causal_finetune", "toy_causal_consistency", "toy_sf_consistency"),
}
RUNS = [run for runs in CHAINS.values() for run in runs]


def main(out: Path, size: str) -> None:
    records = {name: read_json(out / "scores" / f"{name}.json", AGAIN) for name in TITLES}
    long = {name: read_json(out / "scores" / f"long_{name}.json", AGAIN) for name in STUDENTS}
    torch.set_num_threads(1)
    show_teacher(out, str(TOY))
    summary = summarised(out, records, long)
    write_json(out / "summary.json", summary | {"size": size})
    report = Report(
        title="Two chains to a student that streams",
        summary=_summary_text(summary),
        galleries=galleries(out),
        gates=[_gate(summary)],
        models=[_model(name, records[name], long.get(name)) for name in TITLES],
        scores=[Score(**score) for score in (*records["real"]["legend"], *_long_legend(long))],
        charts=[*long_charts(out), *(chart for run in RUNS for chart in curves_of(out / "toyworld" / "basic" / run, run))],
        limits=LIMITS,
    )
    write_with_origin(report, out, size, records["real"])


def summarised(out: Path, records: Mapping[str, Any], long: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the comparison: distance, adherence, probes; drift and return; seconds of each chain."""
    numbers: dict[str, Any] = {}
    for who, record in records.items():
        numbers |= numbers_of(record, who)
    for who, record in long.items():
        numbers |= numbers_of(record, who, "long_")
    pairs = next((stage["seconds"] for stage in ran(out) if stage["name"] == "pairs"), 0.0)
    four = records["4step"]["scores"]["frechet"]
    for who, runs in CHAINS.items():
        walls = [read_json(out / "toyworld" / "basic" / run / "summary.json", AGAIN)["wall_s"] for run in runs]
        numbers[f"core_seconds_{who}"] = round(sum(walls) + (2 * pairs if who == "sf" else 0.0), 1)  # pairs: on two cores
        mine = records[who]["scores"]["frechet"]
        numbers |= numbered(f"frechet_ratio_{who}", *ratio_of(mine, four), mine["num"])
    return numbers


def _gate(summary: Mapping[str, float]) -> Gate:
    best = min(CHAINS, key=lambda who: summary[f"frechet_ratio_{who}"])
    ratio, spread = summary[f"frechet_ratio_{best}"], summary[f"frechet_ratio_{best}_spread"]
    return Gate("the better chain: distance, as a multiple of the bidirectional student's", ratio, BOUND, "lower", spread)


def _long_legend(long: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The legend of the probes of long clips, under names that no score of short ones has."""
    legend = next(iter(long.values()))["legend"]
    return [score | {"name": f"long_{score['name']}", "title": f"Long: {score['title'].lower()}"} for score in legend]


def _model(name: str, record: Mapping[str, Any], long: Mapping[str, Any] | None) -> Model:
    own = dict(record["scores"]) | {f"long_{key}": value for key, value in (long or {"scores": {}})["scores"].items()}
    calls = 2 * STEPS if name == "teacher" else record.get("num_calls")
    return Model(kind_of(name), TITLES[name], calls, scores=values_of(own), note=record.get("sampler", ""))


# ---- pictures --------------------------------------------------------------------------------------------------------


def galleries(out: Path) -> list[Gallery]:
    def rows(names: Mapping[str, str], num: int | None = None) -> list[Row]:
        """names: folders of clips, and who made them."""
        titles = {folder: TITLES[who] for folder, who in names.items()}
        return [
            Row(caption, films({folder: out / "scores" / folder / f"{n:02d}.mp4" for folder in names}, titles))
            for n, caption in enumerate(captions(out)[:num])
        ]

    short = {"teacher_shown" if name == "teacher" else name: name for name in TITLES}  # its scores are of other prompts
    return [
        Gallery("Held-out prompts, clips of the length of training", rows(short), fps=16),
        Gallery(
            f"Ten times as long: {LONG_FRAMES} frames",
            rows({f"long_{name}": name for name in STUDENTS}, 4),
            fps=16,
            about="Chunk after chunk, four frames each.",
        ),
    ]


def long_charts(out: Path) -> list[Chart]:
    """Drift and likeness to the beginning, segment by segment, of the clips that were kept."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    num = 0
    for name in STUDENTS:
        files = sorted((out / "scores" / f"long_{name}").glob("[0-9][0-9].mp4"))  # not those of the prompts beside them
        num = len(files)
        if num > 1:
            curves[name] = LongRun().curves(looks([video.read(file).frames for file in files]))
    titles = ("Drift by segments", "Likeness to the beginning by segments")
    return [
        Chart(
            f"{title}, {LONG_FRAMES} frames, {num} clips",
            [Series(TITLES[name], list(range(1, len(parts[which]) + 1)), parts[which]) for name, parts in curves.items()],
            x_label="tenth of the clip",
        )
        for which, title in enumerate(titles)
        if curves
    ]


def _summary_text(s: Mapping[str, float]) -> str:
    minutes = {who: s[f"core_seconds_{who}"] / 60 for who in CHAINS}
    return (
        f"Both chains end in a student of four steps that streams, chunk after chunk. By pairs, CausalKD and Self-Forcing "
        f"({minutes['sf']:.0f} minutes of a core) it lies {s['frechet_sf']:.1f} from real clips; by teacher forcing, causal "
        f"consistency and Self-Forcing ({minutes['sf_consistency']:.0f} minutes) {s['frechet_sf_consistency']:.1f}. The "
        f"bidirectional student of four steps lies {s['frechet_4step']:.1f} away, the teacher {s['frechet_teacher']:.1f}."
    )


LIMITS = (
    "A toy: clips of 17 frames of 32 x 32 pixels, five latent frames, a chunk of one. One training of each chain, so a "
    "difference smaller than that of two seeds says nothing.",
    "Drift and return to the beginning have no real clips beside them: objects come to rest in the first segment or two, and "
    "all later ones differ from the first in the same way. A drift that goes on growing would be the student's.",
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="default")
    options = parser.parse_args()
    main(options.out, options.size)
