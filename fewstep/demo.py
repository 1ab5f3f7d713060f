"""`fewstep demo`: a miniature, end to end. Each stage is a public command, printed before it runs; a second call goes on."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STAGES = ("analytic_finetune", "analytic_kd", "analytic_dmd2_onestep", "analytic_dmd2")


def demo(out: Path = Path("demo")) -> Path:
    """The page it wrote: what each student's samples look like before and after, and how far they are from the data."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OUTPUT_ROOT": str(out / "checkpoints")}
    print(f"The demo distils an exact teacher into one-step and four-step students: two to three minutes. Runs: {out}/")
    runs: dict[str, Path] = {}
    for name in STAGES:
        run = runs[name] = out / "checkpoints" / "analytic" / "basic" / name
        command = ["fewstep", "train", f"experiment={name}"]
        print(f"\n$ OUTPUT_ROOT={out / 'checkpoints'} {' '.join(command)}", flush=True)
        if (run / "summary.json").is_file():
            print("  finished earlier")
            continue
        done = subprocess.run([sys.executable, "-m", *command], env=environment)
        if done.returncode:
            raise SystemExit(done.returncode)  # the command has said why; the same `fewstep demo` goes on from here
    exported = out / "export"
    print(f"\n$ fewstep export {runs['analytic_dmd2']} --out {exported}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "fewstep", "export", str(runs["analytic_dmd2"]), "--out", str(exported)],
        env=environment,
        check=True,
    )
    summaries = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
    page = out / "report.html"
    page.write_text(_page(summaries, runs))
    keep = {
        name: {key: s[key] for key in ("energy_distance", "energy_distance_undistilled", "wall_s")}
        for name, s in summaries.items()
    }
    (out / "summary.json").write_text(json.dumps(keep | {"wall_s": round(time.monotonic() - began, 1)}, indent=1) + "\n")
    print("\nenergy distance to the data (0: the same distribution), at the student's own number of calls")
    for name, summary in summaries.items():
        print(f"  {name:22} {summary['energy_distance_undistilled']:8.4f} undistilled  {summary['energy_distance']:8.4f} after")
    print(f"\nthe report: {page.resolve()}")
    return page


def _page(summaries: dict[str, dict[str, float]], runs: dict[str, Path]) -> str:
    parts: list[str] = []
    for name, summary in summaries.items():
        pictures = sorted((runs[name] / "previews").glob("step_*.svg"))
        figures = "".join(f"<figure>{picture.read_text()}</figure>" for picture in (pictures[0], pictures[-1]))
        numbers = f"energy distance {summary['energy_distance_undistilled']:.4f} before, {summary['energy_distance']:.4f} after"
        about = f"{numbers}; {summary['step']:.0f} iterations in {summary['wall_s']:.0f} s"
        parts.append(f"<section><h2>{html.escape(name)}</h2><p>{html.escape(about)}</p>{figures}</section>")
    return _HEAD + "".join(parts) + "</main></body></html>\n"


_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fewstep: the analytic demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body{font:16px/1.5 system-ui,sans-serif;margin:0;background:#fff;color:#1a1a1a}main{max-width:60rem;margin:auto;padding:1rem}
figure{margin:1rem 0}svg{max-width:100%;height:auto}h2{margin:2rem 0 0;font-size:1.2rem}p{margin:.25rem 0;color:#444}
</style></head><body><main><h1>A many-step model becomes a few-step student</h1>
<p>The data is a mixture of eight Gaussians whose exact denoiser is the teacher. Each picture shows held-out data beside the
student's samples, first as it started (undistilled, at the same number of network calls), then after training. The energy
distance is the squared form 2E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased, on 4096 samples each: about 0.001 is its noise.</p>
"""
