"""Runs a demo, or goes on with it: its stages, then the scores, and what they say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fewstep.distill.stages import claim, marker_of, run
from fewstep.errors import UserError
from fewstep.evaluation.verdict import table
from fewstep.files import lock, write_json
from fewstep.toyworld.demo import causal as chains
from fewstep.toyworld.demo.stages import AGAIN, IMPORTS, METHODS, TITLES, Size, stages
from fewstep.toyworld.demo.verdict import says
from fewstep.untrusted.text import read_json, read_text


def demo(
    out: Path = Path("demo"),
    size: Size = "default",
    from_scratch: bool = False,
    causal: bool = False,
    methods: Sequence[str] = (),
) -> Path:
    """Runs what has not run yet and returns the path of the report. Raises ValueError if a command fails.

    methods: further ones of METHODS. A finished demo goes on with them; its other stages are not run again, unless their
    commands have changed.
    """
    methods = [name for name in METHODS if name in methods]  # in one order, each once
    began = time.monotonic()
    with lock(out / ".lock"):
        _claim(out, size, from_scratch, causal)
        road = partial(chains.stages, out, size) if causal else partial(stages, out, size, from_scratch, methods)
        if marker_of(out, "world").is_file():  # only of a world that is there all stages are known
            claim(list(road()), out)
        for order, stage in enumerate(road()):
            run(stage, out, order, again="fewstep demo", preload=IMPORTS, num_threads=1)
    report, summary = out / "report.html", read_json(out / "summary.json", AGAIN)
    titles = chains.TITLES if causal else TITLES
    print(f"\n{table({name: out / 'scores' / f'{name}.json' for name in titles}, titles)}")
    for line in () if causal else says(out, summary):
        print(line)
    took = f"The demo took {time.monotonic() - began:.0f} s this time"
    print(f"\n{took}. Look at {report.resolve()}; every number with its spread is in {out}/summary.json.")
    return report


def _claim(out: Path, size: Size, from_scratch: bool, causal: bool) -> None:
    """One folder is one demo: a quick one does not go on as a long one."""
    path, about = out / "demo.json", {"size": size, "from_scratch": from_scratch} | ({"causal": True} if causal else {})
    if path.is_file() and read_json(path, f"Remove {out}, or choose another --out") != about:
        raise UserError(f"{out}: holds another demo ({read_text(path).strip()}). Remove it, or choose another --out")
    write_json(path, about, indent=None)
