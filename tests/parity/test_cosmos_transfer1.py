"""Cosmos-Transfer1 against the network as it is published, written out here over the original names of its weights.

Nothing below calls diffusers: it is the second derivation that our branch, which no library has, is held against. The key
tables stand between the two, so that a weight under a wrong name would show as well.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fewstep.batch import Condition
from fewstep.diffusion import guided, samplers
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.keys import match, original_names
from fewstep.networks.families.cosmos.network import Cosmos
from fewstep.networks.weights.addresses import load_into

HEADS, DIM, LAYERS, CONTROLLED, ROPE = 2, 12, 4, 3, (2.0, 1.5, 1.0)
SMALL = CosmosControlSpec(
    family="edm", sigma_data=0.5, use_fps=True, clean_time=None, learnable_positions=True, rope_scale=ROPE,
    latent_channels=4, num_heads=HEADS, head_dim=DIM, num_layers=LAYERS, mlp_ratio=2, text_dim=32, adaln_lora_dim=4,
    max_size=(8, 32, 32), style="transfer1", num_control_blocks=CONTROLLED, hint_channels=8,
)  # fmt: skip
SHAPE = (2, 4, 3, 8, 8)
Weights = Mapping[str, Tensor]


def under(weights: Weights, start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def patches(x: Tensor) -> Tensor:
    """B C T H W -> B T h w (C 1 2 2), channels outermost."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(b, t, h // 2, w // 2, c * 4)


def rotary(grid: tuple[int, int, int], fps: float) -> Tensor:
    """The angle of every token and channel: T h w DIM, each half of the channels having all of them."""
    dim_h = dim_w = DIM // 6 * 2
    dims = (DIM - dim_h - dim_w, dim_h, dim_w)
    angles: list[Tensor] = []
    for axis, (size, dim, ratio) in enumerate(zip(grid, dims, ROPE)):
        theta = 10000.0 * ratio ** (dim / (dim - 2))
        place = torch.arange(size).float() / (fps / 24 if axis == 0 else 1)
        angle = place[:, None] / theta ** (torch.arange(0, dim, 2) / dim)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.reshape(shape).expand(*grid, dim // 2))
    return torch.cat(angles * 2, -1)


def attention(w: Weights, x: Tensor, context: Tensor, angles: Tensor | None) -> Tensor:
    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (HEADS, DIM))  # B S heads DIM

    q = rms(heads(linear(w, "to_q.0", x)), w["to_q.1.weight"])
    k = rms(heads(linear(w, "to_k.0", context)), w["to_k.1.weight"])
    v = heads(linear(w, "to_v.0", context))
    if angles is not None:
        angles = angles.flatten(0, 2)[:, None]

        def turn(y: Tensor) -> Tensor:
            first, second = y.chunk(2, -1)
            return y * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

        q, k = turn(q), turn(k)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM)
    return linear(w, "to_out.0", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))


class Embedded:
    """What a transformer, the base or the branch, makes of its inputs before its blocks."""

    def __init__(self, w: Weights, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, fps: float):
        self.w, self.text = w, text
        padding = torch.zeros_like(mask)
        tokens = patches(torch.cat([x, mask, padding], 1))
        self.grid = tuple(tokens.shape[1:4])
        self.x = linear(w, "x_embedder.proj.1", tokens).flatten(1, 3)
        self.angles = rotary(self.grid, fps)  # type: ignore[arg-type]
        t, h, v = self.grid
        place = under(w, "extra_pos_embedder.pos_emb_")
        where = place["t"][:t, None, None] + place["h"][None, :h, None] + place["w"][None, None, :v]
        size = where.norm(dim=-1, keepdim=True)
        self.places = (where / (1e-6 + size * math.sqrt(1 / where.shape[-1]))).flatten(0, 2)
        half = HEADS * DIM // 2
        time = time[:, None] if time.ndim == 1 else time.repeat_interleave(h * v, 1)  # of every token
        angle = time[..., None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        waves = torch.cat([angle.cos(), angle.sin()], -1)
        self.bias = linear(w, "t_embedder.1.linear_2", functional.silu(linear(w, "t_embedder.1.linear_1", waves)))
        self.time = rms(waves, w["affline_norm.weight"])

    def modulated(self, w: Weights, x: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """(the normalised x, scaled and shifted; the gate)"""
        made = linear(w, "2", linear(w, "1", functional.silu(self.time))) + self.bias[..., : parts * x.shape[-1]]
        shift, scale, *gate = made.chunk(parts, -1)
        x = functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return x, gate[0] if gate else x

    def block(self, number: int, x: Tensor) -> Tensor:
        w = under(self.w, f"blocks.block{number}.blocks.")
        x = x + self.places
        y, gate = self.modulated(under(w, "0.adaLN_modulation."), x, 3)
        x = x + gate * attention(under(w, "0.block.attn."), y, y, self.angles)
        y, gate = self.modulated(under(w, "1.adaLN_modulation."), x, 3)
        x = x + gate * attention(under(w, "1.block.attn."), y, self.text, None)
        y, gate = self.modulated(under(w, "2.adaLN_modulation."), x, 3)
        return x + gate * linear(w, "2.block.layer2", functional.gelu(linear(w, "2.block.layer1", y)))


def published(w: Weights, controls: Mapping[str, Weights], weights: Mapping[str, float], **inputs: Any) -> Tensor:
    """The raw output of base and branches; inputs: x, time, text, mask, fps, hints."""
    hints = inputs.pop("hints")
    said: dict[int, Tensor] = {}
    for name, branch in controls.items():
        inside = Embedded(branch, **inputs)
        hint = torch.cat([hints[name], torch.zeros(2, 8 + 1 - hints[name].shape[1], *hints[name].shape[2:])], 1)
        guide = linear(branch, "x_embedder2.proj.1", patches(hint)).flatten(1, 3)
        for layer in range(0, 14, 2):
            guide = functional.silu(linear(branch, f"input_hint_block.{layer}", guide))
        guide = linear(branch, "input_hint_block.14", guide)
        x = inside.x
        for i in range(CONTROLLED):
            x = inside.block(i, x)
            x = x + guide if i == 0 else x
            said[i] = said.get(i, torch.zeros(())) + weights[name] * linear(branch, f"zero_blocks.block{i}", x)
    base = Embedded(w, **inputs)
    x = base.x
    for i in range(LAYERS):
        x = base.block(i, x) + said.get(i, torch.zeros(()))
    x, _ = base.modulated(under(w, "final_layer.adaLN_modulation."), x, 2)
    x = linear(w, "final_layer.linear", x).unflatten(1, base.grid).unflatten(-1, (2, 2, 1, 4))  # .. p1 p2 t C
    return x.permute(0, 7, 1, 6, 2, 4, 3, 5).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def network(*controls: str, weights: tuple[float, ...] | None = None) -> Cosmos:
    torch.manual_seed(0)
    made = replace(SMALL, controls=controls, weights=weights).build()
    for parameter in made.module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        elif parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def originals(net: Cosmos, control: str) -> dict[str, Tensor]:
    """The weights under their original names, as base_model.pt and edge_control.pt together hold them."""
    own = {name: value for name, value in net.module.state_dict(keep_vars=True).items() if _is_of(name, control)}
    names = original_names(own, "1")
    return {names[name]: value for name, value in own.items()}


def _is_of(name: str, control: str) -> bool:
    return name.startswith(("base.", f"branches.{control}."))


def x0_by_hand(net: Cosmos, x: Tensor, sigma: Tensor, cond: Condition, weights: Mapping[str, float]) -> Tensor:
    """`published` under Karras' preconditioning; given frames enter clean, at the spread of 1."""
    named = {control: originals(net, control) for control in weights}
    s = (sigma if sigma.ndim == 2 else sigma[:, None]).float()[:, None, :, None, None]
    total, channel = (s**2 + 0.25).sqrt(), torch.zeros(x.shape[0], 1, 3, 8, 8)
    shown = x / total
    if cond.frame_mask is not None and cond.frames is not None:
        channel = cond.frame_mask[:, None, :, None, None].expand(-1, 1, -1, 8, 8)
        shown = torch.where(channel.bool(), cond.frames / 0.5, shown)
    raw = published(
        under(named[next(iter(weights))], "base_model.net."),
        {control: under(named[control], "net.") for control in weights},
        weights,
        x=shown,
        time=(sigma.clamp(min=1e-5).log() / 4).float(),
        text=cond.text,
        mask=channel,
        fps=12.0,
        hints=cond.control,
    )
    return 0.25 / total**2 * x + s * 0.5 / total * raw


def same_gradients(net: Cosmos, ours: Tensor, theirs: Tensor) -> None:
    parameters = list(net.module.parameters())
    first = torch.autograd.grad(ours.square().sum(), parameters)
    second = torch.autograd.grad(theirs.square().sum(), parameters)
    for (name, _), a, b in zip(net.module.named_parameters(), first, second, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-6, name


FPS = torch.tensor([12.0, 12.0])


@pytest.mark.parametrize(
    ("controls", "weights"), [(("edge",), None), (("seg",), (0.5,)), (("depth", "vis"), (1.0, 3.0))], ids=str
)
def test_it_is_the_published_network_with_equal_gradients(controls: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    net = network(*controls, weights=weights)
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    frames, hints = draw(*SHAPE, seed=3), {name: draw(*SHAPE, seed=5 + i) for i, name in enumerate(controls)}
    sigma = torch.tensor([5.0, 0.4], dtype=torch.float64)
    x = draw(*SHAPE) * (sigma**2 + 0.25).sqrt().float().reshape(-1, 1, 1, 1, 1)
    cond = Condition(text=draw(2, 7, 32, seed=2), frames=frames, frame_mask=mask, control=hints, fps=FPS)
    answer = net(x, sigma, cond)
    counted = dict(zip(controls, {None: (1.0,), (0.5,): (0.5,), (1.0, 3.0): (0.25, 0.75)}[weights]))
    wanted = x0_by_hand(net, x, sigma, cond, counted)
    free = mask[:, None, :, None, None] == 0
    torch.testing.assert_close(answer.x0 * free, wanted * free, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(answer.x0[0, :, 0], frames[0, :, 0], rtol=0, atol=1e-5)
    same_gradients(net, answer.x0 * free, wanted * free)


def test_every_frame_may_carry_its_own_time_to_both_ends() -> None:
    net = network("edge")
    sigma = torch.tensor([[0.0, 0.4, 80.0], [80.0, 5.0, 0.0]], dtype=torch.float64)
    x = draw(*SHAPE) * (sigma**2 + 0.25).sqrt().float()[:, None, :, None, None]
    cond = Condition(text=draw(2, 7, 32, seed=2), control={"edge": draw(*SHAPE, seed=5)}, fps=FPS)
    answer, wanted = net(x, sigma, cond), x0_by_hand(net, x, sigma, cond, {"edge": 1.0})
    torch.testing.assert_close(answer.x0, wanted, rtol=0, atol=1e-6 * float(x.abs().max()))
    torch.testing.assert_close(answer.x0[0, :, 0], x[0, :, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(answer.x0[1, :, 2], x[1, :, 2], rtol=0, atol=1e-5)
    same_gradients(net, answer.x0, wanted)


def test_sampling_is_the_published_network_in_the_loop_of_predict1s_pipeline() -> None:
    """No library has a pipeline for it; the loop is diffusers' CosmosTextToWorldPipeline, its scheduler their own."""
    from diffusers import EDMEulerScheduler

    net, weights = network("edge"), {"edge": 1.0}
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(5)
    hints = {"edge": draw(*SHAPE, seed=5)}
    cond = Condition(text=draw(2, 7, 32, seed=2), control=hints, fps=FPS)
    negative = replace(cond, text=draw(2, 7, 32, seed=3))
    x = start = 80 * draw(*SHAPE)
    with torch.no_grad():
        for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
            level = sigma.double().expand(2)
            with_text, without = (x0_by_hand(net, x, level, words, weights) for words in (cond, negative))
            x0 = with_text + 3.0 * (with_text - without)
            x = scheduler.step(x0, t, x, return_dict=False, pred_original_sample=x0)[0]
        states: list[Tensor] = []
        grid = scheduler.sigmas[:-1].double()
        samplers.euler(guided(net, negative, 4.0), start, grid, cond, on_state=lambda t, x: states.append(x))
    assert (x - start).abs().max() > 1
    torch.testing.assert_close(states[-1], x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrap", ["released", "distilled"])
def test_the_original_file_comes_in_whole_with_its_unused_parts_told(wrap: str) -> None:
    net = network("edge")
    file = {name: value.detach().clone() for name, value in originals(net, "edge").items()}
    rename: Callable[[str], str] = lambda name: (  # noqa: E731
        name
        if wrap == "released"
        else f"net.{name}"
        if name.startswith("base_model.")
        else name.replace("net.", "net.net_ctrl.", 1)
    )
    file = {rename(name): value for name, value in file.items()}
    branch = "net." if wrap == "released" else "net.net_ctrl."
    extra = (
        "logvar.0.freqs",
        "base_model.logvar.1.weight",
        "base_model.net.pos_embedder.seq",
        f"{branch}final_layer.linear.weight",
    )
    file |= {name: torch.zeros(1) for name in extra}
    found = match(file, ("edge",))
    assert found.generation == "1" and set(found.unused) == set(extra) and not found.unknown
    other = network("edge")
    for parameter in other.module.parameters():
        parameter.data.zero_()
    assert load_into(other.module, {ours: file[theirs] for ours, theirs in found.sources.items()}, "file") == len(file) - 4
    for name, value in net.module.state_dict().items():
        assert torch.equal(other.module.state_dict()[name], value), name
