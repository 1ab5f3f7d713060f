"""`fewstep check data`: the content of a data set, and whether it can be trained on."""

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
    """The text to print, and whether the data can be trained on; `overrides` are settings of the run that is to read it."""
    report = with_settings(survey(folder, num_threads=num_threads, watch=track), overrides)
    if page is not None:
        sheet.write(page, report)
    return json.dumps(report.plain()) if as_json else sheet.printed(report, page), report.is_trainable
