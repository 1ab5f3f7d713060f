"""What share of a GPU's peak a training iteration reaches: finetune, KD and DMD2 of real networks with random weights.

    python benchmarks/gpu_mfu.py [--out mfu.json] [--only predict25_2b/dmd2 ..] [--frames 24 --height 88 --width 160]
    python benchmarks/gpu_mfu.py --tiny                # small networks of the same classes, on a CPU

An iteration is the one that `fewstep train` takes: losses, backward, norms, steps, average. FLOPs are those of the matrix
products and attentions that are executed, counted from the shapes in an iteration of each turn, apart:

    forward     with gradient                       frozen     without: teacher, critic or student that a turn does not train
    backward                                        recompute  blocks run again in backward (trainer.checkpointing)

MFU counts what the method needs, forward + frozen + backward; HFU counts the recomputation, too. The peak is the card's for
dense bf16. A row is written as soon as it is measured: stop when you like. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import fewstep
from fewstep.data.mock import Mock
from fewstep.diffusion import Rng
from fewstep.files import write_json
from fewstep.methods import DMD2, KD, Finetune, Method, StudentSample
from fewstep.networks.contract import NetworkSpec
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.cosmos.predict import PREDICT2_5_2B
from fewstep.networks.families.wan.network import T2V_1_3B, WanSpec
from fewstep.networks.lora import Lora
from fewstep.networks.roles import Full, Networks, build
from fewstep.parallel import World
from fewstep.training import iteration
from fewstep.training.crew import Crew, assemble
from fewstep.training.run import Run, Trainer

PEAK_TFLOPS = {"H200": 989, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "A6000": 155}  # dense bf16
PHASES = ("forward", "frozen", "backward", "recompute")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
TINY: dict[str, NetworkSpec] = {
    "predict25_2b": CosmosSpec(num_heads=2, head_dim=16, num_layers=2, text_dim=32, adaln_lora_dim=8, max_size=(8, 32, 32)),
    "wan_1_3b": WanSpec(num_heads=2, head_dim=16, num_layers=2, text_dim=32, ffn_dim=64),
}
MODELS: dict[str, NetworkSpec] = {"predict25_2b": PREDICT2_5_2B, "wan_1_3b": T2V_1_3B}
FOUR_STEPS = StudentSample((1.0, 0.9375, 0.8333333333333334, 0.625))
METHODS: dict[str, Method] = {
    "finetune": Finetune(),
    "kd": KD(),
    "dmd2": DMD2(student=FOUR_STEPS, guidance=4.0),
    "dmd2_lora": DMD2(student=FOUR_STEPS, guidance=4.0),  # all roles on one backbone
}


class Flops(TorchDispatchMode):
    """FLOPs of the operations that are executed, by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(PHASES, 0)
        aten: Any = torch.ops.aten  # filled at import
        self._formulas: dict[Any, Any] = dict(flop_registry)
        self._formulas.setdefault(aten._scaled_dot_product_flash_attention_for_cpu, _of_attention)
        self._formulas.setdefault(aten._scaled_dot_product_flash_attention_for_cpu_backward, _of_attention_backward)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.counts[_phase()] += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _phase() -> str:
    """In a backward nothing asks for gradients, but for blocks that run again."""
    if torch._C._current_graph_task_id() != -1:
        return "recompute" if torch.is_grad_enabled() else "backward"
    return "forward" if torch.is_grad_enabled() else "frozen"


def _of_attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _of_attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


@dataclass
class Job:
    """The networks of one row, and its iterations."""

    run: Run
    crew: Crew
    world: World

    @classmethod
    def of(cls, spec: NetworkSpec, method: str, data: Mock, checkpointing: bool) -> Job:
        adapters = method.endswith("lora")
        roles = (Lora(rank=32), Lora(rank=32)) if adapters else (Full(), Full())
        teacher = replace(spec) if METHODS[method].roles != ("student",) or adapters else None
        networks = Networks(teacher, *roles) if teacher else Networks(student=Full(spec, init="random"))
        precision = "bf16" if DEVICE.type == "cuda" else "fp32"
        trainer = Trainer(batch_size=1, precision=precision, checkpointing=checkpointing)
        run = Run(method=METHODS[method], networks=networks, data=data, trainer=trainer)
        world = World(0, 1, DEVICE, None)
        return cls(run, assemble(run, build(networks, run.method.roles, 0), world), world)

    def take(self, step: int) -> str:
        """One iteration; the name of its turn."""
        turn = self.run.method.turn(step)
        batch = self.run.data.open().batch(torch.arange(1)).to(DEVICE)
        part = iteration.Part(batch, Rng(0, step, (0,), DEVICE), 1.0)
        for _ in iteration.gradients(self.run, self.crew, turn, [part]):
            pass
        sizes = {name: float(norm) for name, norm in iteration.norms(self.crew, turn, self.world).items()}
        iteration.step(self.run, self.crew, sizes, step, step)
        return turn.name


def measure(name: str, job: Job, cycles: int) -> dict[str, Any]:
    """A row: seconds and FLOPs of an iteration of the mean kind."""
    per_cycle = getattr(job.run.method, "student_update_freq", 1)
    counted: list[Flops] = []
    for step in range(per_cycle):
        with Flops() as flops:
            job.take(step)
        counted.append(flops)
    seconds: list[float] = []
    for number in range(per_cycle * cycles):
        began = _now()
        job.take(number % per_cycle)  # those that were counted: which of a student's calls is trained depends on the step
        seconds.append(_now() - began)
    tflops = {phase: sum(flops.counts[phase] for flops in counted) / per_cycle / 1e12 for phase in PHASES}
    second = sum(seconds) / len(seconds)
    needed = tflops["forward"] + tflops["frozen"] + tflops["backward"]
    peak = next((value for card, value in PEAK_TFLOPS.items() if card in _card()), None)
    share = lambda amount: None if peak is None else round(100 * amount / second / peak, 1)  # noqa: E731
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    return {
        "name": name,
        "iteration_s": round(second, 4),
        "tflop": {phase: float(f"{value:.4g}") for phase, value in tflops.items()},
        "mfu_percent": share(needed),
        "hfu_percent": share(needed + tflops["recompute"]),
        "peak_memory_gib": None if memory is None else round(memory, 1),
        "iterations": len(seconds),
    }


def rows(
    models: dict[str, NetworkSpec], shape: tuple[int, ...], only: list[str], checkpointing: bool, cycles: int
) -> Iterator[Any]:
    for model, spec in models.items():
        text_dim: int = spec.text_dim  # pyright: ignore[reportAttributeAccessIssue]  # of both classes
        data = Mock(shape, (512 if DEVICE.type == "cuda" else 8, text_dim), num=1)
        for method in METHODS:
            name = f"{model}/{method}"
            if only and name not in only:
                continue
            try:
                if DEVICE.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                yield measure(name, Job.of(spec, method, data, checkpointing), cycles)
            except torch.cuda.OutOfMemoryError as error:
                yield {"name": name, "error": str(error).split(". ")[0]}
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'':28} {'s':>9} " + " ".join(f"{phase:>10}" for phase in PHASES) + f" {'MFU %':>7} {'HFU %':>7} {'GiB':>6}"]
    for row in results:
        if "error" in row:
            lines.append(f"{row['name']:28} {row['error']}")
            continue
        flops = " ".join(f"{row['tflop'][phase]:10.4g}" for phase in PHASES)
        ends = [row["mfu_percent"], row["hfu_percent"], row["peak_memory_gib"]]
        cells = [f"{'-' if end is None else end:>7}" for end in ends]
        lines.append(f"{row['name']:28} {row['iteration_s']:9.4f} {flops} " + " ".join(cells))
    return "\n".join(lines) + "\n(TFLOP of an iteration, by phase)"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every row")
    parser.add_argument("--only", nargs="*", default=[], help="rows, as predict25_2b/dmd2")
    parser.add_argument("--frames", type=int, default=24, help="latent frames; 24 x 88 x 160 are 93 frames at 720p")
    parser.add_argument("--height", type=int, default=88, help="of the latents")
    parser.add_argument("--width", type=int, default=160, help="of the latents")
    parser.add_argument("--cycles", type=int, default=2, help="of all turns of a method, after one that is not timed")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations")
    parser.add_argument("--tiny", action="store_true", help="small networks of the same classes")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    if DEVICE.type == "cpu" and not options.tiny:
        print("there is no GPU here; --tiny runs small networks on a CPU", file=sys.stderr)
        raise SystemExit(2)
    shape = (16, 2, 8, 8) if options.tiny else (16, options.frames, options.height, options.width)
    results: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "name": "gpu_mfu",
        "date": date.today().isoformat(),
        "device": _card(),
        "versions": {"fewstep": fewstep.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "latents": list(shape),
        "checkpointing": not options.no_checkpointing,
        "rows": results,
    }
    for row in rows(TINY if options.tiny else MODELS, shape, options.only, not options.no_checkpointing, options.cycles):
        results.append(row)
        print(row, file=sys.stderr, flush=True)
        if options.out is not None:
            write_json(options.out, record)
    print(table(results))
    print(json.dumps(record))
    return record


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _card() -> str:
    return torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
