"""Checkpoints of several processes: each reads its own part, and damage that one of them finds ends all in one line."""

import os
import socket
import subprocess
import sys
from pathlib import Path

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


def test_two_processes_read_their_parts_and_execute_nothing(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(tmp_path)],
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
    assert not (tmp_path / "executed").exists()
