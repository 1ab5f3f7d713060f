"""What a distillation takes: bytes on disk, and network calls for each stage. Backward counts as two calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from fewstep.distill.facts import Facts
from fewstep.distill.road import score_files
from fewstep.distill.stages import marker_of, read_marker

FREQUENCY = 5  # turns of DMD2 for each of the student


@dataclass(frozen=True)
class Cost:
    """Of one stage."""

    calls: float  # of the network, each for one clip
    gib: float = 0.0  # on disk


def cost_of(facts: Facts) -> Mapping[str, Cost]:
    """The stages that cost something, by name."""
    request, sampler = facts.request, facts.sampler
    numbers = prod(facts.latent_shape)
    gib = numbers / 2**30
    costs = {"latents": Cost(0, 2 * gib * facts.clips.num * (2 if request.control else 1))}
    if "kd" in request.trainings:
        states = request.steps if request.steps > 1 else 0
        costs["pairs"] = Cost(facts.num_pairs * sampler.num_calls, 4 * gib * (2 + states) * facts.num_pairs)
        costs["kd"] = Cost(3.0 * facts.iters("kd") * facts.batch)
    if "dmd2" in request.trainings:
        rollout = (request.steps + 1) / 2  # a random number of calls
        guided = 1 if sampler.guidance == 1.0 else 2
        student, critic = rollout + 2 + 1 + guided, rollout + 3
        each = student / FREQUENCY + critic * (1 - 1 / FREQUENCY)
        costs["dmd2"] = Cost(each * facts.iters("dmd2") * facts.batch)
    calls = {"teacher": sampler.num_calls, "teacher_few": 2 * request.steps}
    costs["scores"] = Cost(sum(facts.num_eval * calls.get(name, request.steps) for name in score_files(facts)))
    return costs


def table(facts: Facts, calls_per_s: float | None) -> str:
    """The costs as text, with hours where the speed is known."""
    rows = [f"{'stage':10} {'network calls':>14} {'GiB':>8}" + (f" {'hours':>8}" if calls_per_s else "")]
    costs = cost_of(facts)
    for name, cost in [*costs.items(), ("all", _sum(costs))]:
        hours = f" {cost.calls / calls_per_s / 3600:8.2f}" if calls_per_s else ""
        rows.append(f"{name:10} {cost.calls:14,.0f} {cost.gib:8.2f}{hours}")
    return "\n".join(rows)


def speed(facts: Facts, work: Path) -> float | None:
    """Network calls per second: of the request, else as the pairs of this distillation took; None where neither is known."""
    if facts.request.calls_per_s is not None:
        return facts.request.calls_per_s
    marker, costs = marker_of(work, "pairs"), cost_of(facts)
    if not marker.is_file() or "pairs" not in costs:
        return None
    seconds = read_marker(marker).seconds
    return costs["pairs"].calls / seconds if seconds else None


def _sum(costs: Mapping[str, Cost]) -> Cost:
    return Cost(sum(cost.calls for cost in costs.values()), sum(cost.gib for cost in costs.values()))
