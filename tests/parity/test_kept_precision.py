"""In bf16, what a class of diffusers keeps in fp32 stays so: the bits of upstream's from_pretrained(torch_dtype=bfloat16)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.parallel import World, kept_in_fp32, place
from fewstep.training.optim import Optim
from fewstep.training.role import TrainedRole

ALONE = World(0, 1, torch.device("cpu"), None)
BF16 = torch.bfloat16


def wan(folder: Path) -> Any:
    """A tiny WanTransformer3DModel in `folder`, as upstream opens it in bf16; its norms and tables are no round numbers."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    made = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, rope_max_seq_len=32, cross_attn_norm=True,
    )  # fmt: skip
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.3, 0.2)
    made.save_pretrained(str(folder))
    return WanTransformer3DModel.from_pretrained(str(folder), torch_dtype=BF16)


def answer(module: Any) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 2, 4, 4, generator=draw), torch.randn(1, 5, 16, generator=draw)
    asked = {"hidden_states": x.to(BF16), "timestep": torch.tensor([713.0]), "encoder_hidden_states": text.to(BF16)}
    with torch.no_grad():
        return module(**asked, return_dict=False)[0]


@pytest.mark.parametrize("is_trained", [False, True])
def test_wan_in_bf16_is_upstreams(is_trained: bool, tmp_path: Path) -> None:
    theirs = wan(tmp_path)
    ours = WanSpec(pretrained=str(tmp_path)).build()
    place(ours.module, ours.blocks, ALONE, mode="ddp", compute=BF16, trained=is_trained)
    if is_trained:  # the rounded copy that the loop computes with
        role = TrainedRole("student", ours, Optim(), None, BF16)
        role.loaded()
        assert all(weight.dtype == torch.float32 for weight in role.weights.values())
    dtypes = {name: parameter.dtype for name, parameter in ours.module.named_parameters()}
    assert dtypes == {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert set(dtypes.values()) == {torch.float32, BF16}
    assert torch.equal(answer(ours.module), answer(theirs))
    rounded = answer(theirs.to(BF16))  # and the difference is one
    assert not torch.equal(rounded, answer(ours.module))


def test_what_is_kept_is_what_the_class_lists() -> None:
    small: dict[str, Any] = {"latent_channels": 2, "num_heads": 2, "head_dim": 12, "num_layers": 1, "mlp_ratio": 2}
    small |= {"text_dim": 8, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "learnable_positions": True}
    kept = {f"learnable_pos_embed.pos_emb_{axis}" for axis in "thw"}
    assert kept_in_fp32(CosmosSpec(**small).build().module) == kept
    led = CosmosControlSpec(**small, style="transfer1", num_control_blocks=1, hint_channels=2).build().module
    assert kept_in_fp32(led) == {f"{part}.{name}" for part in ("base", "branches.edge") for name in kept}
    assert kept_in_fp32(nn.Linear(2, 2)) == set()
