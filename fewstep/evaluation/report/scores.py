"""The parts of a page on scores and speed: a card for each headline score, all numbers as a table, bars of the speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fewstep.evaluation.report.contents import Better, Model, Report, Value
from fewstep.evaluation.report.curves import colours_of
from fewstep.evaluation.report.text import BETTER, data, esc, plain, with_spread


def scores(report: Report) -> str:
    models = [model for model in report.models if model.scores]
    if not models:
        return ""
    cards, colours = [], colours_of(report.models)
    for score in report.scores:
        entries = [(model, model.scores[score.name]) for model in models if model.is_featured and score.name in model.scores]
        if not score.is_headline or not entries:
            continue
        place, is_log = _scale([one for _, one in entries])
        lanes = "".join(
            _lane(model.name, colours[model.name], one, place, f"card|{model.name}|{score.name}") for model, one in entries
        )
        counts = sorted({one.num for _, one in entries})
        count = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
        cards.append(
            _card(score.title, score.better, score.meaning, lanes, f"{count}{', logarithmic scale' if is_log else ''}")
        )
    about = f'<p class="soft">The number after &plusmn; is {esc(report.spread)}; n is the number of clips.</p>'
    return f'<h2>Scores</h2>{about}<div class="cards">{"".join(cards)}</div>{_table(report, models, colours)}'


def _card(title: str, better: Better, about: str, lanes: str, end: str = "") -> str:
    return (
        f'<article class="card"><div class="head"><h3>{esc(title)}</h3><span class="tag">{BETTER[better]}</span></div>'
        f'{f"<p>{esc(about)}</p>" if about else ""}<ul class="lanes">{lanes}</ul>'
        f"{f'<p class=end>{esc(end)}</p>' if end else ''}</article>"
    )


def _table(report: Report, models: Sequence[Model], colours: Mapping[str, str]) -> str:
    head = "".join(
        f'<th scope="col"><span class="dot" style="--c:{colours[model.name]}"></span> {esc(model.name)}</th>'
        for model in models
    )
    lines = [
        _line_of("network calls", "", [str(m.num_calls) if m.num_calls is not None else "&ndash;" for m in models]),
        _line_of("guidance", "w of uncond + w (cond - uncond); 1 is off", [plain(m.guidance) for m in models]),
    ]
    for score in report.scores:
        cells = []
        for model in models:
            one = model.scores.get(score.name)
            cell = "&ndash;" if one is None else f"{with_spread(one, f'{model.name}|{score.name}')}<small>n {one.num}</small>"
            cells.append(cell)
        if any(score.name in model.scores for model in models):
            about = BETTER[score.better] if score.is_headline else f"{score.meaning} {BETTER[score.better].capitalize()}."
            lines.append(_line_of(score.title, about, cells))
    if any(model.note for model in models):
        lines.append(_line_of("made with", "", [f"<small>{esc(model.note)}</small>" for model in models]))
    return (
        "<details><summary>All numbers as a table</summary>"
        '<div class="scroll" role="region" aria-label="All numbers" tabindex="0">'
        f'<table><thead><tr><th scope="col"></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></details>'
    )


def _line_of(title: str, about: str, cells: Sequence[str]) -> str:
    small = f"<small>{esc(about)}</small>" if about else ""
    return f'<tr><th scope="row">{esc(title)}{small}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _lane(name: str, colour: str, one: Value, place: Callable[[float], float], of: str) -> str:
    track = ""
    if math.isfinite(one.value):
        spread = one.spread if math.isfinite(one.spread) else 0.0
        left, right = place(one.value - spread), place(one.value + spread)
        track = f'<s style="left:{left:.1f}%;width:{right - left:.1f}%"></s><i style="left:{place(one.value):.1f}%"></i>'
    return (
        f'<li class="lane" style="--c:{colour}">{_who(name)}'
        f'<span class="told num">{with_spread(one, of)}</span><span class="track" aria-hidden="true">{track}</span></li>'
    )


def _who(name: str) -> str:
    return f'<span class="who"><span class="dot"></span><span>{esc(name)}</span></span>'


def _scale(scores: Sequence[Value]) -> tuple[Callable[[float], float], bool]:
    """Position of a value on a track in per cent, and whether the track is logarithmic: then 0 and below are its left end."""
    finite = [score for score in scores if math.isfinite(score.value)]
    values = [score.value for score in finite]
    spreads = [score.spread if math.isfinite(score.spread) else 0.0 for score in finite]
    if not values:
        return (lambda value: 0.0), False
    positive = [value for value in values if value > 0]
    is_log = len(positive) > 1 and max(positive) > 25 * sorted(positive)[len(positive) // 2 - 1 if len(positive) > 2 else 0]
    if is_log:
        low, high = math.log(min(positive) / 1.5), math.log(max(v + s for v, s in zip(values, spreads)))
        return (lambda value: 2 + 96 * min(max((math.log(max(value, 1e-300)) - low) / (high - low), 0.0), 1.0)), True
    low, high = min(v - s for v, s in zip(values, spreads)), max(v + s for v, s in zip(values, spreads))
    if 0 <= low < 0.6 * high:
        low = 0.0  # a scale from 0 unless the differences would drown in it
    span = (high - low) or 1.0
    return (lambda value: 2 + 96 * min(max((value - low) / span, 0.0), 1.0)), False


def speed(models: Sequence[Model]) -> str:
    timed = [(model, model.clips_per_s) for model in models if model.clips_per_s is not None and model.is_featured]
    if not timed:
        return ""
    colours = colours_of(models)
    fastest = max(rate.value for _, rate in timed)
    most = max((model.num_calls or 0 for model, _ in timed), default=0)
    rates = [(model, f"{100 * rate.value / fastest:.2f}", with_spread(rate, f"speed|{model.name}")) for model, rate in timed]
    calls = [
        (model, f"{100 * model.num_calls / most:.2f}", data(model.num_calls, f"calls|{model.name}"))
        for model, _ in timed
        if model.num_calls is not None
    ]
    count = max(rate.num for _, rate in timed)
    timing = f"Measured over {count} clips each. " if count else ""

    def bars(rows: Sequence[tuple[Model, str, str]]) -> str:
        return "".join(
            f'<li class="lane" style="--c:{colours[model.name]}">{_who(model.name)}'
            f'<span class="told num">{text}</span><span class="bar" style="width:{width}%"></span></li>'
            for model, width, text in rows
        )

    return (
        f'<h2>Speed</h2><p class="soft">{timing}Both scales start at 0 and are linear.</p><div class="cards speed">'
        f"{_card('Clips a second', 'higher', '', bars(rates))}"
        f"{_card('Network calls for a clip', 'lower', '', bars(calls))}</div>"
    )
