"""Two processes whose rows want different experts: under FSDP both enter the same blocks, and nothing waits for ever."""

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from fewstep.batch import Condition
from fewstep.networks.families.wan.experts import ExpertsSpec
from fewstep.networks.tiny import TinySpec
from fewstep.parallel import join_world, place

torch.set_num_threads(1)
DIT = TinySpec("dit", channels=4, width=24, depth=2, num_heads=2, text_dim=8)

def network():
    torch.manual_seed(0)
    net = ExpertsSpec(DIT, DIT, 0.9).build()
    for parameter in net.module.parameters():  # its modulation starts at 0, which would hide gradients
        torch.nn.init.normal_(parameter, std=0.2)
    return net

world = join_world("cpu", timeout_s=60.0)
generator = torch.Generator().manual_seed(1)
x = torch.randn(2, 4, 2, 4, 4, generator=generator)
cond = Condition(text=torch.randn(2, 5, 8, generator=generator))
for times in ([0.95, 0.2], [0.95, 0.91], [0.1, 0.95]):
    t = torch.tensor(times, dtype=torch.float64)
    alone = network()
    answer = alone(x, t, cond, taps=(1,))
    ((answer.x0.square().sum() + answer.features[0].sum()) / 2).backward()

    shared = network()
    place(shared.module, shared.blocks, world, mode="fsdp", compute=torch.float32, trained=True, checkpointing=True)
    mine = slice(world.rank, world.rank + 1)
    part = shared(x[mine], t[mine], cond.rows(mine), taps=(1,))
    torch.testing.assert_close(part.velocity, answer.velocity[mine], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.features[0], answer.features[0][mine], rtol=1e-5, atol=1e-5)
    (part.x0.square().sum() + part.features[0].sum()).backward()
    for (name, got), (_, want) in zip(shared.module.named_parameters(), alone.module.named_parameters(), strict=True):
        gradient = torch.zeros_like(want) if want.grad is None else want.grad
        if got.grad is None:
            assert want.grad is None, name
            continue
        torch.testing.assert_close(got.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-4, msg=lambda m: name + m)
    with torch.no_grad():
        again = shared(x[mine], t[mine], cond.rows(mine))
    torch.testing.assert_close(again.velocity, answer.velocity[mine], rtol=1e-5, atol=1e-5)
dist.destroy_process_group()
print("EQUAL")
"""


def test_sharded_experts_answer_and_learn_as_one_process_does(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(worker)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert all("EQUAL" in text for text in said)
