"""A contact sheet: one HTML file with pictures of the samples, their controls laid over them, and the problems of each.

The file needs nothing beside it. Samples with problems come first; of the others, evenly spaced ones are shown.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.config import choices
from fewstep.data.check.look import Problem, Sample
from fewstep.data.check.survey import Survey
from fewstep.data.controls import Pixels, Span
from fewstep.data.files import video
from fewstep.data.folder import layout
from fewstep.data.folder.layout import Layout
from fewstep.files import write_text

_SIDE = 176  # px of the longer side of a picture
_SHARES = (0.0, 0.5, 1.0)  # places within the clip
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:2400px;padding:0 1em;color:#1c1c1c;background:#fff}
table{border-collapse:collapse;margin:1em 0}td{border-top:1px solid #ddd;padding:.25em .9em .25em 0;vertical-align:top}
.error{color:#b00020}.warning{color:#8a5a00}.sample{border-top:1px solid #ddd;padding:.8em 0}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(560px,100%),1fr));gap:0 28px}
.strip{display:flex;flex-wrap:wrap;gap:14px}figure{margin:0}figcaption{font-size:12px;color:#555}img{display:block;margin-bottom:2px}
.pictures{display:flex;gap:2px}h2{font-size:15px;margin:0 0 .2em}p{margin:.2em 0 .5em}.verdict{font-size:17px;font-weight:600}
@media(prefers-color-scheme:dark){body{background:#161616;color:#e8e8e8}td,.sample{border-color:#3a3a3a}
.error{color:#ff7a85}.warning{color:#e5b454}figcaption{color:#aaa}}
"""


def write(path: str | os.PathLike[str], survey: Survey, num: int = 60) -> int:
    """Writes the sheet with at most `num` samples; how many it shows."""
    place = Layout.open(survey.root)
    samples = _selection(survey, num)
    problems = _by_stem(survey.problems)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{_text(survey.root.name)}</title><style>{_STYLE}</style>",
        f"<h1>{_text(str(survey.root))}</h1><p class='verdict'>{verdict(survey)}</p>",
        "<table>" + "".join(f"<tr><td>{_text(a)}<td>{_text(b)}" for a, b in survey.rows()) + "</table>",
        "".join(f"<p class='{p.level}'>{p.level}: {_text(p.message)}</p>" for p in survey.problems),
        f"<p>{len(samples)} of {len(survey.samples)} samples, their first, middle and last frame, with controls over them.</p>",
        "<div class='samples'>",
        *(_section(place, sample, problems.get(sample.stem, [])) for sample in samples),
        "</div>",
    ]
    write_text(path, "\n".join(parts) + "</html>\n")
    return len(samples)


def verdict(survey: Survey) -> str:
    """One line: whether it can be trained on."""
    errors = sum(problem.level == "error" for problem in survey.problems)
    warnings = len(survey.problems) - errors
    counts = f"{len(survey.samples)} samples, {errors} errors, {warnings} warnings"
    return f"{'can be trained on' if survey.is_trainable else 'CANNOT be trained on as it is'} ({counts})"


def _selection(survey: Survey, num: int) -> list[Sample]:
    """Those with problems, then others from all over the set."""
    wrong = set(_by_stem(survey.problems))
    bad = [sample for sample in survey.samples if sample.stem in wrong][:num]
    good = [sample for sample in survey.samples if sample.stem not in wrong]
    room = min(num - len(bad), len(good))
    return bad + [good[place] for place in np.linspace(0, len(good) - 1, room).round().astype(int)] if room else bad


def _by_stem(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    out: dict[str, list[Problem]] = {}
    for problem in problems:
        for stem in problem.stems:
            out.setdefault(stem, []).append(problem)
    return out


def _section(place: Layout, sample: Sample, problems: Sequence[Problem]) -> str:
    facts = [f"{sample.num_frames} frames"] if sample.num_frames else []
    facts += [f"{sample.size[1]} x {sample.size[0]}"] if sample.size else []
    facts += [f"{sample.fps:g} fps"] if sample.fps else []
    facts += [f"{name} {'x'.join(map(str, shape))}" for name, shape in sample.shapes.items()]
    strips = "".join(_figure(name, frames) for name, frames in _pictures(place, sample).items())
    kinds = "".join(f"<p class='{p.level}'>{_text(p.kind)}: {_text(p.message)}</p>" for p in problems)
    return (
        f"<div class='sample'><h2>{_text(sample.stem)}</h2><p>{_text(sample.caption or '')}</p>{kinds}"
        f"<div class='strip'>{strips}</div><p>{_text(', '.join(facts))}</p></div>"
    )


def _pictures(place: Layout, sample: Sample) -> Mapping[str, Pixels]:
    """Frames of the clip, and of each control over them; what cannot be read is left out, its problem says why."""
    if not sample.num_frames or not sample.size:
        return {}
    spots = sorted({round(share * (sample.num_frames - 1)) for share in _SHARES})
    scale = min(_SIDE / max(sample.size), 4.0)
    size = max(round(sample.size[0] * scale), 1), max(round(sample.size[1] * scale), 1)
    path = place.files(place.pixels())[sample.stem]
    out: dict[str, Pixels] = {}
    try:
        frames = np.concatenate([video.read(path, spot, 1, size=size).frames for spot in spots])
    except (ValueError, OSError):
        return out
    out["clip"] = frames
    for name, cls in choices("control").items():
        part = layout.control(cls.folder, cls.suffix)  # what makes it a control
        control = place.files(part).get(sample.stem)
        if control is not None:
            try:
                signal = np.concatenate([cls().read(control, Span(spot), size) for spot in spots])
            except (ValueError, OSError):
                continue
            out[name] = np.clip(frames * 0.45 + signal * 0.65, 0, 255).astype(np.uint8)
    return out


def _figure(name: str, frames: Pixels) -> str:
    pictures = "".join(f"<img alt='{_text(name)}' src='data:image/jpeg;base64,{_jpeg(frame)}'>" for frame in frames)
    return f"<figure><div class='pictures'>{pictures}</div><figcaption>{_text(name)}</figcaption></figure>"


def _jpeg(frame: NDArray[np.uint8]) -> str:
    import cv2

    good, data = cv2.imencode(".jpg", cv2.cvtColor(frame, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    assert good, frame.shape
    return base64.b64encode(data.tobytes()).decode()


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def printed(survey: Survey, sheet: Path | None = None) -> str:
    """The whole survey for a terminal: one table, the problems by name, the verdict."""
    rows = survey.rows()
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += ["", *map(str, survey.problems)] if survey.problems else []
    lines += ["", f"{survey.root}: {verdict(survey)}"]
    return "\n".join(lines + ([f"pictures: {sheet}"] if sheet else []))
