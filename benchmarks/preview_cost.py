"""What watching a run costs: seconds of a preview of four clips and of a look of its health monitors, against its iterations.

    OUTPUT_ROOT=demo python benchmarks/preview_cost.py          after `fewstep demo`, whose teacher pairs it trains on

Prints processor seconds, which other work on the machine does not change, and the share at the recipe's own schedule.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fewstep.cli import main
from fewstep.training.health import Monitor
from fewstep.training.looks import Looks

ITERATIONS, EVERY = 60, 20
USUAL = 100  # iterations between two previews of a toy recipe


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        began = time.process_time()
        answer = function(*arguments)
        seconds.append(time.process_time() - began)
        return answer

    return run


def measure() -> None:
    previews, looks = list[float](), list[float]()
    Looks.show = timed(Looks.show, previews)  # type: ignore[method-assign]
    Monitor.look = timed(Monitor.look, looks)  # type: ignore[method-assign]
    schedule = (f"trainer.max_iter={ITERATIONS}", f"preview.every={EVERY}", f"health.every={EVERY}", "preview.max_share=1")
    began = time.process_time()
    main(["train", "experiment=toy_kd_1step", "job.name=preview_cost", *schedule, f"checkpoint.save_iter={ITERATIONS}"])
    iteration = (time.process_time() - began - sum(previews) - sum(looks)) / ITERATIONS
    preview, look = (sum(values[1:]) / len(values[1:]) for values in (previews, looks))
    print(f"first preview {previews[0]:.2f} s, later ones {preview:.2f} s; looks {look:.2f} s; an iteration {iteration:.3f} s")
    print(f"share with both every {USUAL} iterations: {(preview + look) / (preview + look + USUAL * iteration):.2%}")


if __name__ == "__main__":
    measure()
