"""A discriminator's features of sharded networks: their gradients, into the clip and the weights, are those of one process."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys
import torch
from fewstep.diffusion import features
from fewstep.parallel import join_world, leave_world, place

sys.path.insert(0, sys.argv[1])
from test_families import FAMILIES, T, draw, told

torch.set_num_threads(1)
world = join_world("cpu", timeout_s=60.0)

def network(name):
    torch.manual_seed(0)
    net = FAMILIES[name].build()
    for parameter in net.module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net

def same(got, want, what):
    assert (got - want).norm() <= 1e-4 * want.norm() + 1e-6, (what, float((got - want).norm()), float(want.norm()))

cond, mine = told(), slice(world.rank, world.rank + 1)
for name in sorted(FAMILIES.keys() - {"dit"}):  # diffusers' DiT reads weights of a block outside of its call: no FSDP
    for trained in (True, False):
        alone, sharded = network(name), network(name)
        place(sharded.module, sharded.blocks, world, mode="fsdp", compute=torch.float32, trained=trained, checkpointing=trained)
        x = draw(2, 4, 1, 8, 8).requires_grad_()
        own = x.detach()[mine].requires_grad_()
        wanted = features(alone, x, T, cond, (0,))[0]
        found = features(sharded, own, T[mine], cond.rows(mine), (0,))[0]
        same(found, wanted[mine], name)
        (wanted.square().sum() / 2).backward()
        found.square().sum().backward()
        same(own.grad / 2, x.grad[mine], name)
        for (weight, got), (_, want) in zip(sharded.module.named_parameters(), alone.module.named_parameters(), strict=True):
            if trained and want.grad is not None and got.grad is not None:
                same(got.grad.full_tensor(), want.grad, (name, weight))
            elif trained:
                assert want.grad is None or not bool(want.grad.any()), (name, weight)
                assert got.grad is None or not bool(got.grad.full_tensor().any()), (name, weight)
leave_world()
print("EQUAL")
"""


@pytest.mark.slow
def test_features_of_sharded_networks_learn_as_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    families = str(Path(__file__).parents[1] / "networks")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        str(worker),
        families,
    ]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("EQUAL") == 2
