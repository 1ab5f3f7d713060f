"""Data that do not fit a network are refused in its own words, not by torch's shapes."""

import pytest
import torch

from fewstep.batch import Condition
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.network import WanSpec

COSMOS = {"latent_channels": 4, "num_heads": 2, "head_dim": 12, "num_layers": 1, "text_dim": 8, "adaln_lora_dim": 4}


@pytest.mark.parametrize(
    ("shape", "text", "said"),
    [
        ((16, 5, 4, 4), 8, "works on latents of 4 channels, but was given 16"),
        ((4, 5, 3, 4), 8, r"reads patches of \(1, 2, 2\) latents, which do not divide \(5, 3, 4\) .* another --height"),
        ((4, 9, 4, 4), 8, r"has positions for latents of \(8, 8, 8\) .* at most, but was given \(9, 4, 4\)"),
        ((4, 5, 4, 4), 6, "reads text embeddings of 8 numbers a token, but was given 6"),
    ],
)
def test_cosmos(shape: tuple[int, ...], text: int, said: str) -> None:
    spec = CosmosSpec(**COSMOS, max_size=(8, 8, 8), learnable_positions=True)  # type: ignore[arg-type]
    network = spec.build()
    cond = Condition(text=torch.zeros(1, 3, text))
    assert network(torch.zeros(1, 4, 8, 8, 8), torch.tensor([0.5]), Condition(text=torch.zeros(1, 3, 8))).x0.isfinite().all()
    with pytest.raises(ValueError, match=said):
        network(torch.zeros(1, *shape), torch.tensor([0.5]), cond)


def test_cosmos_without_a_table_has_as_many_positions_as_its_longest_axis() -> None:
    network = CosmosSpec(**COSMOS, max_size=(4, 8, 8)).build()  # type: ignore[arg-type]
    cond = Condition(text=torch.zeros(1, 3, 8))
    assert network(torch.zeros(1, 4, 4, 8, 8), torch.tensor([0.5]), cond).x0.isfinite().all()
    with pytest.raises(ValueError, match=r"has positions for latents of \(4, 8, 8\)"):
        network(torch.zeros(1, 4, 5, 8, 8), torch.tensor([0.5]), cond)


def test_wan() -> None:
    network = WanSpec(latent_channels=4, num_heads=2, head_dim=12, num_layers=1, ffn_dim=16, text_dim=8).build()
    for shape, text, said in (
        ((4, 3, 4, 4), 6, "reads text embeddings of 8 numbers a token, but was given 6"),
        ((4, 3, 3, 4), 8, r"reads patches of \(1, 2, 2\) latents, which do not divide \(3, 3, 4\) .* another --height"),
        ((16, 3, 4, 4), 8, "works on latents of 4 channels, but was given 16"),
    ):
        with pytest.raises(ValueError, match=said):
            network(torch.zeros(1, *shape), torch.tensor([0.5]), Condition(text=torch.zeros(1, 3, text)))
