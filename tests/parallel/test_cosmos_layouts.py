"""A controlled Cosmos, its base frozen, on two gloo processes against one: equal answers and gradients, in fp32 and bf16."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, torch
from fewstep.batch import Condition
from fewstep.networks.families.cosmos.control import CosmosControlSpec
from fewstep.parallel import World, join_world, kept_in_fp32, leave_world, place

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

def network(**changes):
    torch.manual_seed(0)
    net = CosmosControlSpec(latent_channels=4, num_heads=2, head_dim=16, num_layers=2, mlp_ratio=2, text_dim=32,
                            adaln_lora_dim=4, max_size=(8, 32, 32), num_control_blocks=1, hint_channels=8,
                            learnable_positions=True, **changes).build()
    for parameter in net.module.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    return net

draw = torch.Generator().manual_seed(3)
x, edge, text = (torch.randn(*shape, generator=draw) for shape in ((2, 4, 3, 8, 8), (2, 4, 3, 8, 8), (2, 7, 32)))
cond, t = Condition(text=text, control={"edge": edge}), torch.tensor([0.999, 0.3], dtype=torch.float64)
world = join_world("cpu", 1, 60)
alone = World(0, 1, torch.device("cpu"), None)
both = (("transfer1", torch.float32), ("transfer2_5", torch.float32))
for train, style, dtype in (("control", "transfer2_5", torch.bfloat16), *(("all", *one) for one in both)):
    sharded, whole = network(train=train, style=style), network(train=train, style=style)
    place(sharded.module, sharded.blocks, world, mode="fsdp", compute=dtype, trained=True, checkpointing=True)
    place(whole.module, whole.blocks, alone, mode="ddp", compute=dtype, trained=True)
    kept = kept_in_fp32(whole.module)
    assert any("learnable_pos_embed" in name for name in kept)
    for name, parameter in whole.module.named_parameters():
        parameter.data = parameter.data if name in kept else parameter.data.to(dtype)
    answers = [net(x, t, cond).velocity for net in (sharded, whole)]
    for answer in answers:
        answer.square().sum().backward()
    assert torch.equal(*answers)
    wanted = dict(whole.module.named_parameters())
    for name, parameter in sharded.module.named_parameters():
        assert (parameter.grad is None) == (wanted[name].grad is None), name
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32, name
            got, want = parameter.grad.full_tensor(), wanted[name].grad.float()
            assert (got - want).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * want.norm() + 1e-7, (name, got, want)
leave_world()
print("EQUAL")
"""


@pytest.mark.slow
def test_a_controlled_network_is_sharded_without_a_change(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", str(worker)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("EQUAL") == 2
    assert "FSDPControlled) returned a view" not in done.stderr
