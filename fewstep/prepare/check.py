"""`fewstep check data`: what a data set holds, and whether it can be trained on, before anything is spent on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fewstep.data.check import sheet
from fewstep.data.check.survey import survey, with_settings
from fewstep.progress import track


def data(
    folder: Path, overrides: Sequence[str], *, as_json: bool = False, page: Path | None = None, num_threads: int | None = None
) -> tuple[str, bool]:
    """What to print, and whether the data can be trained on; `overrides` are settings of the run it is meant for."""
    found = with_settings(survey(folder, num_threads=num_threads, watch=track), overrides)
    if page is not None:
        sheet.write(page, found)
    return json.dumps(found.plain()) if as_json else sheet.printed(found, page), found.is_trainable
