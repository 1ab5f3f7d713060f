"""Reductions under their names, masks, the sum of named terms; and that methods are composed and read all their settings."""

import ast
import inspect
from dataclasses import fields, is_dataclass

import pytest
import torch

from fewstep.batch import Condition
from fewstep.config import choices
from fewstep.methods import Critic, Gan, Nets, Normalizer, Regression, StudentSample, Terms
from fewstep.methods.contract import free_mask, reduced

F64 = torch.float64


def video(rows=3):
    return torch.rand(rows, 2, 4, 3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))


def test_reductions_without_a_mask():
    """cosmos.md 0.5: Predict2.5 mean, Transfer1 half the mean, rCM the sum over a sample."""
    error = video()
    torch.testing.assert_close(reduced(error, None, "mean"), error.mean())
    torch.testing.assert_close(reduced(error, None, "half_mean"), 0.5 * error.mean())
    torch.testing.assert_close(reduced(error, None, "sum"), error.sum() / 3)


def test_conditioning_frames_neither_add_nor_count():
    error = video()
    cond = Condition(frame_mask=torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]))
    mask = free_mask(cond, error)
    means = torch.stack([error[0, :, 1:].mean(), error[1].mean(), error[2, :, 3:].mean()])
    sums = torch.stack([error[0, :, 1:].sum(), error[1].sum(), error[2, :, 3:].sum()])
    torch.testing.assert_close(reduced(error, mask, "mean"), means.mean())
    torch.testing.assert_close(reduced(error, mask, "half_mean"), means.mean() / 2)
    torch.testing.assert_close(reduced(error, mask, "sum"), sums.mean())
    worse = error.clone()
    worse[0, :, 0], worse[2, :, :3] = 1e6, 1e6
    for reduction in ("mean", "half_mean", "sum"):
        assert torch.equal(reduced(worse, mask, reduction), reduced(error, mask, reduction))
    assert free_mask(Condition(), error) is None


def test_a_sample_without_free_frames_counts_as_nothing():
    error = video().requires_grad_()
    mask = free_mask(Condition(frame_mask=torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4])), error)
    loss = reduced(error, mask, "mean")
    torch.testing.assert_close(loss, (error[1].mean() + error[2].mean()) / 3)
    (gradient,) = torch.autograd.grad(loss, error)
    assert not gradient[0].any() and bool(torch.isfinite(gradient).all())


def test_a_mask_of_bools_or_half_precision_is_the_same_mask():
    error = video()
    mask = torch.tensor([[True, False, False, True]] * 3)
    want = reduced(error, free_mask(Condition(frame_mask=mask.double()), error), "mean")
    for dtype in (torch.bool, torch.bfloat16, torch.int64):
        assert torch.equal(reduced(error, free_mask(Condition(frame_mask=mask.to(dtype)), error), "mean"), want)


def test_total_is_the_weighted_sum():
    terms = Terms.of(vsd=torch.tensor(3.0), gan=(torch.tensor(5.0), 0.1), watch={"norm": torch.tensor(9.0)})
    assert float(terms.total) == pytest.approx(3.5)
    assert dict(terms.weights) == {"vsd": 1.0, "gan": 0.1} and set(terms.values) == {"vsd", "gan"}


def test_a_role_that_is_not_there_is_named():
    nets = Nets({"student": object()})  # pyright: ignore[reportArgumentType]  # nothing is called
    assert nets.student is nets.roles["student"]
    with pytest.raises(AttributeError, match="no role 'critic'"):
        _ = nets.critic


OURS = [cls for cls in choices("method").values() if cls.__module__.startswith("fewstep.")]


@pytest.mark.parametrize("cls", OURS, ids=[cls.kind for cls in OURS])
def test_no_method_derives_from_another(cls):
    assert [base for base in cls.__mro__ if is_dataclass(base)] == [cls]


RECORDS = [*OURS, Critic, Gan, Normalizer, Regression, StudentSample, *choices("sample_weight").values()]


@pytest.mark.parametrize("cls", RECORDS, ids=[cls.__name__ for cls in RECORDS])
def test_every_setting_is_read_by_its_own_class(cls):
    """A setting without effect does not exist."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}  # getattr(self, name)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "alike"]
    copied = [getattr(inspect.getmodule(cls), call.args[0].id) for call in calls]  # into a record that reads them itself
    handed = {field.name for other in copied for field in fields(other)}
    assert {field.name for field in fields(cls)} <= read | named | handed
