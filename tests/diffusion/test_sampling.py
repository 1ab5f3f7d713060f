"""The records of how models are sampled, against the solvers and grids they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fewstep.batch import Condition
from fewstep.config import dump, parse
from fewstep.diffusion import EDM, VP, RectifiedFlow, Rng, StudentSampler, TeacherSampler, TrigFlow, guided, samplers, times
from fewstep.diffusion.sampling import student_times
from fewstep.networks.analytic import GaussianMixture

MIXTURE = GaussianMixture([[1.0, 0.3], [-0.8, -0.5]], [0.3, 0.6], labels=[0, 1])
COND = Condition(label=torch.tensor([0, 1, 0, 1]))
NEGATIVE = Condition(label=torch.full((4,), -1))
NOISE = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_cosmos_1_is_res_2ab_on_35_steps_of_a_karras_grid_and_a_clean_denoise() -> None:
    teacher, sampler = MIXTURE.on(EDM()), TeacherSampler.for_path(EDM())
    assert (sampler.num_calls, sampler.times(EDM()).tolist()) == (36, times.karras(36, 80.0, 0.002).tolist())
    x0 = samplers.res_2ab(teacher, 80 * NOISE, times.karras(36), COND)
    assert torch.equal(sampler(teacher, NOISE, COND), x0)


def test_flows_are_unipc_with_shift_5_and_tables_even_in_their_entries() -> None:
    sampler = TeacherSampler.for_path(RectifiedFlow())
    x0 = samplers.unipc(MIXTURE, NOISE, times.on_flow(35, RectifiedFlow(), 5.0), COND)
    assert torch.equal(sampler(MIXTURE, NOISE, COND), x0) and sampler.num_calls == 35
    table = TeacherSampler.for_path(VP())
    torch.testing.assert_close(table.times(VP()), torch.arange(50, 0, -1).double() / 50)


def test_a_karras_grid_on_a_flow_has_the_same_noise_to_signal_ratios() -> None:
    sampler = TeacherSampler("res_2ab", 10, "karras")
    sigma = times.karras(11)
    torch.testing.assert_close(sampler.times(RectifiedFlow()), sigma / (1 + sigma))


def test_guidance_may_change_at_the_boundary_of_two_experts() -> None:
    sampler = TeacherSampler("euler", 6, guidance=4.0, guidance_low=2.0, boundary=0.9)
    grid = times.on_flow(6, RectifiedFlow(), 5.0)
    assert bool((grid >= 0.9).any()) and bool((grid < 0.9).any())
    x = NOISE
    for t, t_next in zip(grid, [*grid[1:], None], strict=True):
        teacher = guided(MIXTURE, NEGATIVE, 4.0 if t >= 0.9 else 2.0)
        answer = teacher(x, t.expand(4), COND)
        x = answer.x0 if t_next is None else x + (t_next - t) * answer.velocity
    torch.testing.assert_close(sampler(MIXTURE, NOISE, COND, negative=NEGATIVE), x, rtol=1e-12, atol=1e-12)
    assert sampler.num_calls == 12
    with pytest.raises(ValueError, match="no pair of experts"):
        TeacherSampler(guidance_low=2.0)


def test_calls_count_guidance_and_the_second_of_heun() -> None:
    assert TeacherSampler("heun", 8).num_calls == 15
    assert TeacherSampler("heun", 8, "karras", guidance=3.0).num_calls == 34
    assert StudentSampler((1.0, 0.5), RectifiedFlow()).num_calls == 2


@pytest.mark.parametrize("path", [EDM(), RectifiedFlow(), TrigFlow()], ids=str)
def test_states_are_those_at_the_students_times(path: EDM | RectifiedFlow | TrigFlow) -> None:
    """One step of the student from the state at its first time is one step from the noise itself."""
    at = student_times(2, path, 5.0)
    sampler = replace(TeacherSampler.for_path(path), num_steps=12)
    assert not list(sampler.problems_of(at, path))
    solved = sampler.trajectory(MIXTURE.on(path), NOISE, COND, at=at)
    scale = path.coefficients(torch.tensor(at[0], dtype=torch.float64))[1]
    torch.testing.assert_close(solved.states[:, 0], scale * NOISE)
    fine = replace(sampler, num_steps=400).trajectory(MIXTURE.on(path), NOISE, COND, at=at)
    torch.testing.assert_close(solved.states, fine.states, rtol=0.05, atol=0.05)


def test_times_of_another_path_are_refused_by_name() -> None:
    sampler = TeacherSampler.for_path(EDM())
    (problem,) = sampler.problems_of((1.0, 0.9375), EDM())
    assert "are flow times" in problem
    assert not list(sampler.problems_of((80.0, 0.5), EDM()))
    (problem,) = TeacherSampler().problems_of((80.0, 0.5), RectifiedFlow())
    assert "between 0 and 1" in problem


def test_students_and_teachers_are_called_alike_and_their_records_are_read_back_equal() -> None:
    student = StudentSampler((1.0, 0.5), RectifiedFlow(), "ode")
    for sampler in (student, replace(student, guidance=2.0), TeacherSampler("heun", 4, guidance=2.0)):
        assert sampler(MIXTURE, NOISE, COND, Rng(0, rows=range(4)), NEGATIVE).shape == NOISE.shape
        assert parse(type(sampler), dump(sampler)) == sampler


def test_a_students_first_time_is_where_its_teachers_grid_begins():
    flow, edm = RectifiedFlow(), EDM()
    karras = TeacherSampler("res_2ab", grid="karras")
    assert karras.student_times(2, flow, 5.0) == pytest.approx((80 / 81, 5 / 6), abs=1e-12)
    assert karras.student_times(2, edm, 5.0) == student_times(2, edm, 5.0)
    assert TeacherSampler().student_times(4, flow, 5.0) == student_times(4, flow, 5.0)


@pytest.mark.parametrize("path", [RectifiedFlow(), TrigFlow(), EDM()], ids=str)
def test_another_number_of_calls_takes_times_between_a_students_own(path: EDM | RectifiedFlow | TrigFlow) -> None:
    student = StudentSampler(student_times(4, path, 3.0), path, "same")
    own = torch.tensor(student.times)
    assert student.with_calls(4) == student and student.with_calls(1).times == student.times[:1]
    torch.testing.assert_close(torch.tensor(student.with_calls(2).times), own[::2])
    eight = torch.tensor(student.with_calls(8).times)
    torch.testing.assert_close(eight[::2], own)
    assert bool((eight[1:] < eight[:-1]).all()) and float(eight[-1]) > 0
    if isinstance(path, RectifiedFlow):
        torch.testing.assert_close(eight[-1], own[-1] / 2)  # in the middle, in flow time
    flow_map = StudentSampler(student_times(4, path, 3.0), path, "map", shift=3.0)
    assert flow_map.with_calls(8).times == student_times(8, path, 3.0)
