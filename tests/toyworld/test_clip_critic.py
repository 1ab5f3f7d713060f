"""The critic of a tokenizer: what it reads, how steep it is, and that it learns to tell a blur."""

import pytest
import torch
from torch.nn import functional

from fewstep.toyworld.clip_critic import ClipCriticSpec
from fewstep.toyworld.perceptual import DIFFERENCES, in_time

SMALL = ClipCriticSpec((8, 8, 8, 8))


def test_it_reads_colours_and_what_changes_in_time() -> None:
    """Of a clip that is k^2 at frame k, the first difference is 2 k - 1 and the second 2; where there is none, 0."""
    frames = torch.arange(5.0) ** 2
    pixels = frames[None, None, :, None, None].expand(1, 3, 5, 2, 2)
    seen = in_time(pixels)[0, :, :, 0, 0]
    torch.testing.assert_close(seen[0], frames / 2)
    torch.testing.assert_close(seen[3], DIFFERENCES * torch.tensor([0, 1, 3, 5, 7.0]) / 2)
    torch.testing.assert_close(seen[6], DIFFERENCES * torch.tensor([0, 2, 2, 2, 0.0]) / 2)


def test_no_layer_is_steeper_than_one() -> None:
    """The matrix (out, in * k^3) of each layer has the largest singular value 1, once the power iteration has settled."""
    torch.manual_seed(0)
    critic = SMALL.build()
    for _ in range(200):  # each forward in training is one step of it
        critic.judge(torch.zeros(1, 3, 5, 8, 8))
    critic.module.eval()
    for conv in critic.module.convs:
        assert torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=1e-3)


def test_it_learns_to_tell_a_blur() -> None:
    torch.manual_seed(0)
    critic = SMALL.build()
    optimizer = torch.optim.Adam(critic.module.parameters(), lr=2e-3)
    kernel = torch.ones(3, 1, 1, 3, 3) / 9

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        real = (torch.rand(8, 3, 5, 16, 16) > 0.5).float() * 2 - 1
        return real, functional.conv3d(real, kernel, padding=(0, 1, 1), groups=3)

    for _ in range(60):
        real, blurred = map(critic.judge, pair())
        optimizer.zero_grad()
        (functional.relu(1 - real).mean() + functional.relu(1 + blurred).mean()).backward()
        optimizer.step()
    real, blurred = map(critic.judge, pair())
    assert real.mean((1, 2, 3, 4)).min() > blurred.mean((1, 2, 3, 4)).max() + 0.5
    assert real.shape == (8, 1, 2, 4, 4)
