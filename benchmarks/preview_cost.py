"""What previews of video cost a run: seconds of one preview of four clips against those of the iterations between two.

    OUTPUT_ROOT=demo python benchmarks/preview_cost.py          after `fewstep demo`, whose teacher pairs it trains on

Prints processor seconds, which other work on the machine does not change, and the share at the default schedule.
"""

from __future__ import annotations

import time

from fewstep.cli import main
from fewstep.training.looks import Looks

ITERATIONS, EVERY = 60, 20


def measure() -> None:
    seconds: list[float] = []
    show = Looks.show

    def timed(looks: Looks, step: int) -> dict[str, float]:
        began = time.process_time()
        numbers = show(looks, step)
        seconds.append(time.process_time() - began)
        return numbers

    Looks.show = timed  # type: ignore[method-assign]
    settings = (
        f"trainer.max_iter={ITERATIONS}",
        f"preview.every={EVERY}",
        "preview.max_share=1",
        f"checkpoint.save_iter={ITERATIONS}",
    )
    began = time.process_time()
    main(["train", "experiment=toy_kd_1step", "job.name=preview_cost", "preview=clips", *settings])
    iteration = (time.process_time() - began - sum(seconds)) / ITERATIONS
    usual = sum(seconds[1:]) / len(seconds[1:])
    print(f"first preview {seconds[0]:.2f} s, each later one {usual:.2f} s, an iteration {iteration:.3f} s")
    print(f"share at one preview every 500 iterations: {usual / (usual + 500 * iteration):.2%}")


if __name__ == "__main__":
    measure()
