"""A report as one HTML file: clips that play in step, bounds, plots, numbers, commands. Nothing is loaded from elsewhere.

Every number on the page stands in a <data> element whose `value` is the number as it was given and whose text is rounded to two
figures of its spread; `data-of` says what it is. So a test, or a script, can read the page back.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.evaluation.compare import COVERS
from fewstep.evaluation.report.contents import Film, Gallery, Gate, Kind, Report, Row, Value
from fewstep.evaluation.report.curves import chart_plot, colours_of, quality_plot
from fewstep.evaluation.report.films import Encoded, encode
from fewstep.evaluation.report.scores import scores, speed
from fewstep.evaluation.report.text import BETTER, data, duration, esc, finite, with_spread
from fewstep.evaluation.verdict import Verdict, conclusion
from fewstep.files import write_text

_TICK = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 8.5l3.4 3.4L13 4.6"/></svg>'
_EQUAL = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 6h10M3 10.5h10"/></svg>'
_CROSS = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M4 4l8 8M12 4l-8 8"/></svg>'
_KIND_COLOURS: Mapping[Kind, str] = {
    "real": "#8A8A8A",
    "codec": "#8A8A8A",
    "control": "#8A8A8A",
    "teacher": "#1F83CE",
    "student": "#D55E00",
}


def write(report: Report, path: str | os.PathLike[str], max_bytes: int = 5_000_000) -> Path:
    """Writes the page, whole or not at all, and returns its path."""
    text = page(report, max_bytes)
    write_text(path, text)
    return Path(path)


def page(report: Report, max_bytes: int = 5_000_000) -> str:
    """The page as text. Clips are compressed until the page takes about `max_bytes`; the page says if they were.

    Refuses a report with doubled names, scores without an explanation, or clips that are not uint8 T H W 3: all problems in one
    message.
    """
    if faults := report.problems():
        raise UserError("the report cannot be written:\n" + "\n".join(f"- {fault}" for fault in faults))
    sections = {
        "verdict": ("Verdict", _verdicts(report)),
        "watch": ("Watch", _galleries(report, max_bytes - 300_000)),
        "bounds": ("Bounds", _gates(report.gates)),
        "quality": ("Quality", _quality(report)),
        "scores": ("Scores", scores(report)),
        "speed": ("Speed", speed(report.models)),
        "training": ("Training", _charts(report)),
        "commands": ("Commands", _stages(report)),
        "limits": ("Limits", _limits(report.limits)),
        "environment": ("Origin", _environment(report.environment)),
    }
    there = {name: (title, body) for name, (title, body) in sections.items() if body}
    slots = {
        "title": esc(report.title),
        "summary": f'<p class="lede">{esc(report.summary)}</p>' if report.summary else "",
        "facts": _facts(report),
        "nav": '<nav aria-label="Parts">'
        + "".join(f'<a href="#{name}">{title}</a>' for name, (title, _) in there.items())
        + "</nav>",
        "sections": "\n".join(f'<section id="{name}">\n{body}\n</section>' for name, (_, body) in there.items()),
        # "<" as an escape, so that no text of the report can end the script element.
        "json": json.dumps(numbers(report), indent=1).replace("<", "\\u003c"),
    }
    template = files("fewstep.evaluation.report").joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], template)  # one pass: what is filled in is not looked at again


def numbers(report: Report) -> dict[str, Any]:
    """All numbers of the report as plain containers, nan as None: what the page's button saves."""

    def row(one: Value) -> dict[str, float | None]:
        return {"value": finite(one.value), "spread": finite(one.spread), "n": one.num}

    return {
        "title": report.title,
        "environment": dict(report.environment),
        "warnings": list(report.warnings),
        "verdicts": [asdict(one) | {"outcome": one.outcome, "sentence": str(one)} for one in chain(*report.verdicts)],
        "conclusions": [conclusion(scores) for scores in report.verdicts],
        "models": [
            {
                "name": model.name,
                "kind": model.kind,
                "network_calls": model.num_calls,
                "guidance": model.guidance,
                "clips_per_s": row(model.clips_per_s) if model.clips_per_s else None,
                "scores": {name: row(one) for name, one in model.scores.items()},
            }
            for model in report.models
        ],
        "gates": [
            {"name": gate.name, "value": finite(gate.value), "bound": gate.bound, "better": gate.better, "met": gate.is_met}
            for gate in report.gates
        ],
        "stages": [{"name": stage.name, "command": stage.command, "seconds": stage.seconds} for stage in report.stages],
    }


# ---- the parts, top to bottom ----------------------------------------------------------------------------------------


def _facts(report: Report) -> str:
    """The facts at the top of the page, as far as the report has them."""
    facts: list[tuple[str, str, str]] = []
    models = [model for model in report.models if model.is_featured and model.num_calls is not None]
    teachers, students = ([model for model in models if model.kind == kind] for kind in ("teacher", "student"))
    if teachers and students:
        first = max(teachers, key=lambda model: model.num_calls or 0)
        calls = sorted({model.num_calls or 0 for model in students}, reverse=True)
        arrow = '<span class="arrow">&rarr;</span>'
        facts.append(
            ("network calls for a clip", arrow.join(str(num) for num in [first.num_calls, *calls]), "teacher to students")
        )
        rated = [model for model in students if model.clips_per_s]
        if first.clips_per_s and rated:
            fast = max(rated, key=lambda model: model.clips_per_s.value if model.clips_per_s else 0.0)
            assert fast.clips_per_s is not None
            gain = fast.clips_per_s.value / first.clips_per_s.value
            facts.append(
                ("faster, on the clock", f"{data(gain, 'gain')}&times;", f"{esc(fast.name)} against {esc(first.name)}")
            )
    if report.gates:
        met = sum(gate.is_met for gate in report.gates)
        facts.append(
            (
                "bounds met",
                f"{met} of {len(report.gates)}",
                f"{len(report.gates) - met} missed" if met < len(report.gates) else "none missed",
            )
        )
    if report.stages:
        count = f"{len(report.stages)} stage{'s' * (len(report.stages) != 1)}"
        facts.append((report.time_is, duration(sum(stage.seconds for stage in report.stages)), count))
    body = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{about}</small></dd></div>" for name, value, about in facts)
    return f'<dl class="facts">{body}</dl>' if facts else ""


def _verdicts(report: Report) -> str:
    """Each student against another model, score by score, and what makes the numbers less than they seem."""
    groups = "".join(f"<p>{esc(conclusion(scores))}</p>{_score_by_score(scores)}" for scores in report.verdicts)
    warnings = "".join(f'<p class="warning"><b>Warning.</b> {esc(text)}</p>' for text in report.warnings)
    covers = f'<p class="soft">{COVERS}</p>' if any(report.verdicts) else ""
    return f"<h2>Verdict</h2>{warnings}{groups}{covers}" if warnings or groups else ""


def _score_by_score(scores: Sequence[Verdict]) -> str:
    if not scores:
        return ""
    rows = "".join(map(_verdict, scores))
    return f'<details><summary>Against {esc(scores[0].whose)}, score by score</summary><ul class="gates">{rows}</ul></details>'


def _verdict(one: Verdict) -> str:
    look, sign = {"better": ("met", _TICK), "worse": ("missed", _CROSS), "same": ("same", _EQUAL)}[one.outcome]
    of = f"verdict|{one.score}|{one.whose}"
    return (
        f'<li class="verdict {look}"><span class="mark" role="img" aria-label="{one.outcome}">{sign}</span>'
        f'<div><h3>{esc(one.sentence)}</h3><small class="soft num">{data(one.value, of)} against '
        f"{data(one.other, f'{of}|other')}, {one.better} is better, difference {data(one.low, f'{of}|low')} to "
        f"{data(one.high, f'{of}|high')}</small>"
        "</div></li>"
    )


def _galleries(report: Report, max_bytes: int) -> str:
    flat = [(film, gallery.fps) for gallery in report.galleries for row in gallery.rows for film in row.films]
    clips = encode([film.frames for film, _ in flat], [fps for _, fps in flat], max_bytes)
    supply = iter(zip([film for film, _ in flat], clips, strict=True))
    colours = colours_of(report.models)
    return "\n".join(_gallery(gallery, supply, colours) for gallery in report.galleries if gallery.rows)


def _gallery(gallery: Gallery, supply: Iterator[tuple[Film, Encoded]], colours: Mapping[str, str]) -> str:
    rows, clips = [], list[Encoded]()
    for row in gallery.rows:
        films = []
        for _ in row.films:
            film, clip = next(supply)
            clips.append(clip)
            films.append(_film(film, clip, row, gallery.fps, colours.get(film.name, _KIND_COLOURS[film.kind])))
        at = "" if row.difference is None else f' data-difference="{row.difference:.4f}"'
        note = "" if row.difference is None else f'<span class="soft"> difference {row.difference:.1f}</span>'
        rows.append(
            f'<div class="row"{at}><h3>{esc(row.prompt)}{note}</h3>'
            f'<div class="films" style="--n:{len(films)}">{"".join(films)}</div></div>'
        )
    total = max(clip.num_frames for clip in clips)
    is_wide = max(clip.width / clip.height for clip in clips) > 1.3
    least, most = ("14rem", "30rem") if is_wide else ("8rem", "14rem")
    exact = all(clip.is_exact for clip in clips)
    size = ", ".join(sorted({f"{clip.width} x {clip.height}" for clip in clips}))
    quality = "every pixel as it was made" if exact else "compressed for this page: judge fine detail from the files"
    about = f"{gallery.about} " if gallery.about else ""
    rates = "".join(f'<option value="{r}"{" selected" if r == 1 else ""}>{r:g}&times;</option>' for r in (0.25, 0.5, 1, 2))
    is_sortable = sum(row.difference is not None for row in gallery.rows) > 1
    order = (
        '<select class="order" aria-label="Order of the rows"><option value="listed">as listed</option>'
        '<option value="largest">largest difference first</option></select>'
        if is_sortable
        else ""
    )
    deck = (
        '<div class="deck" role="group" aria-label="Playback">'
        '<button class="play" type="button" aria-label="Pause"></button>'
        '<button class="back" type="button" aria-label="One frame back">'
        '<svg viewBox="0 0 16 16"><path d="M2 2h3v12H2zM14 2v12L6 8z"/></svg></button>'
        '<button class="next" type="button" aria-label="One frame on">'
        '<svg viewBox="0 0 16 16"><path d="M11 2h3v12h-3zM2 2v12l8-6z"/></svg></button>'
        f'<input class="slide" type="range" min="0" max="{total - 1}" value="0" step="1" aria-label="Frame">'
        f"<output class='count'>1 / {total}</output>{order}"
        f'<select class="rate" aria-label="Speed">{rates}</select></div>'
    )
    return (
        f'<div class="gallery" data-fps="{gallery.fps:g}" data-frames="{total}" style="--least:{least};--most:{most}">'
        f"<h2>{esc(gallery.title)}</h2>"
        f'<p class="soft">{esc(about)}{total} frames at {gallery.fps:g} a second, {size}; {quality}.</p>'
        f"{''.join(rows)}{deck}</div>"
    )


def _film(film: Film, clip: Encoded, row: Row, fps: float, colour: str) -> str:
    about = f"{film.name}: {row.prompt}"
    shared = f'class="source" data-frames="{clip.num_frames}" data-fps="{fps:g}" width="{clip.width}" height="{clip.height}"'
    if clip.mime == "image/webp":
        element = f'<img {shared} src="{clip.uri}" alt="{esc(about)}">'
    else:
        element = f'<video {shared} src="{clip.uri}" aria-label="{esc(about)}" muted loop playsinline autoplay></video>'
    small = f'<span class="soft">{esc(film.about)}</span>' if film.about else ""
    look = f"--c:{colour};--ratio:{clip.width}/{clip.height}"
    is_fine = clip.height * clip.width <= 128 * 128
    return (
        f'<figure class="film"><button type="button" class="screen{" exact" if is_fine else ""}" style="{look}" '
        f'data-about="{esc(about)}" aria-label="Enlarge {esc(about)}">{element}</button>'
        f"<figcaption>{esc(film.name)}{small}</figcaption></figure>"
    )


def _gates(gates: Sequence[Gate]) -> str:
    if not gates:
        return ""
    items = []
    for gate in gates:
        unit = f" {esc(gate.unit)}" if gate.unit else ""
        value = gate.value if math.isfinite(gate.value) else 0.0
        low, high = min(0.0, gate.bound, value), 1.12 * max(gate.bound, value)
        span = max(high - low, 1e-12)
        fill = 100 * (value - low) / span
        words = "at most" if gate.better == "lower" else "at least"
        items.append(
            f'<li class="gate {"met" if gate.is_met else "missed"}" data-name="{esc(gate.name)}">'
            f'<span class="mark" role="img" aria-label="{"met" if gate.is_met else "not met"}">'
            f"{_TICK if gate.is_met else _CROSS}</span>"
            f'<div><h3>{esc(gate.name)}</h3><div class="gauge"><i style="width:{fill:.1f}%"></i>'
            f'<b style="left:{100 * (gate.bound - low) / span:.1f}%"></b></div></div>'
            f'<div class="told num">{with_spread(Value(gate.value, gate.spread), f"gate|{gate.name}")}{unit}'
            f"<small>{words} {data(gate.bound, f'bound|{gate.name}')}{unit}</small></div></li>"
        )
    met = sum(gate.is_met for gate in gates)
    return (
        f"<h2>{met} of {len(gates)} bounds are met</h2>"
        '<p class="soft">The upright line in each bar is the bound.</p>'
        f'<ul class="gates">{"".join(items)}</ul>'
    )


def _quality(report: Report) -> str:
    names = {score.name: score for score in report.scores}
    if report.quality not in names:
        return ""
    score = names[report.quality]
    wide, narrow, notes = quality_plot(report.models, score.name, score.title)
    if not wide:
        return ""
    left_out = f'<p class="small soft">Not in the plot: {esc(" ".join(notes))}</p>' if notes else ""
    return (
        "<h2>Quality against the number of network calls</h2>"
        f"<p>{esc(score.meaning)} {BETTER[score.better].capitalize()}. Lines are the teacher with fewer steps, which is "
        "what a student must beat; points are students; dashed levels make no calls. Bands and whiskers are spreads.</p>"
        f'<div class="plot wide">{wide}</div><div class="plot narrow">{narrow}</div>{left_out}'
    )


def _charts(report: Report) -> str:
    if not report.charts:
        return ""
    abouts = [f'<p class="small soft">{esc(chart.about)}</p>' if chart.about else "" for chart in report.charts]
    figures = "".join(
        f"<figure><h3>{esc(chart.title)}</h3>{about}{chart_plot(chart)}</figure>"
        for chart, about in zip(report.charts, abouts, strict=True)
    )
    return (
        "<h2>Training</h2><p class='soft'>Losses of distribution matching do not say whether a run is well; the monitors do. "
        f"Bands hold the middle 80 % of what was logged.</p><div class='charts'>{figures}</div>"
    )


def _stages(report: Report) -> str:
    if not report.stages:
        return ""
    total = sum(stage.seconds for stage in report.stages)
    bar = "".join(
        f'<i style="flex:{max(stage.seconds, 0.001):.3f} 0 0;--k:{i % 5}" title="{esc(stage.name)}"></i>'
        for i, stage in enumerate(report.stages)
    )
    items = "".join(
        f'<li><div class="head"><h3>{esc(stage.name)}</h3>'
        f'<span class="soft num">{data(stage.seconds, f"seconds|{stage.name}", duration(stage.seconds))}</span></div>'
        f'<div class="command"><pre>{esc(stage.command)}</pre><button class="quiet copy" type="button" '
        f'aria-label="Copy the command: {esc(stage.name)}">Copy</button></div></li>'
        for stage in report.stages
    )
    return (
        f'<h2>How it was made</h2><p class="soft">{len(report.stages)} stages, {duration(total)} in all.</p>'
        f'<div class="time" aria-hidden="true">{bar}</div><ol class="stages">{items}</ol>'
    )


def _limits(limits: Sequence[str]) -> str:
    return (
        f'<h2>What limits these numbers</h2><div class="limits">{"".join(f"<p>{esc(text)}</p>" for text in limits)}</div>'
        if limits
        else ""
    )


def _environment(environment: Mapping[str, str]) -> str:
    if not environment:
        return ""
    pairs = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in environment.items())
    return f'<h2>Where these numbers come from</h2><dl class="environment">{pairs}</dl>'
