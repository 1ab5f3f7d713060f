"""What the Cosmos adapter tells of padded pictures, against the upstream class called by hand with that mask."""

import pytest
import torch

from fewstep.batch import Condition
from fewstep.data.files.sizes import fit
from fewstep.networks.families.cosmos.network import CosmosSpec

SPEC = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=32, adaln_lora_dim=4, max_size=(8, 32, 32)
)


def test_the_mask_of_a_padded_clip_reaches_the_network() -> None:
    torch.manual_seed(0)
    net = SPEC.build()
    x, text = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 7, 32)
    t = torch.tensor([0.7, 0.3], dtype=torch.float64)
    padding = torch.from_numpy(fit((32, 64), (64, 64), "pad").padding())[None].expand(2, -1, -1)  # a quarter above and below
    wanted = torch.zeros(1, 1, 8, 8)
    wanted[..., :2, :] = wanted[..., 6:, :] = 1
    time = t.float()[:, None].expand(2, 3)[:, None, :, None, None]
    given = {"condition_mask": torch.zeros(2, 1, 3, 8, 8), "return_dict": False}
    answer = net(x, t, Condition(text=text, padding=padding)).velocity
    upstream = net.module(x, time, text, padding_mask=wanted, **given)[0]
    torch.testing.assert_close(answer, upstream, rtol=0, atol=1e-6)
    without = net(x, t, Condition(text=text)).velocity
    assert (without - answer).abs().max() > 1e-3
    torch.testing.assert_close(net(x, t, Condition(text=text, padding=padding & False)).velocity, without, rtol=0, atol=0)
    mixed = padding.clone()
    mixed[1] = False
    with pytest.raises(ValueError, match="one mask at a time"):
        net(x, t, Condition(text=text, padding=mixed))
