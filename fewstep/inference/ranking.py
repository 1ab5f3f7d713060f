"""The best way in which a teacher spends a few network calls: what a student of as many calls is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fewstep.diffusion import TeacherSampler
from fewstep.evaluation.score import Scorer
from fewstep.inference.clip_sets import Source
from fewstep.inference.evaluation import Evaluation
from fewstep.solvers import SolverName

NUM = 256  # clips by which the ways are compared


def best_of(
    source: Source, sampler: TeacherSampler, task: Evaluation, scorer: Scorer, reference: Any
) -> tuple[TeacherSampler, list[dict[str, Any]]]:
    """The way to spend `task.calls` network calls that the scorer ranks first, and its distance of each way.

    Ways are solvers, grids, and half as many steps with guidance. The ranking has noise of its own, and fewer clips.
    """
    assert task.calls is not None
    num, table = min(NUM, task.per_set), list[tuple[float, TeacherSampler]]()
    ways = ways_of(task.calls, sampler)
    if len(ways) == 1:
        return ways[0], []  # nothing to choose
    for way in ways:
        clips = replace(source, sampler=way).clips(task, num, task.sets)
        table.append((scorer.distance(clips, reference), way))
    table.sort(key=lambda row: row[0])
    return table[0][1], [{"sampler": named(way), "distance": value, "n": num} for value, way in table]


def ways_of(calls: int, sampler: TeacherSampler) -> list[TeacherSampler]:
    """Ways to spend `calls` network calls, some with the guidance of `sampler` where it leaves steps enough."""
    plain = replace(sampler, grid="flow", shift=1.0, guidance=1.0)
    if calls == 1:
        return [replace(plain, solver="euler", num_steps=1)]
    # Two steps of either multistep sampler are one of Euler's and its x0: the choice among them is for more.
    multistep: tuple[SolverName, ...] = ("euler", "dpmpp_2m", "unipc")
    ways = [replace(plain, num_steps=calls, solver=name, shift=shift) for name in multistep for shift in (1.0, 3.0)]
    if sampler.grid == "karras":
        ways.append(replace(sampler, num_steps=calls - 1, guidance=1.0))
    if calls % 2:
        ways.append(replace(plain, num_steps=(calls + 1) // 2, solver="heun"))
    elif sampler.guidance != 1.0:
        few: tuple[SolverName, ...] = multistep if calls > 4 else ("unipc",)
        led = replace(plain, num_steps=calls // 2, guidance=sampler.guidance)
        ways += [replace(led, solver=name, shift=shift) for name in few for shift in (1.0, 3.0)]
    return ways


def named(sampler: TeacherSampler) -> str:
    """The sampler in words."""
    grid = f"shift {sampler.shift:g}" if sampler.grid == "flow" else f"grid {sampler.grid}"
    guided = f", guidance {sampler.guidance:g}" if sampler.guidance != 1.0 else ", no guidance"
    return f"{sampler.solver}, {sampler.num_steps} steps, {grid}{guided}"
