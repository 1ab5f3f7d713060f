"""A report of any run and any file of scores: `fewstep report RUN|SCORES.json ... --out report.html`.

A file of scores (`fewstep evaluate`) gives a model: its scores, its speed, its calls, and the clips that were kept beside the
file. Clips of the same number in several files were generated for the same prompt from the same noise and stand in one row,
with the real clip and the control; a row knows by how much the last model differs from the first, and the page sorts by it.
A run folder gives its curves, its alarms, its previews and its command.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fewstep.data.files import video
from fewstep.errors import UserError
from fewstep.evaluation.report.contents import Chart, Film, Gallery, Gate, Kind, Model, Report, Row, Score, Stage, Value
from fewstep.evaluation.report.curves import curves_of
from fewstep.evaluation.score_files import read_scores
from fewstep.evaluation.verdict import Verdict, advice, verdicts
from fewstep.untrusted.text import read_bytes, read_json

Frames = NDArray[np.uint8]
_CONTROLS = {"vis": "blur (vis)", "seg": "objects (seg)", "keypoint": "keypoints"}
_FILLED = ("depth", "seg", "vis")  # areas, which would hide the clip
_BOUND = re.compile(r"\s*([A-Za-z_0-9]+)\s*(<=|>=)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Bound:
    """A threshold that every model is to keep: mmd_transnet<=0.1."""

    score: str
    is_upper: bool
    value: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        match = _BOUND.fullmatch(text)
        try:
            assert match is not None
            return cls(match[1], match[2] == "<=", float(match[3]))
        except (AssertionError, ValueError):
            raise UserError(f"--bound {text}: is written NAME<=VALUE or NAME>=VALUE, for instance 'ssim>=0.8'") from None


@dataclass(frozen=True)
class Rivals:
    """Two files of scores by their names: student:teacher."""

    student: str
    other: str

    @classmethod
    def parse(cls, text: str) -> Rivals:
        student, colon, other = text.partition(":")
        if not colon or not student or not other:
            raise UserError(f"--verdict {text}: is written STUDENT:OTHER, for instance student:teacher")
        return cls(student, other)

    def verdicts(self, scored: Sequence[_Scored]) -> list[Verdict]:
        paths = {one.name: one.path for one in scored}
        for name in (self.student, self.other):
            if name not in paths:
                raise UserError(
                    f"--verdict {self.student}:{self.other}: no file of scores is called {name}: {', '.join(paths)}"
                )
        return verdicts(paths[self.student], paths[self.other])


@dataclass(frozen=True)
class _Scored:
    """One file of scores."""

    path: Path
    name: str
    record: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        if str(self.record["what"]).startswith("codec:"):
            return "codec"
        return "teacher" if "sampler" in self.record else "student"

    def clip(self, number: int, end: str = "") -> Frames | None:
        path = self.path.with_suffix("") / f"{number:02d}{end}.mp4"
        return video.read(path).frames if path.is_file() else None

    @property
    def fps(self) -> float:
        path = self.path.with_suffix("") / "00.mp4"
        return video.probe(path).fps if path.is_file() else 16.0

    def first(self, key: Literal["prompts", "stems"]) -> Sequence[str]:
        """The prompts or names of the samples of the first set."""
        return self.record["sets"][0].get(key) or []

    def has_samples_of(self, other: _Scored) -> bool:
        """Whether both begin with the same samples; a prompt that is not known may be any."""
        pairs = zip(self.first("prompts")[:2], other.first("prompts")[:2])
        return list(self.first("stems")[:2]) == list(other.first("stems")[:2]) and all(
            a == b or not (a and b) for a, b in pairs
        )

    def prompt(self, number: int) -> str:
        prompts, stems = self.first("prompts"), self.first("stems")
        texts = [part[number] for part in (prompts, stems) if number < len(part) and part[number]]
        return texts[0] if texts else f"clip {number}"


def report_of(
    paths: Sequence[Path], *, title: str | None = None, bounds: Sequence[Bound] = (), rivals: Sequence[Rivals] = ()
) -> Report:
    """The report of run folders and files of scores, in the order in which they are named."""
    runs = [path for path in paths if path.is_dir()]
    scored = _scored([path for path in paths if not path.is_dir()])
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise UserError(f"{run}: is no run: it has no metrics.jsonl. Give run folders and files of scores")
    if not paths:
        raise UserError("name at least one run folder or file of scores")
    models = [*_real(scored), *(_model(one, _line(one, scored)) for one in scored)]
    names = {name for model in models for name in model.scores}
    legend = _legend(scored, names)
    galleries = [*_pairs(scored), *_seeds(scored), *(gallery for run in runs for gallery in _previews(run))]
    charts: list[Chart] = [chart for run in runs for chart in curves_of(run, run.name)]
    groups = [pair.verdicts(scored) for pair in rivals]
    return Report(
        title=title or _title(scored, runs),
        summary="" if groups else _summary(scored, legend),  # the verdict says more
        verdicts=groups,
        warnings=[text for scores in groups for text in advice(scores)],
        galleries=galleries,
        gates=_gates(scored, bounds),
        models=models,
        scores=legend,
        quality=_quality(legend),
        charts=charts,
        stages=[_stage(run) for run in runs],
        time_is="training alone",
        limits=_limits(scored, runs),
        environment=_provenance(scored, runs),
    )


def _scored(paths: Sequence[Path]) -> list[_Scored]:
    out: list[_Scored] = []
    for path in paths:
        record = read_scores(path)
        name = path.stem if all(other.stem != path.stem for other in paths if other != path) else str(path)
        out.append(_Scored(path, name, record))
    return out


def _title(scored: Sequence[_Scored], runs: Sequence[Path]) -> str:
    names = [one.name for one in scored] or [run.name for run in runs]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _summary(scored: Sequence[_Scored], legend: Sequence[Score]) -> str:
    sentences: list[str] = []
    for one in scored:
        calls = one.record.get("num_calls")
        scores = [score for score in legend if score.is_headline and score.name in one.record["scores"]][:2]
        values = [f"{score.title} {_short(one.record['scores'][score.name])}" for score in scores]
        took = f", {calls} network call{'s' * (calls != 1)} for a clip" if calls else ""
        sentences.append(f"{one.name}{took}: {'; '.join(values) or 'no headline score'}.")
    return " ".join(sentences)


def _short(value: Mapping[str, Any]) -> str:
    if value["value"] is None:
        return "not measured"
    return f"{value['value']:.3g}" + ("" if value["spread"] is None else f" \u00b1 {value['spread']:.2g}")


def _value(row: Mapping[str, Any]) -> Value:
    number, spread = (math.nan if row[key] is None else float(row[key]) for key in ("value", "spread"))
    return Value(number, spread, row["num"])


def _line(one: _Scored, scored: Sequence[_Scored]) -> str:
    """What joins models in the plot of quality against calls: files of one student at several numbers of calls are a line."""
    if one.kind == "teacher":
        return "teacher, fewer steps" if sum(other.kind == "teacher" for other in scored) > 1 else one.name
    others = [other for other in scored if other.record["what"] == one.record["what"]]
    return Path(one.record["what"]).name if one.kind == "student" and len(others) > 1 else ""


def _model(one: _Scored, line: str) -> Model:
    latency = one.record.get("latency")
    rate = None if latency is None else Value(latency["clips_per_s_end_to_end"], math.nan, latency["repeats"])
    return Model(
        one.kind,
        one.name,
        one.record.get("num_calls"),
        one.record.get("guidance"),
        {name: _value(row) for name, row in one.record["scores"].items()},
        rate,
        line,
        one.record.get("sampler", "") or str(one.record["what"]),
    )


def _real(scored: Sequence[_Scored]) -> list[Model]:
    """The anchors of the first file that has some: scores of known clips, as models of their own."""
    anchors = next((one.record["anchors"] for one in scored if one.record.get("anchors")), {})
    rows = {title: {name: _value(row) for name, row in scores.items()} for title, scores in anchors.items()}
    return [
        Model("real", title, scores=scores, note="known clips, to compare with", is_featured=True)
        for title, scores in rows.items()
        if scores
    ]


def _legend(scored: Sequence[_Scored], names: set[str]) -> list[Score]:
    rows = {row["name"]: Score(**row) for one in scored for row in one.record["legend"]}
    others = [Score(name, name, "No explanation is stored.", "as real") for name in sorted(names - rows.keys())]
    return [*rows.values(), *others]


def _quality(legend: Sequence[Score]) -> str:
    """The headline score that is drawn against network calls: a distance, if there is one."""
    for better in ("lower", "higher"):
        for score in legend:
            if score.is_headline and score.better == better:
                return score.name
    return ""


def _gates(scored: Sequence[_Scored], bounds: Sequence[Bound]) -> list[Gate]:
    out: list[Gate] = []
    for bound in bounds:
        holders = [one for one in scored if bound.score in one.record["scores"] and one.kind == "student"]
        if not holders:
            names = sorted({name for one in scored for name in one.record["scores"]})
            raise UserError(f"--bound {bound.score}: no student has this score; there are {', '.join(names) or 'none'}")
        for one in holders:
            value = _value(one.record["scores"][bound.score])
            better = "lower" if bound.is_upper else "higher"
            out.append(Gate(f"{one.name}: {bound.score}", value.value, bound.value, better, value.spread))
    return out


# ---- clips -----------------------------------------------------------------------------------------------------------


def _pairs(scored: Sequence[_Scored]) -> list[Gallery]:
    """Galleries of the kept clips. Files of the same samples share one: only their clips are of the same prompt and noise."""
    groups: list[list[_Scored]] = []
    for one in scored:
        same = next((group for group in groups if group[0].has_samples_of(one)), None)
        if same is None:
            groups.append([one])
        else:
            same.append(one)
    return [gallery for gallery in map(_gallery, groups) if gallery.rows]


def _gallery(scored: Sequence[_Scored]) -> Gallery:
    """A row for each kept clip number: the real clip, the control, and every model's clip, with the control over it."""
    rows: list[Row] = []
    for number in range(100):
        clips = [(one, clip) for one in scored if (clip := one.clip(number)) is not None]
        if not clips:
            break
        first = clips[0][0]
        films: list[Film] = []
        real = first.clip(number, ".real")
        if real is not None:
            films.append(Film("real clip", real, "real"))
        controls = {name: signal for name in _controls(first) if (signal := first.clip(number, f".{name}")) is not None}
        films += [Film(_CONTROLS.get(name, name), signal, "control", "control") for name, signal in controls.items()]
        for one, clip in clips:
            calls = one.record.get("num_calls")
            films.append(Film(one.name, clip, one.kind, f"{calls} call{'s' * (calls != 1)}" if calls else ""))
            overlays = {_CONTROLS.get(n, n): s for n, s in controls.items() if n not in _FILLED and is_drawn(s)}
            films += [Film(f"{one.name}, {n} over it", overlaid(clip, s), one.kind) for n, s in overlays.items()]
        difference = mean_difference(clips[0][1], clips[-1][1]) if len(clips) > 1 else None
        rows.append(Row(first.prompt(number), films, difference))
    names = [one.name for one in scored]
    if len(names) == 1:
        return Gallery(f"Clips of {names[0]}", rows, scored[0].fps, "")
    about = f"The difference of a row is that of {names[-1]} from {names[0]}, in grey values."
    if not any(scored[0].first("prompts")):
        return Gallery("Clips of the same file name, side by side", rows, scored[0].fps, about)
    about = f"Generated clips of one row come from the same noise. {about}"
    return Gallery("The same prompts, side by side", rows, scored[0].fps, about)


def _controls(one: _Scored) -> list[str]:
    folder = one.path.with_suffix("")
    names = (path.name.removeprefix("00.").removesuffix(".mp4") for path in sorted(folder.glob("00.*.mp4")))
    return [name for name in names if name != "real" and not name.startswith("seed")]


def _seeds(scored: Sequence[_Scored]) -> list[Gallery]:
    """One prompt from several noises, for every model that was scored on several sets."""
    rows: list[Row] = []
    for one in scored:
        for number in range(2):
            ends = ["", *(f".seed{k}" for k in range(1, 8))]
            clips = [clip for end in ends if (clip := one.clip(number, end)) is not None]
            if len(clips) > 1:
                films = [Film(f"noise {n + 1}", clip, one.kind) for n, clip in enumerate(clips)]
                rows.append(Row(f"{one.name}: {one.prompt(number)}", films))
    about = "A model that makes the same clip from every noise has lost its diversity."
    return [Gallery("The same prompt, other noises", rows, scored[0].fps, about)] if rows else []


def _previews(run: Path) -> list[Gallery]:
    """The first, a middle and the last preview of a run."""
    files = sorted((run / "previews").glob("step_*.mp4"))
    if not files:
        return []
    previews = [files[n] for n in sorted({0, len(files) // 2, len(files) - 1})]
    rows = [Row(f"iteration {int(file.stem.removeprefix('step_'))}", [_film(file)]) for file in previews]
    about = "Rows are samples; columns are named above the pictures. Prompts and noises are the same at every iteration."
    return [Gallery(f"{run.name} while it trained", rows, video.probe(files[0]).fps, about)]


def _film(file: Path) -> Film:
    return Film("student, teacher, truth", video.read(file).frames, "student")


def is_drawn(control: Frames) -> bool:
    """Whether a control is lines on black: edges, skeletons. Only these can be read over a clip."""
    return bool(((control < 32) | (control > 223)).mean() > 0.97 and control.mean() < 96)


def overlaid(clip: Frames, control: Frames) -> Frames:
    """A clip with the lines of a control over it, in red."""
    from fewstep.evaluation.features.contract import resized

    num = min(len(clip), len(control))
    out = clip[:num].copy()
    out[resized(control[:num], *clip.shape[1:3]).max(axis=-1) > 127] = (255, 48, 48)
    return out


def mean_difference(first: Frames, other: Frames) -> float:
    """The mean difference of two clips in grey values, over what they have in common."""
    from fewstep.evaluation.features.contract import resized

    num = min(len(first), len(other))
    return float(np.abs(first[:num].astype(np.int16) - resized(other[:num], *first.shape[1:3])).mean())


# ---- what the page says about itself ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Progress:
    wall_s: float = 0.0


def _stage(run: Path) -> Stage:
    env = read_json(run / "env.json", "Remove it") if (run / "env.json").is_file() else {}
    command = env.get("command") or f"fewstep train --config {run / 'config.yaml'}"
    command = command if isinstance(command, str) else " ".join(map(str, command))
    seconds = [
        read_json(path / "trainer.json", "Remove that checkpoint", _Progress).wall_s
        for path in sorted((run / "checkpoints").glob("iter_*"))
        if (path / "trainer.json").is_file()
    ]
    return Stage(f"training of {run.name}", command, max(seconds, default=0.0))


def _limits(scored: Sequence[_Scored], runs: Sequence[Path]) -> list[str]:
    """What makes the numbers less than they seem: notes of the scores, alarms of the runs, protocols that differ."""
    holders: dict[str, list[str]] = {}
    for one in scored:
        for note in one.record.get("notes", []):
            holders.setdefault(note, []).append(one.name)
    out = [f"{', '.join(names)}: {note}" for note, names in holders.items()]
    protocols = [one.record.get("protocol") for one in scored]
    if any(protocol != protocols[0] for protocol in protocols[1:]):
        out.append("These scores have different protocols: their numbers do not compare. fewstep evaluate --compare says why.")
    for run in runs:
        path = run / "log.txt"
        alarms = [line for line in _text(path).splitlines() if "ALARM" in line] if path.is_file() else []
        out += [f"{run.name}: {line}" for line in alarms[-5:]]
    return out


def _text(path: Path) -> str:
    return read_bytes(path, 2**28).decode("utf-8", "replace")


def _provenance(scored: Sequence[_Scored], runs: Sequence[Path]) -> dict[str, str]:
    import fewstep

    out = {"fewstep": fewstep.__version__, "python": platform.python_version()}
    for one in scored:
        protocol = one.record.get("protocol") or {}
        shapes: Any = protocol.get("frames_height_width")
        shapes = [shape for shape in shapes if isinstance(shape, list)] if isinstance(shapes, list) else []
        sizes = ", ".join(" x ".join(map(str, shape)) for shape in shapes[:3])
        facts = (one.record["what"], f"clips of {sizes}" if sizes else "", str(one.record.get("measured_by", "")))
        out[one.name] = "; ".join(str(fact) for fact in facts if fact)
        latency = one.record.get("latency")
        if latency:
            out[f"{one.name}, timed on"] = f"{latency['device']}, {latency['repeats']} repetitions"
    return out | {run.name: str(run) for run in runs}
