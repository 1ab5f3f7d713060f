"""The moving average against closed forms, counted in updates of the student."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.config import check
from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import DMD2, StudentSample
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.networks.weights.addresses import read
from fewstep.training import ema
from fewstep.training.ema import Ema, gamma_of
from fewstep.training.loop import train
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Run, Trainer


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_gamma_is_that_of_the_paper(width: float, gamma: float) -> None:
    """Karras et al. 2024, section 3.1: s_rel of 5 % and 10 % are gamma 16.97 and 6.94."""
    assert gamma_of(width) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.15, 0.25])
def test_gamma_gives_the_width_it_was_asked_for(width: float) -> None:
    """The profile's density is (g + 1) u^g on [0, 1]; its standard deviation is by definition the relative width."""
    g = gamma_of(width)
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


def weights_of(config: Ema, updates: int) -> np.ndarray:
    """What each of the values seen counts for in the average, the starting value first."""
    shares = np.eye(updates + 1)
    average = {"w": torch.tensor(shares[0])}
    for n in range(updates):
        ema.update(average, {"w": torch.tensor(shares[n + 1])}, config.beta_at(n))
    return average["w"].numpy()


def test_the_power_profile_is_the_power_function() -> None:
    """Weights proportional to t^gamma: eq. 2 of the paper in closed form, (t/T)^(g+1) - ((t-1)/T)^(g+1) for discrete t."""
    updates, g = 400, gamma_of(0.1)
    t = np.arange(1, updates + 1)
    want = (t / updates) ** (g + 1) - ((t - 1) / updates) ** (g + 1)
    got = weights_of(Ema("power", width=0.1), updates)
    assert got[0] == 0.0  # the start is forgotten at the first update
    np.testing.assert_allclose(got[1:], want, rtol=1e-9, atol=1e-15)
    mean = (t * got[1:]).sum()
    assert np.sqrt((t**2 * got[1:]).sum() - mean**2) / updates == pytest.approx(0.1, rel=0.01)


def test_the_constant_profile_is_a_geometric_series_once_it_has_warmed_up() -> None:
    config = Ema("constant", beta=0.9)
    got, updates = weights_of(config, 300), 300
    warm = next(n for n in range(updates) if (n + 1) / (n + 10) >= 0.9)
    want = 0.1 * 0.9 ** (updates - np.arange(warm + 1, updates + 1))
    np.testing.assert_allclose(got[warm + 1 :], want, rtol=1e-9)
    assert got.sum() == pytest.approx(1.0, abs=1e-12)
    # while it warms up: kept n / (n + 9) of what was there before update n, all of it known in closed form
    early = weights_of(config, 20)
    assert early[0] == pytest.approx(np.prod([n / (n + 9) for n in range(1, 21)]), rel=1e-9)


def test_it_is_counted_in_updates_of_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same average after 3 student turns, whether critic turns lie between or not."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    mixture = MixtureSpec(means=((1.0, 0.0),), stds=(0.3,))
    tiny = Full(TinySpec(width=8, depth=1), init="random")
    run = Run(
        job=Job(name="turns"),
        method=DMD2(student=StudentSample((1.0,)), student_update_freq=3),
        networks=Networks(mixture, tiny, tiny),
        data=MixtureSamples(mixture, num=64),
        optim=Optim(lr=1e-2),
        ema=Ema("power", width=0.1),
        trainer=Trainer(max_iter=7, batch_size=4, num_threads=1),
        checkpoint=Checkpoint(save_iter=1, keep_last=99),
    )
    assert train(run)["student_updates"] == 3
    students = [read(f"fewstep/default/turns@{step}:student") for step in (1, 4, 7)]
    g = gamma_of(0.1)
    for name, average in read("fewstep/default/turns@7:student.ema").items():
        want = sum(((k + 1) / 3) ** (g + 1) * s[name] - (k / 3) ** (g + 1) * s[name] for k, s in enumerate(students))
        torch.testing.assert_close(average, want, rtol=1e-5, atol=1e-7)
    between = [read(f"fewstep/default/turns@{step}:student.ema") for step in (4, 6)]
    assert all(torch.equal(between[0][name], between[1][name]) for name in between[0])


def test_an_average_that_cannot_be_is_refused() -> None:
    for bad, said in ((Ema(beta=1.0), "beta"), (Ema("power", width=0.3), "width")):
        with pytest.raises(ValueError, match=said):
            check(bad)
    check(replace(Ema(), beta=0.9999))
