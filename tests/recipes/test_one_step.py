"""Every recipe of `fewstep ls recipes` trains: each role takes a step, with the recipe's own method, losses and data schema.

`shrink` is the one rule by which a recipe of any size fits into a second: networks keep their structure and lose their width,
weights are random, the data is a folder of the same parts with tiny latents.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.config import ConfigError, build_recipe, recipes
from fewstep.data.files import arrays, cache
from fewstep.data.folder.dataset import Folder
from fewstep.data.folder.parts import stored_embedding
from fewstep.data.mix import Mix, Source
from fewstep.data.mock import Mock
from fewstep.inference.synthetic import TeacherPairs
from fewstep.inference.teacher import path_of
from fewstep.methods import KD
from fewstep.networks.causal import CausalSpec
from fewstep.networks.contract import DiffusersSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.roles import FROZEN, Full, Networks
from fewstep.recipes.fastgen_kd import COGVIDEOX, SD_XL, WAN, Family
from fewstep.training.health import Health
from fewstep.training.loop import train
from fewstep.training.run import Checkpoint, Run

LATENTS, TOKENS, NUM = (4, 3, 4, 4), 6, 4
WIDTH = 2 * 12
# What a network of any family has of these fields becomes as small as this; a field that is none stays none.
SMALL: dict[str, Any] = {
    "latent_channels": LATENTS[0], "num_heads": 2, "head_dim": 12, "num_layers": 4, "mlp_ratio": 2.0, "text_dim": 8,
    "text_projection_from": 12, "adaln_lora_dim": 4, "max_size": (4, 8, 8), "hint_channels": LATENTS[0],
    "image_context_dim": 8, "image_context_tokens": 2,
}  # fmt: skip
# Networks of other families, with a batch of their shapes: those of the toy twins.
TWINS: dict[type, Family] = {type(family.published): family for family in (WAN, SD_XL, COGVIDEOX)}


def shrink(run: Run, root: Path) -> Run:
    """The run with small networks of the same structure, random weights, a tiny data set in `root` and two iterations."""
    data = run.data.sources[0].data if isinstance(run.data, Mix) else run.data
    networks = run.networks if isinstance(data, Mock) else _networks(run.networks)  # a toy twin is small already
    if isinstance(data, Folder):
        twin = TWINS.get(type(run.networks.teacher))
        reader: Any = networks.teacher or networks.spec_of("student")
        shape, pooled = (LATENTS, None) if twin is None else (twin.mock.shape, twin.mock.pooled)
        write_parts(root, shape, data.text or "t5_xxl", _text_channels(reader), pooled)
        states = {"path_times": _times(run.method, networks.teacher)} if "path" in data.pairs else {}
        data = replace(data, dataset_dir=str(root), max_tokens=TOKENS if twin is None else twin.mock.text[0], **states)  # type: ignore[index]
        if isinstance(run.data, Mix):
            sources = [replace(data, control=getattr(source.data, "control", None)) for source in run.data.sources]
            data = Mix(tuple(map(Source, sources)), NUM)
    elif isinstance(data, TeacherPairs):
        data = replace(data, num=64)
    optims = {name: _short(getattr(run, name)) for name in ("optim", "critic_optim", "head_optim")}
    size = min(run.trainer.batch_size, NUM)
    trainer = replace(run.trainer, max_iter=2, batch_size=size, grad_accum=1, log_every=1, num_threads=1)
    return replace(
        run, job=replace(run.job, after=()), networks=networks, data=data, trainer=trainer, checkpoint=Checkpoint(save_iter=2),
        health=Health(every=None), preview=None, **optims,
    )  # fmt: skip


def _text_channels(spec: Any) -> int:
    """Of the embeddings that a network reads."""
    spec = spec.network if isinstance(spec, CausalSpec) else spec
    projects = isinstance(spec, CosmosSpec) and spec.text_projection_from is not None
    return spec.text_projection_from if projects else spec.text_dim


def _times(method: Any, teacher: Any) -> tuple[float, ...]:
    return method.times_on(path_of(teacher)) if isinstance(method, KD) else method.t_list


def _networks(nets: Networks) -> Networks:
    roles = {role: _role(getattr(nets, role)) for role in ("student", "critic")}
    head, teacher = nets.head, _network(nets.teacher)
    if head is not None and isinstance(nets.teacher, DiffusersSpec):
        channels = {"channels": WIDTH, "hidden": 16}
        taps = tuple(sorted({min(tap, max(teacher.num_layers - 1 - i, 0)) for i, tap in enumerate(head.taps)}))
        head = replace(head, taps=taps, **{name: value for name, value in channels.items() if hasattr(head, name)})
    return replace(nets, teacher=teacher, teacher_init=_init(nets.teacher_init, None), head=head, **roles)


def _network(spec: Any) -> Any:
    if isinstance(spec, CausalSpec):
        return replace(spec, network=_network(spec.network), span=min(spec.span, LATENTS[1]))
    if not isinstance(spec, DiffusersSpec):
        return spec  # of points: small already
    if type(spec) in TWINS:
        return TWINS[type(spec)].tiny
    own = {f.name for f in fields(spec)}
    sizes = {name: value for name, value in SMALL.items() if name in own and getattr(spec, name) is not None}
    return replace(spec, pretrained=None, **sizes)


def _role(role: Any) -> Any:
    if not isinstance(role, Full):
        return role
    causal = None if role.causal is None else replace(role.causal, span=min(role.causal.span, LATENTS[1]))
    return replace(role, network=_network(role.network), init=_init(role.init, "random"), causal=causal)


def _init(init: str | None, other: str | None) -> str | None:
    return init if init in ("teacher", "random") else other


def _short(optim: Any) -> Any:
    return None if optim is None else replace(optim, warmup_iters=min(optim.warmup_iters, 1))


def write_parts(root: Path, shape: tuple[int, ...], text: str, channels: int, pooled: int | None = None) -> None:
    """Every part that a recipe reads: latents, texts, controls, noise, states."""
    torch.manual_seed(0)
    arrays.write_pickle(root / "negative.pickle", [torch.randn(TOKENS - 1, channels).numpy()])
    for n in range(NUM):
        facts = {"num_frames": 9 if shape[1] > 1 else 1, "fps": 24.0}
        for part in ("latents", *(f"{control}_latents" for control in ("edge", "vis", "depth", "seg", "keypoint"))):
            cache.write(root / part / f"{n}.safetensors", {"latents": torch.randn(shape)}, facts=facts)
        vector = None if pooled is None else torch.randn(pooled)
        arrays.write_pickle(root / text / f"{n}.pickle", stored_embedding(torch.randn(TOKENS - 1, channels), vector))
        arrays.write_pickle(root / "noise" / f"{n}.pickle", torch.randn(shape).numpy())
        cache.write(root / "path" / f"{n}.safetensors", {"path": torch.randn(4, *shape)})


def cases() -> list[Any]:
    """Every recipe of the package; of those that differ in the name of their control alone, edge in the quick suite."""
    names = [name for name, found in recipes().items() if found.module.startswith("fewstep.")]
    again = re.compile("_(vis|depth|seg|keypoint)(_|$)")
    marks = {name: [pytest.mark.slow] for name in names if again.search(name)}
    return [pytest.param(name, marks=marks.get(name, [])) for name in names]


@pytest.mark.parametrize("name", cases())
def test_a_recipe_takes_a_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    try:
        recipe = build_recipe(name)
    except ConfigError as error:
        assert "teacher: which?" in str(error)
        pytest.skip("a recipe of whatever teacher is named: test_general.py, tests/stories/test_own_data.py")
    run = shrink(recipe, tmp_path / "data")
    assert type(run.method) is type(recipe.method) and run.networks.teacher.__class__ is recipe.networks.teacher.__class__
    train(run)
    metrics = [json.loads(line) for line in (run.job.folder() / "metrics.jsonl").read_text().splitlines()]
    for role in set(run.method.roles) - set(FROZEN):
        assert any(row.get(f"grad_norm/{role}", 0) > 0 for row in metrics), (role, metrics)
