"""Causal roles on two gloo processes, sharded, against one: Self-Forcing's roll-out with its cache, and causal consistency."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, torch
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from test_causal import CAUSAL, COSMOS, WAN, METHOD, batch_of, networks, run
from fewstep.diffusion import Rng
from fewstep.methods import CausalConsistency, Grid
from fewstep.methods.contract import Turn
from fewstep.networks.causal import CausalSpec
from fewstep.networks.roles import Full, Networks, build
from fewstep.parallel import World, join_world, leave_world
from fewstep.training.crew import assemble
from fewstep.training.iteration import Part, gradients, norms, step
from fewstep.training.run import Parallel, Trainer

torch.set_num_threads(1)
world, alone = join_world("cpu", 1, 60), World(0, 1, torch.device("cpu"), None)
consistency = CausalConsistency((1.0, 0.5), Grid(4, 1.0), guidance=2.0)
causal = {spec: CausalSpec.over(spec, CAUSAL) for spec in (WAN, COSMOS)}
cases = [(spec, METHOD, networks(spec, "full")) for spec in causal]
cases += [(spec, consistency, Networks(causal[spec], student=Full())) for spec in causal]
batch = batch_of()
batch = replace(batch, negative=replace(batch.cond, text=torch.zeros_like(batch.cond.text)))
for spec, method, nets in cases:
    found = []
    for where, mode in ((world, "fsdp"), (alone, "ddp")):
        case = replace(run(method, nets), parallel=Parallel(mode=mode), trainer=Trainer(checkpointing=True))
        built = build(case.networks, method.roles, 0)
        with torch.no_grad():
            for net in built.values():
                torch.manual_seed(1)
                for parameter in net.module.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        crew, turn, losses = assemble(case, built, where), Turn("student", ("student",)), []
        for number in range(2):  # the second after a step: weights and average differ then
            parts = [Part(batch, Rng(3, number, rows=range(2)), 1.0)]
            losses += [float(terms.total) for terms in gradients(case, crew, turn, parts)]
            step(case, crew, norms(crew, turn, where), number, number)
        full = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.append((losses, {name: full(p.detach()) for name, p in crew.student.live.items()}))
    (losses, sharded), (wanted, whole) = found
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-5, atol=1e-7)
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, rtol=1e-4, atol=1e-6, msg=lambda text: f"{name}: {text}")
leave_world()
print("EQUAL")
"""


@pytest.mark.slow
def test_sharded_causal_roles_train_as_whole_ones(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    training = str(Path(__file__).parents[1] / "training")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run([*launch, str(worker), training], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("EQUAL") == 2
