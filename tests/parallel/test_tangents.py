"""Forward-mode derivatives through sharded networks are those of one process, with and without activation checkpointing."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
from dataclasses import replace
import torch
from fewstep.batch import Condition
from fewstep.diffusion.derivative import Jvp
from fewstep.networks.families.cosmos.network import CosmosSpec
from fewstep.networks.families.wan.anyflow import AnyFlowSpec
from fewstep.networks.families.wan.network import WanSpec
from fewstep.parallel import join_world, leave_world, place

torch.set_num_threads(1)
world = join_world("cpu", timeout_s=60.0)
WAN = WanSpec(num_heads=2, head_dim=12, num_layers=2, ffn_dim=32, text_dim=12, text_tokens=7, freq_dim=16, latent_channels=4)
COSMOS = CosmosSpec(
    latent_channels=4, num_heads=2, head_dim=12, num_layers=2, text_dim=12, adaln_lora_dim=4, max_size=(4, 4, 6),
    rope_scale=(1.0, 1.0, 1.0), padding_mask=False,
)
torch.manual_seed(0)
x, d, text = torch.randn(2, 4, 3, 4, 6), torch.randn(2, 4, 3, 4, 6), torch.randn(2, 5, 12)
t, one = torch.tensor([0.9, 0.35], dtype=torch.float64), torch.ones(2, dtype=torch.float64)

def network(spec):
    torch.manual_seed(1)
    return spec.build()

def tangent(network, rows):
    cond = Condition(text=text[rows], end=0.5 * t[rows] if network.traits.reads_end else None)
    def answer(x, t):
        return network(x, t, cond).velocity
    return Jvp().along(answer, (x[rows], t[rows]), (d[rows], one[rows]))

mine = slice(world.rank, world.rank + 1)
for spec in (WAN, AnyFlowSpec.like(WAN), COSMOS, replace(COSMOS, end_gate=0.25)):
    wanted = tangent(network(spec), slice(0, 2))[mine]
    for checkpointing in (False, True):
        sharded = network(spec)
        how = {"mode": "fsdp", "compute": torch.float32, "trained": True, "checkpointing": checkpointing}
        place(sharded.module, sharded.blocks, world, **how)
        torch.testing.assert_close(tangent(sharded, mine), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
leave_world()
print("EQUAL")
"""


@pytest.mark.slow
def test_tangents_of_sharded_networks_are_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(worker)]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert done.returncode == 0 and done.stdout.count("EQUAL") == 2, done.stderr[-3000:]
