"""The plan against what torch really allocates, op by op, in the same step on real tensors."""

import functools
import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from fewstep.batch import Batch
from fewstep.data.folder.dataset import Folder
from fewstep.data.loader import first_batch
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng
from fewstep.errors import UserError
from fewstep.methods import DMD2, KD, Finetune
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.networks.tiny import TinySpec
from fewstep.parallel import World
from fewstep.training import iteration, loop
from fewstep.training.crew import assemble
from fewstep.training.plan import plan as planning
from fewstep.training.plan.gpu_fit import advice, answer, dryrun, here
from fewstep.training.plan.plan import Plan, measure, plan
from fewstep.training.plan.request import PlanRequest, split_words
from fewstep.training.run import Checkpoint, Parallel, Run, Trainer

ALONE = World(0, 1, torch.device("cpu"), None)
DIT = TinySpec("dit", channels=4, width=48, depth=2, num_heads=4, text_dim=32)
COSMOS = CosmosSpec(
    latent_channels=4, num_heads=4, head_dim=16, num_layers=2, mlp_ratio=4, text_dim=32, adaln_lora_dim=8, max_size=(8, 32, 32),
)  # fmt: skip
DATA = Mock((4, 3, 8, 8), (7, 32), num=8)


def run(method: Any, networks: Networks, **trainer: Any) -> Run:
    return Run(method=method, networks=networks, data=DATA, trainer=replace(Trainer(batch_size=4), **trainer))


def batch_of(run: Run) -> Batch:
    return first_batch(run.data.open(), run.trainer.batch_size)


def measured(run: Run) -> int:
    """Bytes that torch's own profiler saw allocated at the worst moment of a turn, and what was held before."""
    crew = assemble(run, build(run.networks, run.method.roles, 0), ALONE)
    held = {id(s): s for net in crew.networks.values() for s in (*net.module.parameters(), *net.module.buffers())}
    held |= {id(t): t for t in crew.state().values()}
    batch = DATA.open().batch(torch.arange(run.trainer.batch_size))
    static = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values()}
    worst = 0
    for step in range(2):
        turn = run.method.turn(step)
        part = iteration.Part(batch, Rng(0, step, torch.arange(batch.size())), 1.0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            for _ in iteration.gradients(run, crew, turn, [part]):
                pass
            iteration.step(run, crew, {name: float(norm) for name, norm in iteration.norms(crew, turn, ALONE).items()}, step, 0)
        assert seen.profiler is not None and seen.profiler.kineto_results is not None
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        level = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            level += event.nbytes()  # type: ignore[attr-defined]  # torch's stubs do not know it
            peak = max(peak, level)
        worst = max(worst, peak)
        for role in crew.trained.values():
            role.take_turn(False)
    return worst + sum(static.values())


def test_the_plan_measures_the_iteration_that_the_loop_trains_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added to the assembly, the gradients or the step is in both."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    for name in ("gradients", "norms", "step"):
        monkeypatch.setattr(iteration, name, counted(name, getattr(iteration, name)))
    for user in (loop, planning):
        monkeypatch.setattr(user, "assemble", counted("assemble", assemble))
    case = run(DMD2(student_update_freq=2), FULL, max_iter=2, log_every=1)  # one turn of each
    expected = ["assemble", *2 * ["gradients", "norms", "step"]]
    loop.train(replace(case, checkpoint=Checkpoint(save_iter=2)))
    assert calls == expected
    calls.clear()
    plan(case)
    assert calls == expected


FULL = Networks(DIT, Full(), Full())
SHARED = Networks(DIT, Lora(rank=4), Lora(rank=4))
CASES = {
    "finetune": run(Finetune(), Networks(DIT)),
    "kd": run(KD(), Networks(COSMOS)),
    "dmd2": run(DMD2(guidance=3.0, student_update_freq=2), FULL),
    "dmd2_cosmos": run(DMD2(guidance=3.0, student_update_freq=2), Networks(COSMOS)),
    "dmd2_shared": run(DMD2(guidance=3.0, student_update_freq=2), SHARED),
    "dmd2_shared_recomputed": run(DMD2(guidance=3.0, student_update_freq=2), SHARED, checkpointing=True),
    "dmd2_cosmos_shared_bf16": run(
        DMD2(student_update_freq=2), Networks(COSMOS, Lora(rank=4), Lora(rank=4)), checkpointing=True, precision="bf16"
    ),
}


SLOW = ("finetune", "dmd2_cosmos", "dmd2_shared")


@functools.cache
def planned(name: str) -> Plan:
    return plan(CASES[name])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_the_plan_is_what_is_measured(name: str) -> None:
    want = measured(CASES[name])
    assert sum(planned(name).parts.values()) == pytest.approx(want, rel=0.03), name


def test_roles_on_one_backbone_and_recomputation_are_seen() -> None:
    whole, shared, recomputed = map(planned, ("dmd2", "dmd2_shared", "dmd2_shared_recomputed"))
    assert shared.parts["student.optimizer"] < 0.4 * whole.parts["student.optimizer"]
    assert shared.parts["teacher.weights"] < 1.01 * whole.parts["teacher.weights"]
    assert recomputed.parts["activations"] < 0.7 * shared.parts["activations"]
    assert set(whole.turns) == {"student", "critic"} and max(whole.turns.values()) == sum(whole.parts.values())


def test_shards_share_what_is_held_and_not_what_passes() -> None:
    case = CASES["dmd2"]
    found = measure(case, batch_of(case))
    sharded = measure(replace(case, parallel=Parallel("fsdp")), batch_of(case)).on(8)
    for name, size in found.on(1).parts.items():
        assert sharded.parts[name] == (size if name == "activations" else pytest.approx(size / 8, abs=1))
    weights = sum(p.numel() * 4 for p in DIT.build().module.parameters())
    assert weights < sharded.parts["gathered"] < 1.5 * weights  # both blocks, the gradients of one, and the rest
    assert found.on(8).parts == found.on(1).parts  # ddp
    with pytest.raises(ValueError, match=r"parallel\.num_replicas=3 does not divide gpus=8"):
        measure(replace(case, parallel=Parallel("fsdp", num_replicas=3)), batch_of(case)).on(8)


def test_a_share_in_bf16_passes_less_than_one_in_fp32_and_shares_its_gradients() -> None:
    """On one GPU the worst moment in bf16 is that of its fp32 gradients; of those a shard has a share, of activations none."""
    wide = replace(DIT, width=192, depth=4)
    for method, networks in ((Finetune(), Networks(wide)), (DMD2(student_update_freq=2), Networks(wide, Full(), Full()))):
        whole, half = (
            measure(
                replace(run(method, networks, precision=precision), parallel=Parallel("fsdp")),
                DATA.open().batch(torch.arange(1)),
            )
            for precision in ("fp32", "bf16")
        )
        size = sum(p.nbytes for p in wide.build().module.parameters())
        assert 0.4 < half.on(64).parts["activations"] / whole.on(64).parts["activations"] < 0.75
        assert half.on(1).parts["activations"] < 0.1 * size
        grads = [half.on(1).parts.get(f"{role}.gradients", 0) for role in ("student", "critic")]
        assert size <= max(grads) < 1.1 * size  # of fp32, and those of bf16 that were last added to them


def test_a_network_that_copies_its_parts_is_planned_and_leaves_the_heap_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weak reference to a storage holds a bare address: a copy of one frees what the first has freed."""

    def refuse(self: object, protocol: object) -> None:
        raise AssertionError("a weak reference to a storage was copied")

    monkeypatch.setattr(StorageWeakRef, "__reduce_ex__", refuse)
    sizes = {field.name: getattr(COSMOS, field.name) for field in fields(COSMOS)}
    led = CosmosControlSpec(**sizes, controls=("edge",), num_control_blocks=1, hint_channels=4, style="transfer1")
    case = replace(run(DMD2(student_update_freq=2), Networks(led)), data=replace(DATA, controls=("edge",)))
    parts = plan(case).parts
    assert parts["student.weights"] == parts["critic.weights"] == sum(p.nbytes for p in led.build().module.parameters())


def test_no_file_of_weights_is_opened(tmp_path: Path) -> None:
    COSMOS.build().module.save_config(tmp_path)  # type: ignore[operator]
    spec = CosmosSpec(pretrained=str(tmp_path))
    networks = Networks(spec, Full(spec, "nowhere@latest:student"), Lora(rank=4, init="nowhere"), teacher_init="nowhere")
    case = run(DMD2(), networks)
    other = run(DMD2(), Networks(COSMOS, Full(COSMOS, "random"), Lora(rank=4)))
    assert plan(case).parts == plan(other).parts
    with pytest.raises(ValueError, match="its weights are missing"):
        spec.build()


def test_the_smallest_change_that_fits_is_named() -> None:
    """A limit between what the run needs as it is and with recomputation."""
    case = run(Finetune(), Networks(DIT))
    batch = batch_of(case)
    found = measure(case, batch)
    as_is, less = found.on(1).needed_gib, measure(replace(case, trainer=replace(case.trainer, checkpointing=True)), batch).on(1)
    assert less.needed_gib < as_is
    said = advice(case, batch, found, 1, (as_is + less.needed_gib) / 2)
    assert said == "it fits with trainer.checkpointing=true"


def test_changes_add_up_where_one_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(run: Run, batch: Any) -> Any:
        gib = 10.0 - 2 * run.trainer.checkpointing - 3 * (run.trainer.precision == "bf16") - (run.trainer.batch_size == 1)
        gib -= 2 * isinstance(run.networks.critic, Lora)
        return SimpleNamespace(run=run, on=lambda gpus: SimpleNamespace(needed_gib=gib / gpus))

    monkeypatch.setattr("fewstep.training.plan.gpu_fit.measure", needs)
    found = measure(CASES["kd"], batch_of(CASES["kd"]))
    for limit, said in (
        (8.5, "it fits with trainer.checkpointing=true"),
        (7.5, "it fits with trainer.precision=bf16"),
        (6.5, "it fits with trainer.checkpointing=true trainer.batch_size=1 trainer.grad_accum=4 trainer.precision=bf16"),
        (2.5, "it fits with trainer.checkpointing=true trainer.batch_size=1 trainer.grad_accum=4 trainer.precision=bf16 "
              "networks.critic=lora"),
        (1.0, "no setting alone makes it fit"),
    ):  # fmt: skip
        assert advice(CASES["dmd2"], batch_of(CASES["dmd2"]), found, 1, limit).split("; as it is")[0] == said, limit


def test_the_command_answers_in_json_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, request = split_words(["a.b=c", "gpus=2", "gpu=24", "shape=4x2x6x6", "text=5x32"])
    assert words == ["a.b=c"]
    told, text = answer(CASES["finetune"], request)
    assert told["fits"] and told["gpus"] == 2 and told["batch"] == "x0 4x4x2x6x6, text 4x5x32"
    assert told["peak_gib_per_gpu"] == pytest.approx(sum(told["parts_gib"].values()))
    assert told["activations_gib"]["checkpointing"] < told["activations_gib"]["no_checkpointing"]
    assert "fits 24" in text
    assert json.loads(json.dumps(told)) == told
    with pytest.raises(ValueError, match="gpu=h1000: give GiB, or one of h100"):
        split_words(["gpu=h1000"])
    with pytest.raises(ValueError, match="shape=4by4"):
        split_words(["shape=4by4"])
    nowhere = replace(CASES["finetune"], data=Folder(str(tmp_path / "nothing")))
    told, text = answer(nowhere, PlanRequest(gpu="h200"))
    assert "ASSUMED, because the data cannot be opened" in text and told["assumed"]
    assert dryrun(nowhere).startswith("memory is not planned")

    def refuses(*args: Any) -> None:
        raise UserError("this network works on latents of 4 channels, but was given 16")

    monkeypatch.setattr("fewstep.training.plan.gpu_fit.measure", refuses)
    with pytest.raises(UserError, match=r"was given 16\. These shapes are ASSUMED, because the data"):
        answer(nowhere, PlanRequest(gpu="h200"))


def test_here_is_this_machine_and_nothing_else_is_counted_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, request = split_words(["gpus=2", "gpu=here", "shape=4x2x6x6", "text=5x32"])
    record, text = answer(CASES["finetune"], request, words.append)
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / 2  # of two processes
    assert f"fits this machine, which has no GPU ({gib:.4g} GiB)" in text and "GPUs" not in text
    assert "on this machine, which has no GPU, processes: 2, x0 4x4x2x6x6" in text and not record["activations_gib"]
    assert sum("iteration" in word for word in words) == 1
    monkeypatch.setattr("fewstep.training.plan.gpu_fit.here", lambda processes: ("this machine, which has no GPU", 0.1))
    record, text = answer(CASES["finetune"], request)
    assert "does not fit this machine, which has no GPU (0.1 GiB): " in text and record["activations_gib"]
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "A GPU")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: SimpleNamespace(total_memory=5 * 2**30))
    assert here(2) == ("A GPU", 5.0)  # each process has one


def test_a_teacher_that_lies_on_the_cpu_counts_while_it_is_asked() -> None:
    """Its weights are there in the student's turn, when it is asked, and not in the critic's."""
    case = run(DMD2(student_update_freq=2), Networks(COSMOS))
    there, away = plan(case), plan(replace(case, trainer=replace(case.trainer, offload_teacher=True)))
    weights = there.parts["teacher.weights"]
    assert there.turns["critic"] - away.turns["critic"] == pytest.approx(weights, rel=0.02)
    assert "host" not in away.parts and "teacher.weights" not in away.parts
    assert away.turns["student"] == there.turns["student"]  # whose worst moment here is the call of the teacher


@pytest.mark.parametrize("frozen", [pytest.param("8bit", marks=pytest.mark.slow), "float8"])
def test_a_rounded_teacher_counts_its_codes_and_scales(frozen: Any) -> None:
    case = run(DMD2(), Networks(DIT))
    there, rounded = plan(case), plan(replace(case, trainer=replace(case.trainer, frozen=frozen)))
    layers = [
        layer for layer in build(Networks(DIT), ("teacher",), 0)["teacher"].module.modules() if isinstance(layer, nn.Linear)
    ]
    spared = sum(3 * layer.weight.numel() - 4 * len(layer.weight) for layer in layers)
    assert there.parts["teacher.weights"] - rounded.parts["teacher.weights"] == spared
    assert measured(replace(case, trainer=replace(case.trainer, frozen=frozen))) == pytest.approx(
        max(rounded.turns.values()), rel=0.03
    )


def test_an_analytic_teacher_has_no_weights_and_is_planned_all_the_same() -> None:
    tiny = Full(TinySpec(width=16, depth=2), "random")
    case = replace(run(DMD2(), Networks(MixtureSpec(means=((1.0, 0.0),)), tiny, tiny)), data=Mock((2,), None))
    assert "teacher.weights" not in plan(case).parts
