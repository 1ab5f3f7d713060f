"""Checkpoints of several processes: each reads its own part, and damage that one of them finds ends all in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import os, pickle, sys
from pathlib import Path
import torch
from torch.distributed.tensor import Shard, distribute_tensor
from fewstep.parallel import join_world, leave_world
from fewstep.training.checkpoint import Checkpoints, Progress
from fewstep.training.errors import TrainingError

class Payload:
    def __reduce__(self):
        return Path.touch, (Path(sys.argv[1]) / "executed",)

def state(factor):
    shards = {name: torch.arange(float(n * 3)).reshape(n, 3) * factor for name, n in (("even", 8), ("odd", 3), ("one", 1))}
    shards = {name: distribute_tensor(whole, world.mesh["shard"], [Shard(0)]) for name, whole in shards.items()}
    return shards | {"whole": torch.full((5,), factor), "step": torch.tensor(factor)}

def refused(what):
    try:
        checkpoints.load(folder, state(0.0))
    except TrainingError as error:
        assert "is damaged" in str(error) and "\\n" not in str(error), error
        return
    raise AssertionError(what)

world = join_world("cpu")
checkpoints = Checkpoints(Path(sys.argv[1]) / "checkpoints", world, 2, None, False)
checkpoints.save(state(2.0), Progress(step=1))
folder = checkpoints.latest()
into = state(0.0)
assert checkpoints.load(folder, into) == Progress(step=1)
for name, tensor in state(2.0).items():
    mine, theirs = (t.to_local() if hasattr(t, "to_local") else t for t in (into[name], tensor))
    assert torch.equal(mine, theirs), name
world.barrier()
if world.is_main:
    (folder / "__1_0.distcp").rename(folder / "elsewhere")
world.barrier()
refused("a lost shard, which one process needs")
world.barrier()
if world.is_main:
    (folder / "elsewhere").rename(folder / "__1_0.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
world.barrier()
refused("a table of contents that is a program")
world.barrier()
leave_world()
"""


def run_on_two(folder: Path, text: str) -> None:
    """Runs a program with `folder` as its argument on two processes, to their ends."""
    worker = folder / "worker.py"
    worker.write_text(text)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        messages = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], messages


def test_two_processes_read_their_parts_and_execute_nothing(tmp_path: Path) -> None:
    run_on_two(tmp_path, WORKER)
    assert not (tmp_path / "executed").exists()


SHARDED = """
import sys
from pathlib import Path
import torch
from torch.distributed.tensor import Shard, distribute_tensor
from fewstep.parallel import join_world, leave_world
from fewstep.training.checkpoint import Checkpoints, Progress

world = join_world("cpu")
generator = torch.Generator().manual_seed(0)
names = ["student.weights.layer%d.weight" % n for n in range(8)]
whole = {name: torch.randn(1024, 4096, generator=generator) for name in names}
state = {name: distribute_tensor(tensor, world.weights["shard"], [Shard(0)]) for name, tensor in whole.items()}
Checkpoints(Path(sys.argv[1]) / "checkpoints", world, 2, None, False).save(state, Progress(step=1))
leave_world()
"""
CONSOLIDATE = """
import resource, sys
import torch, safetensors.torch
from pathlib import Path
from fewstep.networks.files.distributed import open_distributed
from fewstep.files import write_tensors
import fewstep.networks.weights.convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
write_tensors(Path(sys.argv[2]).with_name("small.safetensors"), {})
before = peak()
write_tensors(Path(sys.argv[2]), open_distributed(Path(sys.argv[1])))
print(peak() - before)
"""


@pytest.mark.slow
def test_one_process_joins_the_shards_of_two_in_little_memory(tmp_path: Path) -> None:
    """128 MiB of weights, in two files: equal to what was divided, in less than 1.2 times their size."""
    run_on_two(tmp_path, SHARDED)
    folder, out = tmp_path / "checkpoints/iter_000000001", tmp_path / "whole.safetensors"
    assert len(list(folder.glob("*.distcp"))) == 2
    (tmp_path / "join.py").write_text(CONSOLIDATE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "join.py"), str(folder), str(out)], capture_output=True, text=True, check=True
    )
    whole, generator = load_file(out), torch.Generator().manual_seed(0)
    assert len(whole) == 8
    for n in range(8):
        assert torch.equal(whole[f"student.weights.layer{n}.weight"], torch.randn(1024, 4096, generator=generator))
    assert int(done.stdout) <= 1.2 * 128 * 2**20
