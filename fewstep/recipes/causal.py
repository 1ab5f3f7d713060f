"""Recipes of causal students, which stream: of any teacher, and FastGen's stages for Cosmos-Predict2 and Wan 2.1.

    fewstep pairs TEACHER --prompts prompts.txt --out PAIRS --path-times 4 ..                             states of the ODE
    fewstep train experiment=causal_kd teacher=TEACHER data.dataset_dir=PAIRS                             CausalKD
    fewstep train experiment=self_forcing teacher=TEACHER data.dataset_dir=DIR networks.student.init=RUN  Self-Forcing
    fewstep train experiment=causal_finetune teacher=TEACHER data.dataset_dir=DIR                         teacher forcing
    fewstep train experiment=causal_consistency teacher=RUN data.dataset_dir=DIR           without pairs, from the run of that

    CosmosPredict2_kd_causal, CosmosPredict2_sf       FastGen's CosmosPredict2/config_kd_causal.py, config_sf.py
    WanT2V_kd_causal, WanT2V_sf                       the same for WanT2V (config_kd_path.py made causal, config_sf.py)

`span` is the number of latent frames of the clips that are trained on. NAME_toy is the same method on a tiny random network of
the same class and random data; toy_kd_causal and toy_sf are the stages of the toy world (fewstep/toyworld/causal.py).
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.config import alike, recipe
from fewstep.data.folder.dataset import Folder
from fewstep.data.mock import Mock
from fewstep.inference.teacher import teacher_at
from fewstep.methods import (
    DMD2,
    KD,
    CausalConsistency,
    CausalFinetune,
    CausalKD,
    CausalSample,
    Critic,
    Gan,
    Grid,
    SelfForcing,
)  # fmt: skip
from fewstep.networks.causal_attention import Causality
from fewstep.networks.contract import NetworkSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT2_5_2B
from fewstep.networks.families.wan.network import T2V_1_3B, WanSpec
from fewstep.networks.heads import MultiscaleSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks
from fewstep.recipes import general
from fewstep.recipes.watched import watched
from fewstep.training.ema import Ema
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

TINY_COSMOS = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2.0, text_dim=16, adaln_lora_dim=8, max_size=(8, 8, 8),
)  # fmt: skip
TINY_WAN = WanSpec(
    latent_channels=4, num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, text_tokens=8, freq_dim=16,
    max_positions=32,
)  # fmt: skip
T_LIST = (0.999, 0.937, 0.833, 0.624)  # FastGen: 1, .75, .5, .25 shifted by 5


# ---- of any teacher --------------------------------------------------------------------------------------------------


@recipe("causal_kd")
def causal_kd(
    teacher: str = "", steps: int = 4, shift: float | None = None, chunk: int = 3, span: int = 21, sink: int = 0, rank: int = 0
) -> Run:
    """CausalKD of any teacher into a streaming student of `steps` steps, on states of its ODE (`fewstep pairs`)."""
    run = general.kd(teacher, steps, shift, rank=rank)
    kd, data = run.method, run.data
    assert isinstance(kd, KD) and kd.t_list is not None and isinstance(data, Folder)
    run = replace(run, method=CausalKD(t_list=kd.t_list), data=replace(data, pairs=("path",)))
    return _causal(run, f"causal_kd_{steps}step", Causality(chunk, span, sink))


@recipe("self_forcing")
def self_forcing(
    teacher: str = "",
    steps: int = 4,
    shift: float | None = None,
    guidance: float | None = None,
    chunk: int = 3,
    span: int = 21,
    sink: int = 0,
    rank: int = 0,
) -> Run:
    """Self-Forcing of any teacher into a streaming student; networks.student.init=RUN begins with one of causal_kd."""
    run = general.dmd2(teacher, steps, shift, guidance, rank=rank)
    dmd2 = run.method
    assert isinstance(dmd2, DMD2)
    sample = CausalSample(t_list=dmd2.student.t_list, critic_exit="last")
    run = replace(run, method=alike(SelfForcing, dmd2, student=sample))
    return _causal(run, f"self_forcing_{steps}step", Causality(chunk, span, sink))


@recipe("causal_finetune")
def causal_finetune(teacher: str = "", chunk: int = 3, span: int = 21, sink: int = 0, rank: int = 0) -> Run:
    """A many-step causal model from any teacher, by teacher forcing on clips: what consistency and causal scores start from."""
    run = general.lora(teacher, rank) if rank else general.finetune(teacher)
    method = alike(CausalFinetune, run.method)
    return _causal(replace(run, method=method), "causal_finetune", Causality(chunk, span, sink))


@recipe("causal_consistency")
def causal_consistency(
    teacher: str = "", steps: int = 4, shift: float | None = None, guidance: float | None = None, rank: int = 0
) -> Run:
    """Consistency distillation of a causal teacher (a run of causal_finetune) into a streaming student, without pairs."""
    run = general.dmd2(teacher, steps, shift, guidance)
    dmd2, spec = run.method, run.networks.teacher
    assert isinstance(dmd2, DMD2) and spec is not None
    grid = Grid(shift=spec.distillation.shift if shift is None else shift)
    method = CausalConsistency(dmd2.student.t_list, grid, dmd2.guidance)
    student = Lora(rank=rank) if rank else Full()
    return replace(
        run,
        job=replace(run.job, name=f"causal_consistency_{steps}step"),
        method=method,
        networks=replace(run.networks, student=student),
        optim=replace(run.optim, betas=(0.9, 0.99)),
        critic_optim=None,
        ema=Ema(beta=0.99),  # of the target, too. Causal-Forcing
    )


def _causal(run: Run, name: str, causality: Causality) -> Run:
    """The run under another name, with a causal student."""
    student = run.networks.student
    assert isinstance(student, (Full, Lora)), student
    networks = replace(run.networks, student=replace(student, causal=causality))
    return replace(run, job=replace(run.job, name=name), networks=networks)


# ---- FastGen's stages ------------------------------------------------------------------------------------------------


def _job(group: str, name: str) -> Job:
    return Job(project="fastgen", group=group, name=name)


def _kd(name: str, teacher: NetworkSpec, weights: str | None, causality: Causality, negative: str, lr: float) -> Run:
    run = Run(
        job=_job(name, f"{name}_kd_causal"),
        method=CausalKD(t_list=T_LIST),
        networks=Networks(teacher=teacher, teacher_init=weights, student=Full(causal=causality)),
        data=Folder(f"ODE_PAIRS/{name}", x0="latents", negative=negative, pairs=("path",)),
        optim=Optim(lr=lr, betas=(0.9, 0.99), weight_decay=0.01, clip=10.0),
        trainer=Trainer(max_iter=10_000, batch_size=2, precision="bf16", checkpointing=True),
        checkpoint=Checkpoint(save_iter=1000),
        parallel=Parallel(mode="fsdp"),
    )
    return watched(run)


def _at(teacher: str, run: Run) -> Run:
    """The run with the teacher at an address: a pipeline's folder, a run that post-trained it. "": the published weights."""
    if not teacher:
        return run
    source, data = teacher_at(teacher), run.data
    assert isinstance(data, Folder)
    return replace(
        run,
        networks=replace(run.networks, teacher=source.spec, teacher_init=source.init),
        data=replace(data, max_tokens=source.text.max_tokens, mask_text=source.text.uses_mask),
    )


def _toy(run: Run, teacher: NetworkSpec, width: int) -> Run:
    """The same method in minutes on a CPU: a network of the same class, random clips of 6 latent frames."""
    networks = run.networks
    head = None if networks.head is None else MultiscaleSpec(taps=(1,), channels=width, hidden=16)
    return replace(
        run,
        job=replace(run.job, name=f"{run.job.name}_toy", after=()),
        networks=Networks(teacher=teacher, student=Full(causal=Causality(2, 6)), head=head),
        data=Mock((4, 6, 4, 4), (8, 16), path_times=T_LIST),
        trainer=Trainer(max_iter=40, batch_size=2, log_every=10),
        checkpoint=Checkpoint(save_iter=20),
        parallel=Parallel(),
    )


def _sf(run: Run, method: SelfForcing, head: MultiscaleSpec, lr: float) -> Run:
    """Self-Forcing from the run of CausalKD."""
    kd, name = run.job, run.job.group
    init = f"{kd.project}/{kd.group}/{kd.name}@latest:student"
    student = run.networks.student
    assert isinstance(student, Full)
    data = run.data
    assert isinstance(data, Folder)
    optim = Optim(lr=lr, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)
    forced = replace(
        run,
        job=_job(name, f"{name}_sf"),
        method=method,
        networks=replace(run.networks, student=replace(student, init=init), head=head),
        data=replace(data, pairs=()),
        optim=optim,
        critic_optim=optim,
        trainer=replace(run.trainer, max_iter=5000, batch_size=1),
    )
    return watched(forced)


@recipe("CosmosPredict2_kd_causal")
def cosmos_kd(teacher: str = "") -> Run:
    """CausalKD of Cosmos-Predict2.5 2B into a streaming student of four steps (FastGen's CosmosPredict2 stage 2)."""
    weights = "checkpoints/nvidia/Cosmos-Predict2.5-2B/model.pt"
    return _at(teacher, _kd("CosmosPredict2", PREDICT2_5_2B, weights, Causality(3, 24), "zeros", 1e-5))


@recipe("CosmosPredict2_sf")
def cosmos_sf(teacher: str = "") -> Run:
    """Self-Forcing of Cosmos-Predict2.5 2B, from CosmosPredict2_kd_causal (FastGen's CosmosPredict2 stage 3)."""
    method = SelfForcing(
        student=CausalSample(t_list=T_LIST, renoise="ode"),
        guidance=3.0,
        critic=Critic(space="x0"),
        gan=Gan(weight=0.003, real_noise="same"),
    )
    return _sf(cosmos_kd(teacher), method, MultiscaleSpec(taps=(13, 20, 27), channels=2048), 1e-5)


@recipe("WanT2V_kd_causal")
def wan_kd(teacher: str = "") -> Run:
    """CausalKD of Wan 2.1 1.3B into a streaming student of four steps (FastGen's WanT2V stage 2)."""
    network = replace(T2V_1_3B, pretrained="checkpoints/Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    return _at(teacher, _kd("WanT2V", network, None, Causality(3, 21), "negative.pickle", 7e-5))


@recipe("WanT2V_sf")
def wan_sf(teacher: str = "") -> Run:
    """Self-Forcing of Wan 2.1 1.3B, from WanT2V_kd_causal (FastGen's WanT2V stage 3)."""
    method = SelfForcing(
        student=CausalSample(t_list=T_LIST),
        guidance=5.0,
        critic=Critic(space="x0"),
        gan=Gan(weight=0.003, real_noise="same"),
    )
    return _sf(wan_kd(teacher), method, MultiscaleSpec(taps=(15, 22, 29), channels=1536), 5e-6)


@recipe("CosmosPredict2_kd_causal_toy")
def cosmos_kd_toy() -> Run:
    """CosmosPredict2_kd_causal on a tiny random network and random states."""
    return _toy(cosmos_kd(), TINY_COSMOS, 32)


@recipe("CosmosPredict2_sf_toy")
def cosmos_sf_toy() -> Run:
    """CosmosPredict2_sf on a tiny random network and random clips."""
    return _toy(cosmos_sf(), TINY_COSMOS, 32)


@recipe("WanT2V_kd_causal_toy")
def wan_kd_toy() -> Run:
    """WanT2V_kd_causal on a tiny random network and random states."""
    return _toy(wan_kd(), TINY_WAN, 24)


@recipe("WanT2V_sf_toy")
def wan_sf_toy() -> Run:
    """WanT2V_sf on a tiny random network and random clips."""
    return _toy(wan_sf(), TINY_WAN, 24)
