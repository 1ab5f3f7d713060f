"""Numbers and texts of a page as HTML: escaped, rounded to what their spread allows, and in <data> elements."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

from fewstep.evaluation.report.contents import Better, Value

BETTER: Mapping[Better, str] = {"lower": "lower is better", "higher": "higher is better", "as real": "best near real clips"}


def with_spread(one: Value, of: str) -> str:
    """The value and its spread, both to the same decimal: that of the spread's second figure."""
    if not math.isfinite(one.value):
        return f'<data value="{one.value!r}" data-of="{esc(of)}">none</data>'
    if not math.isfinite(one.spread) or one.spread <= 0:
        return data(one.value, of)
    decimals = min(max(1 - math.floor(math.log10(one.spread)), 0), 6)
    spread = f'<data value="{float(one.spread)!r}" data-of="{esc(of)}|spread">{one.spread:.{decimals}f}</data>'
    return f'{data(one.value, of, f"{one.value:.{decimals}f}")}<span class="pm"> &plusmn; {spread}</span>'


def data(value: float | int, of: str, text: str = "") -> str:
    text = text or plain(value)
    return f'<data value="{value if isinstance(value, int) else float(value)!r}" data-of="{esc(of)}">{minus(text)}</data>'


def plain(value: float | None) -> str:
    """Three figures, without an exponent for the sizes that scores and speeds have."""
    if value is None:
        return "&ndash;"
    if not math.isfinite(value):
        return "none"
    size = abs(value)
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:.0f}" if size < 1e7 else f"{value:.3g}"
    return f"{value:.0f}" if 1000 <= size < 1e7 else f"{value:.3g}"


def minus(text: str) -> str:
    return f"&minus;{text[1:]}" if text.startswith("-") else text


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def esc(text: str) -> str:
    return html.escape(text, quote=True)
