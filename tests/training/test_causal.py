"""Causal students in training: the same gradients with recomputed blocks, flat memory, and runs that are opened and sampled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.batch import Batch, Condition
from fewstep.config import ConfigError, check
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng, StudentSampler
from fewstep.errors import UserError
from fewstep.export.export import export
from fewstep.inference.model import open_model
from fewstep.methods import DMD2, CausalConsistency, CausalFinetune, CausalKD, CausalSample, Gan, SelfForcing
from fewstep.methods.contract import Turn
from fewstep.networks.causal import CausalSpec
from fewstep.networks.causal_attention import Causality
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.networks.heads import QuerySpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.parallel import World
from fewstep.training.crew import assemble
from fewstep.training.health import Health
from fewstep.training.iteration import Part, gradients
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Job, Run, Trainer

WAN = WanSpec(
    num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, text_tokens=5, freq_dim=16, latent_channels=4,
    max_positions=64,
)  # fmt: skip
COSMOS = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2.0, text_dim=16, adaln_lora_dim=8,
    max_size=(32, 8, 8), padding_mask=False,
)  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"), None)
CAUSAL = Causality(chunk=2, span=6)
T_LIST = (1.0, 0.8, 0.5)
METHOD = SelfForcing(student=CausalSample(t_list=T_LIST), guidance=2.0)
ROLES: dict[str, Callable[..., Any]] = {"full": Full, "lora": lambda **more: Lora(rank=2, **more)}


def networks(spec: Any, role: str, **more: Any) -> Networks:
    return Networks(spec, student=ROLES[role](causal=CAUSAL), critic=ROLES[role](), **more)


def run(method: Any, nets: Networks, frames: int = 6, **trainer: Any) -> Run:
    times = method.t_list if isinstance(method, CausalKD) else ()
    data = Mock((4, frames, 4, 4), (5, 16), path_times=times)
    trainer = {"max_iter": 3, "batch_size": 2, "log_every": 1} | trainer
    return Run(method, nets, data, job=Job("causal", name="run"), trainer=Trainer(**trainer), checkpoint=Checkpoint(3))


def batch_of(frames: int = 6) -> Batch:
    return Mock((4, frames, 4, 4), (5, 16)).open().batch(torch.arange(2))


def gradient_of(case: Run, seed: int = 3) -> dict[str, Tensor]:
    nets = build(case.networks, case.method.roles, 0)
    with torch.no_grad():
        for net in nets.values():
            torch.manual_seed(1)
            for parameter in net.module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    crew = assemble(case, nets, ALONE)
    list(gradients(case, crew, Turn("student", ("student",)), [Part(batch_of(), Rng(seed, rows=range(2)), 1.0)]))
    return {n: p.grad for n, p in crew.networks["student"].module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", [WAN, COSMOS], ids=["wan", "cosmos"])
def test_recomputed_blocks_see_what_their_forward_saw(spec: Any, role: str) -> None:
    """By the time of the backward the cache holds later chunks, and the critic has spoken with the same weights."""
    case = run(METHOD, networks(spec, role))
    plain, recomputed = (gradient_of(replace(case, trainer=Trainer(checkpointing=on))) for on in (False, True))
    assert plain.keys() == recomputed.keys() and any(bool(g.abs().sum() > 0) for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("spec", [WAN, COSMOS], ids=["wan", "cosmos"])
def test_what_a_graph_holds_does_not_grow_with_the_chunks_before_it(spec: Any) -> None:
    student: Any = build(networks(spec, "full"), ("student",), 0)["student"]

    def held(frames: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no storage is used twice
            return tensor

        alive: list[Tensor] = []
        sample = CausalSample(t_list=T_LIST, exit_step="last", start_gradient_frame=frames - 2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            drawn = sample.draw(student, batch_of(frames), Rng(1, rows=range(2)), with_grad=True)
        assert drawn.requires_grad
        return sum(sizes.values()) - drawn.untyped_storage().nbytes()

    short, longer, longest = held(8), held(12), held(20)
    assert max(longer, longest) <= 1.02 * short, (short, longer, longest)


METHODS = {
    "self_forcing": METHOD,
    "causal_kd": CausalKD(t_list=T_LIST),
    "causal_finetune": CausalFinetune(num_sample_steps=4),
    "causal_consistency": CausalConsistency(T_LIST),
    "with_gan": replace(METHOD, gan=Gan(features="critic")),
}


@pytest.mark.parametrize(
    ("spec", "role", "name"),
    [
        (COSMOS, "lora", "self_forcing"),
        (WAN, "full", "causal_finetune"),
        pytest.param(COSMOS, "full", "causal_consistency", marks=pytest.mark.slow),
        pytest.param(WAN, "lora", "causal_consistency", marks=pytest.mark.slow),
        pytest.param(COSMOS, "full", "causal_kd", marks=pytest.mark.slow),
        pytest.param(WAN, "lora", "causal_kd", marks=pytest.mark.slow),
        pytest.param(WAN, "full", "self_forcing", marks=pytest.mark.slow),
        pytest.param(COSMOS, "full", "with_gan", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_opened_exported_and_generates_by_chunks_beyond_its_length(
    spec: Any, role: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    width = 24 if spec is WAN else 32
    head = QuerySpec(taps=(1,), channels=width) if name == "with_gan" else None
    nets = networks(spec, role, head=head)
    if name == "causal_consistency":
        nets = Networks(CausalSpec.over(spec, CAUSAL), student=ROLES[role]())
    train(run(METHODS[name], nets))
    model = open_model("causal/default/run@latest:student")
    assert isinstance(model.spec, CausalSpec) and model.spec.causality == CAUSAL and model.sampler.by_chunk is not None
    export("causal/default/run@latest:student", tmp_path / "out")
    again = open_model(tmp_path / "out")
    noise, cond = torch.randn(1, 4, 14, 4, 4), Condition(text=torch.randn(1, 5, 16))
    clips = [m.sampler(m.network, noise, cond, Rng(1, rows=[7])) for m in (model, again)]
    assert clips[0].shape == noise.shape and torch.equal(clips[0], clips[1])
    shorter = model.sampler(model.network, noise[:, :, :6], cond, Rng(1, rows=[7]))
    if isinstance(model.sampler, StudentSampler) and name != "causal_kd":
        assert torch.equal(shorter[:, :, :2], clips[0][:, :, :2])  # what comes later changes nothing
        stream = model.sampler.stream(model.network, noise, cond, Rng(1, rows=[7]))  # pyright: ignore[reportArgumentType]
        assert torch.equal(torch.cat(list(stream), 2), clips[0])


def test_a_span_that_no_clip_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"a causal span of 6 latent frames, but clips of 4 are trained on.*Set span=4"):
        train(run(METHOD, networks(WAN, "full"), frames=4))


def test_what_does_not_go_together_is_refused_before_anything_is_built() -> None:
    plain = Networks(WAN)
    for method, nets, key, text in (
        (METHOD, plain, "networks.student.causal", "must be set for method SelfForcing"),
        (METHOD, Networks(CausalSpec(WAN), student=Full()), "networks.teacher", "score_teacher=bidirectional"),
        (replace(METHOD, score_teacher="causal"), networks(WAN, "full"), "networks.teacher", "kind causal"),
        (METHOD, Networks(CausalSpec(WAN), student=Full(causal=CAUSAL)), "networks.student.causal", "causal already"),
        (METHOD, Networks(WAN, student=Full(causal=Causality(span=2))), "networks.student.causal.span", "that many at least"),
    ):
        with pytest.raises(ConfigError) as error:
            check(run(method, nets))
        assert key in str(error.value) and text in str(error.value), error.value
    for case, text in (
        (run(METHOD, networks(WAN, "full"), compile=True), "trainer.compile: does not go with causal networks"),
        (replace(run(DMD2(), Networks(WAN)), health=Health(long_frames=40)), "generate chunk after chunk"),
    ):
        with pytest.raises(ConfigError, match=text):
            check(case)
    check(run(replace(METHOD, score_teacher="causal"), Networks(CausalSpec(WAN, chunk=2, span=6))))
    for teacher in (WAN, CausalSpec(WAN, chunk=2, span=6)):
        case = run(CausalConsistency(), Networks(teacher, student=Full(causal=CAUSAL if teacher is WAN else None)))
        if teacher is WAN:
            with pytest.raises(ConfigError, match=r"networks.teacher: must be causal for method CausalConsistency"):
                check(case)
        else:
            check(case)
    assert "no effect on how the student generates" in str(check(run(DMD2(), networks(WAN, "full"))))
