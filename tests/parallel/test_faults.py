"""Processes that die: the others end with a message, torchrun starts all of them again, and the result is the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.config import ConfigError, build_recipe
from fewstep.networks.weights.addresses import read_tensors

RECIPE = '''
import time
from dataclasses import dataclass, replace
from fewstep.batch import Batch
from fewstep.config import kind, recipe
from fewstep.diffusion import Rng
from fewstep.inference.synthetic import InMemory
from fewstep.methods import DMD2, StudentSample
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.optim import Optim
from fewstep.training.run import Checkpoint, Job, Parallel, Run, Trainer

DIT = TinySpec(architecture="dit", channels=2, width=24, depth=2, num_heads=2)

class Slow(InMemory):
    """A machine would be through before anybody could kill it."""
    def batch(self, index):
        time.sleep(0.01)
        return super().batch(index)

@kind("fault_latents", group="data")
@dataclass(frozen=True)
class Latents:
    fields = frozenset({"x0"})
    def open(self):
        return Slow(Batch(x0=Rng(5, 0, range(40)).normal((2, 2, 3, 3))))

@recipe("fault_toy")
def fault_toy():
    """DMD2 of a tiny network; batches of 8 on any number of processes."""
    return Run(
        job=Job(name="fault_toy"), method=DMD2(student=StudentSample((1.0, 0.6)), student_update_freq=2),
        networks=Networks(DIT, Full(), Full(DIT, init="random")), data=Latents(), optim=Optim(lr=1e-3, clip=0.3),
        trainer=Trainer(max_iter=400, batch_size=2, global_batch=8, num_threads=1, log_every=1),
        parallel=Parallel(mode="fsdp", device="cpu", timeout_s=120), checkpoint=Checkpoint(save_iter=20, keep_last=99),
    )
'''


class Desk:
    """A folder with the recipe, and its runs."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "recipe.py"
        self.file.write_text(RECIPE)

    def words(self, name: str, *more: str) -> list[str]:
        return ["--config", str(self.file), "experiment=fault_toy", f"job.name={name}", *more]

    def start(self, name: str, size: int, *more: str) -> list[subprocess.Popen[str]]:
        """The processes, without torchrun."""
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size), **self.environment()}
        return [
            subprocess.Popen(
                [sys.executable, "-m", "fewstep.train", *self.words(name, *more)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip

    def train(self, name: str, size: int, *more: str) -> None:
        processes = self.start(name, size, *more)
        messages = [process.communicate(timeout=300)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * size, messages

    def environment(self) -> dict[str, str]:
        return {"OUTPUT_ROOT": str(self.folder / "out"), "OMP_NUM_THREADS": "1"}

    def run(self, name: str) -> Path:
        return self.folder / "out/fewstep/default" / name

    def step(self, name: str) -> int:
        """The newest iteration in the log."""
        path = self.run(name) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def wait_for(self, name: str, step: int, *processes: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 180
        while self.step(name) < step:
            assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
            time.sleep(0.02)

    def wait_for_start(self, name: str, num: int, process: subprocess.Popen[str]) -> None:
        """Waits until the run has begun to train for the `num`-th time."""
        path, deadline = self.run(name) / "log.txt", time.monotonic() + 180
        while not path.is_file() or len(re.findall("resuming|from the beginning", path.read_text())) < num:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def tensors(self, name: str, step: int) -> dict[str, Tensor]:
        return read_tensors(self.run(name) / "checkpoints" / f"iter_{step:09d}", "")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_others_end_with_a_message_that_says_what_happened(desk: Desk, mode: str) -> None:
    processes = desk.start("left", 2, f"parallel.mode={mode}")
    try:
        desk.wait_for("left", 25, *processes)
        processes[1].kill()
        began = time.monotonic()
        message = processes[0].communicate(timeout=60)[1]
        assert time.monotonic() - began < 60 and processes[0].returncode == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert "process 0 of 2 ends because another one has ended or does not answer" in message
    assert "iter_000000020" in message.splitlines()[-1] and "Traceback" not in message
    assert desk.tensors("left", 20)


@pytest.mark.slow
def test_ten_deaths_at_random_change_nothing(desk: Desk) -> None:
    """One of two processes is killed at a random moment, ten times; torchrun starts both again."""
    desk.train("whole", 2)
    draw = random.Random(7)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=10"]
    agent = subprocess.Popen(
        [*launch, "-m", "fewstep.train", *desk.words("killed")],
        env=os.environ | desk.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for death in range(10):
            desk.wait_for_start("killed", death + 1, agent)
            workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True).stdout.split()
            time.sleep(draw.uniform(0.0, 0.8))
            os.kill(int(draw.choice(workers)), signal.SIGKILL)
        output, _ = agent.communicate(timeout=300)
    finally:
        agent.kill()
    assert agent.returncode == 0, output[-3000:]
    one, other = desk.tensors("killed", 400), desk.tensors("whole", 400)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.slow
def test_saved_on_four_goes_on_on_two_and_on_one(desk: Desk) -> None:
    """The same global batch, the same samples and noise: the next ten losses, and every weight and state after them."""
    desk.train("four", 4, "trainer.max_iter=3", "checkpoint.save_iter=3")
    first = desk.tensors("four", 3)
    assert any(".optim." in name for name in first)
    for size in (2, 1):
        subprocess.run(["cp", "-r", str(desk.run("four")), str(desk.run(f"on_{size}"))], check=True)
        # Nothing moves at a learning rate this small, and the moments keep what they had: what was loaded is written again.
        subprocess.run(["cp", "-r", str(desk.run("four")), str(desk.run(f"loaded_{size}"))], check=True)
        still = ("trainer.max_iter=4", "optim.lr=1e-30", "optim.betas=[0.999999999,0.999999999]", "optim.weight_decay=0")
        desk.train(f"loaded_{size}", size, *still)
        loaded = desk.tensors(f"loaded_{size}", 4)
        assert loaded.keys() == first.keys()
        for name in first:
            if not name.endswith(".step"):
                torch.testing.assert_close(loaded[name], first[name], rtol=1e-6, atol=1e-8, msg=name)
    for name, size in (("four", 4), ("on_2", 2), ("on_1", 1)):
        desk.train(name, size, "trainer.max_iter=13")
    lines = {name: losses(desk.run(name), range(4, 14)) for name in ("four", "on_2", "on_1")}
    last = desk.tensors("four", 13)
    for name in ("on_2", "on_1"):
        assert len(lines[name]) == 10
        for mine, theirs in zip(lines[name], lines["four"], strict=True):
            assert mine.keys() == theirs.keys()
            assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-5)
        for key, tensor in desk.tensors(name, 13).items():
            torch.testing.assert_close(tensor, last[key], rtol=1e-5, atol=5e-6, msg=key)


def losses(run: Path, steps: range) -> list[dict[str, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k.startswith(("loss/", "grad_norm/"))} for r in records if r["step"] in steps]


def test_a_global_batch_decides_the_number_of_micro_batches() -> None:
    run = build_recipe("analytic_finetune")
    run = replace(run, trainer=replace(run.trainer, batch_size=2, global_batch=24))
    assert [run.on_readers(num).trainer.grad_accum for num in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    with pytest.raises(ConfigError, match="cannot be divided among 5 processes"):
        run.on_readers(5)
