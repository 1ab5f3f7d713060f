"""Knowledge distillation as FastGen's configurations have it: Wan 2.1 T2V 1.3B, SDXL and CogVideoX, by their names.

    fastgen/configs/experiments/WanT2V/config_kd.py         WanT2V_kd
    fastgen/configs/experiments/WanT2V/config_kd_path.py    WanT2V_kd_path
    fastgen/configs/experiments/SDXL/config_kd.py           SDXL_kd
    fastgen/configs/experiments/CogVideoX/config_kd.py      CogVideoX_kd

Each reads pairs of its teacher, `fewstep pairs PIPELINE DATA --out datasets/kd`, and takes `teacher=PIPELINE`, a diffusers
folder or hub id; without it the weights are expected below checkpoints/. FastGen has no moving average here, and clips
gradients at 10. NAME_toy is the same method on a tiny random network of the same class and random data, or on `teacher=` and
pairs of your own, for minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fewstep.config import recipe
from fewstep.data.folder.dataset import Folder
from fewstep.data.mock import Mock
from fewstep.inference.teacher import path_of, teacher_at
from fewstep.methods import KD
from fewstep.networks.contract import DiffusersSpec, NetworkSpec
from fewstep.networks.families.cogvideox import COGVIDEOX_2B, CogVideoXSpec
from fewstep.networks.families.unet import SDXL, UnetSpec
from fewstep.networks.families.wan.network import T2V_1_3B, WanSpec
from fewstep.networks.roles import Networks
from fewstep.recipes.watched import watched
from fewstep.training.ema import Ema
from fewstep.training.health import Health
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

FOUR_STEPS = KD(student_sample_steps=4, shift=5.0)  # FastGen rounds these times: 0.999, 0.937, 0.833, 0.624


@dataclass(frozen=True)
class Family:
    """A published network, and a tiny one of its class with a batch of its shapes."""

    published: DiffusersSpec
    weights: str  # where its download is expected
    max_tokens: int
    tiny: NetworkSpec
    mock: Mock


WAN = Family(
    T2V_1_3B,
    "checkpoints/Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer",
    512,
    WanSpec(
        latent_channels=4, num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=16, freq_dim=16, max_positions=32,
        text_tokens=8,
    ),
    Mock((4, 3, 8, 8), (8, 16)),
)  # fmt: skip
SD_XL = Family(
    SDXL,
    "checkpoints/stabilityai/stable-diffusion-xl-base-1.0/unet",
    77,
    UnetSpec(
        widths=(8, 16), with_attention=(False, True), layers_per_block=1, transformer_layers=(1, 1), num_heads=(2, 2),
        norm_groups=4, text_dim=12, pooled_dim=10, size_dim=8, sample_size=8,
    ),
    Mock((4, 1, 8, 8), (7, 12), pooled=10),
)  # fmt: skip
COGVIDEOX = Family(
    COGVIDEOX_2B,
    "checkpoints/THUDM/CogVideoX-2b/transformer",
    226,
    CogVideoXSpec(
        latent_channels=4, num_heads=2, head_dim=16, num_layers=2, text_dim=12, text_tokens=8, time_dim=8, sample_size=(8, 8),
        sample_frames=9,
    ),
    Mock((4, 3, 8, 8), (8, 12)),
)  # fmt: skip


@recipe("WanT2V_kd")
def want2v_kd(teacher: str = "") -> Run:
    """KD of Wan 2.1 T2V 1.3B into one step, as FastGen's WanT2V/config_kd.py.

    torchrun --nproc_per_node=8 -m fewstep.train experiment=WanT2V_kd teacher=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    return _run("WanT2V_kd", "wan_kd", WAN, teacher, KD(), lr=7e-5, batch_size=2)


@recipe("WanT2V_kd_path")
def want2v_kd_path(teacher: str = "") -> Run:
    """KD of Wan 2.1 T2V 1.3B into four steps, as FastGen's WanT2V/config_kd_path.py.

    fewstep pairs PIPELINE DATA --out datasets/kd --path-times 4 --guidance 5
    torchrun --nproc_per_node=8 -m fewstep.train experiment=WanT2V_kd_path teacher=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    run = _run("WanT2V_kd_path", "wan_kd", WAN, teacher, FOUR_STEPS, lr=7e-5, batch_size=2)
    return replace(run, trainer=replace(run.trainer, max_iter=10_000, log_every=1000), checkpoint=Checkpoint(save_iter=5000))


@recipe("SDXL_kd")
def sdxl_kd(teacher: str = "") -> Run:
    """KD of SDXL into one step, as FastGen's SDXL/config_kd.py.

    torchrun --nproc_per_node=8 -m fewstep.train experiment=SDXL_kd teacher=stabilityai/stable-diffusion-xl-base-1.0
    """
    return _run("SDXL_kd", "sdxl_kd", SD_XL, teacher, KD(), lr=1e-5, batch_size=16, precision="fp32")


@recipe("CogVideoX_kd")
def cogvideox_kd(teacher: str = "") -> Run:
    """KD of CogVideoX into one step, as FastGen's CogVideoX/config_kd.py.

    torchrun --nproc_per_node=8 -m fewstep.train experiment=CogVideoX_kd teacher=THUDM/CogVideoX-2b
    """
    run = _run("CogVideoX_kd", "CogVideoX_kd", COGVIDEOX, teacher, KD(), lr=1e-4, batch_size=2)
    return replace(run, checkpoint=Checkpoint(save_iter=500))


def _run(
    name: str,
    group: str,
    family: Family,
    teacher: str,
    method: KD,
    *,
    lr: float,
    batch_size: int,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> Run:
    networks = Networks(teacher=family.published, teacher_init=family.weights)
    max_tokens, mask_text = family.max_tokens, False
    if teacher and Path(teacher).is_dir():
        source = teacher_at(teacher)
        networks = Networks(teacher=source.spec, teacher_init=source.init)
        max_tokens, mask_text = source.text.max_tokens, source.text.uses_mask
    elif teacher:
        networks = Networks(teacher=replace(family.published, pretrained=teacher))
    pairs: tuple[Literal["noise", "path"], ...] = ("noise",) if method.student_sample_steps == 1 else ("path",)
    run = Run(
        job=Job("fastgen", group, name),
        method=method,
        networks=networks,
        data=Folder("datasets/kd", x0="latents", pairs=pairs, max_tokens=max_tokens, mask_text=mask_text),
        optim=Optim(lr=lr, betas=(0.9, 0.999), weight_decay=0.01, clip=10.0),
        ema=Ema(profile="none"),
        trainer=Trainer(max_iter=6000, batch_size=batch_size, precision=precision, checkpointing=True, log_every=100),
        checkpoint=Checkpoint(save_iter=1000),
        parallel=Parallel(mode="fsdp"),
    )
    return watched(run)


# ---- the same, small -------------------------------------------------------------------------------------------------


def _register_toy(make: Callable[[str], Run], family: Family) -> None:
    name = make("").job.name

    @recipe(f"{name}_toy")
    def toy(teacher: str = "") -> Run:
        run = make(teacher)
        assert isinstance(run.method, KD)
        small = replace(
            run,
            job=replace(run.job, name=f"{name}_toy"),
            optim=replace(run.optim, lr=1e-3),
            trainer=Trainer(max_iter=200, batch_size=4, num_threads=1, log_every=20),
            checkpoint=Checkpoint(save_iter=100),
            health=Health(every=None),
            parallel=Parallel(),
        )
        if teacher:
            return small
        steps = run.method.student_sample_steps
        times = run.method.times_on(path_of(family.tiny)) if steps > 1 else ()
        return replace(small, networks=Networks(teacher=family.tiny), data=replace(family.mock, path_times=times))

    toy.__doc__ = f"{name} on a tiny random network, or with teacher=PIPELINE: fewstep train experiment={name}_toy"


for _make, _family in ((want2v_kd, WAN), (want2v_kd_path, WAN), (sdxl_kd, SD_XL), (cogvideox_kd, COGVIDEOX)):
    _register_toy(_make, _family)
