"""Adapters inside original files: added into the weights exactly, and never dropped in silence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.batch import Condition
from fewstep.cli import main
from fewstep.networks.families.cosmos.keys import original_names
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.weights.addresses import load_into, read

SPEC = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=8, adaln_lora_dim=4, max_size=(4, 8, 8),
    family="edm", sigma_data=0.5, learnable_positions=True, clean_time=None,
)  # fmt: skip


def network() -> Any:
    torch.manual_seed(0)
    made = SPEC.build()
    for parameter in made.module.parameters():
        if parameter.abs().sum() == 0:
            nn.init.normal_(parameter)
    return made


def answer(net: Any) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 4, 2, 8, 8, generator=draw), torch.randn(1, 3, 8, generator=draw)
    return net(x, torch.tensor([0.7], dtype=torch.float64), Condition(text=text)).x0


def test_predict1s_adapters_are_added_into_the_layers_beside_which_they_lie(tmp_path: Path) -> None:
    """Held against the layers as Predict1 runs them: to_q(x) + scale to_q_lora(x)."""
    net = network()
    state = net.module.state_dict()
    file = {theirs: state[ours].clone() for ours, theirs in original_names(state, "1").items()}
    torch.manual_seed(3)
    handles: list[Any] = []
    for i, block in enumerate(net.module.transformer_blocks):
        for k, attention in enumerate((block.attn1, block.attn2)):
            for which in ("to_q", "to_v"):
                layer = getattr(attention, which)
                down, up = nn.Linear(layer.in_features, 3, bias=False), nn.Linear(3, layer.out_features, bias=False)
                at = f"net.blocks.block{i}.blocks.{k}.block.attn.{which}_lora.net"
                file |= {f"{at}.0.weight": down.weight.data, f"{at}.1.weight": up.weight.data}
                add = lambda module, inputs, output, down=down, up=up: output + 0.6 * up(down(inputs[0]))  # noqa: E731
                handles.append(layer.register_forward_hook(add))
    with torch.no_grad():
        wanted = answer(net)
    for handle in handles:
        handle.remove()
    torch.save({"model": file, "ema": None}, tmp_path / "iter_000005000_model.pt")

    with pytest.raises(ValueError, match=r"holds 8 adapters \(LoRA\) beside its weights.*--lora-scale 1"):
        read(str(tmp_path / "iter_000005000_model.pt"), net.module)
    out = tmp_path / "merged.pt"
    assert main(["convert", str(tmp_path / "iter_000005000_model.pt"), str(out), "--lora-scale", "0.6"]) == 0
    assert load_into(net.module, read(str(out), net.module), "merged") == len(state)
    with torch.no_grad():
        torch.testing.assert_close(answer(net), wanted, rtol=1e-5, atol=1e-5)
    untouched = "transformer_blocks.0.attn1.to_k.weight"
    assert torch.equal(net.module.state_dict()[untouched], state[untouched])


def test_pefts_adapters_on_the_real_class(tmp_path: Path) -> None:
    from peft import LoraConfig

    net = network()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    net.module.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        wanted = answer(net)
    torch.save(net.module.state_dict(), tmp_path / "tuned.pt")
    plain = network()
    assert main(["convert", str(tmp_path / "tuned.pt"), str(tmp_path / "merged.safetensors"), "--lora-scale", "2"]) == 0
    load_into(plain.module, read(str(tmp_path / "merged.safetensors"), plain.module), "merged")
    with torch.no_grad():
        torch.testing.assert_close(answer(plain), wanted, rtol=1e-5, atol=1e-5)


def test_half_an_adapter_is_refused(tmp_path: Path) -> None:
    net = network()
    file = dict(net.module.state_dict()) | {"transformer_blocks.0.attn1.to_q.lora_A.default.weight": torch.zeros(2, 32)}
    torch.save(file, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="lacks its other half"):
        read(str(tmp_path / "half.pt"))


def test_adapters_alone_are_left_to_whom_they_belong(tmp_path: Path) -> None:
    file = {"x.lora_A.weight": torch.zeros(2, 3), "x.lora_B.weight": torch.zeros(3, 2)}
    torch.save(file, tmp_path / "alone.pt")
    assert read(str(tmp_path / "alone.pt")).keys() == file.keys()
