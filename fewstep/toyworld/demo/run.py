"""Runs a demo, or goes on with it: its stages, then the numbers that one wants first."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fewstep.distill import gate
from fewstep.distill.stages import claim, marker_of, run
from fewstep.errors import UserError
from fewstep.files import lock, write_json
from fewstep.toyworld.demo import causal as chains
from fewstep.toyworld.demo.stages import AGAIN, FEW, IMPORTS, METHODS, Size, stages
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
    for name, few in () if causal else FEW.items():
        for verdict in gate.verdicts(out / "scores" / f"{name}.json", out / "scores" / f"{few}.json"):
            print(f"{name}: {verdict}")
    report = out / "report.html"
    summary = read_json(out / "summary.json", AGAIN)
    print(f"\n{json.dumps({k: v for k, v in summary.items() if k in (_SHOWN_CAUSAL if causal else _SHOWN)}, indent=1)}")
    print(f"the whole took {time.monotonic() - began:.0f} s this time; every number: {out}/summary.json")
    print(f"the report: {report.resolve()}")
    return report


_SHOWN_CAUSAL = tuple(
    f"{name}_{who}{end}"
    for name in ("frechet", "frechet_ratio", "adherence", "long_drift", "long_sink_rise", "core_seconds")
    for who in ("teacher", "4step", "kd_causal", "consistency", "sf", "sf_consistency")
    for end in ("", "_spread")
)
_SHOWN = tuple(
    f"{name}{end}"
    for name in (
        *("frechet_real", "frechet_tokenizer", "frechet_teacher", "frechet_teacher_4calls", "frechet_teacher_1call"),
        *("frechet_4step", "frechet_1step", "frechet_ratio_4step", "frechet_ratio_1step"),
        *("gap_closed_4step", "gap_closed_1step", "clips_per_s_teacher", "clips_per_s_4step", "clips_per_s_1step"),
    )
    for end in ("", "_spread")
)


def _claim(out: Path, size: Size, from_scratch: bool, causal: bool) -> None:
    """One folder is one demo: a quick one does not go on as a long one."""
    path, about = out / "demo.json", {"size": size, "from_scratch": from_scratch} | ({"causal": True} if causal else {})
    if path.is_file() and read_json(path, f"Remove {out}, or choose another --out") != about:
        raise UserError(f"{out}: holds another demo ({read_text(path).strip()}). Remove it, or choose another --out")
    write_json(path, about, indent=None)
