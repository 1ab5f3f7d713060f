"""The script or YAML that starts a run on a cluster: torchrun, and the settings of Slurm or SkyPilot. Imports no torch.

    #!/bin/bash                                    name: analytic_kd
    #SBATCH --nodes=2                              resources: {accelerators: H100:8}
    srun torchrun ... -m fewstep.train ...         run: torchrun ... -m fewstep.train ...

Nothing of ours runs on the cluster beside `fewstep train`: a script that is printed can be edited and submitted by hand.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fewstep.config import ConfigError
from fewstep.errors import UserError
from fewstep.files import write_text

Target = Literal["slurm", "skypilot"]
_WORDS = ("nodes", "gpus", "gpu", "restarts")


@dataclass(frozen=True)
class Nodes:
    """The machines of a job."""

    least: int = 1
    most: int = 1
    gpus: int = 1  # of each; as many processes
    gpu: str | None = None  # its name: H100; None: any
    restarts: int = 3  # how often all processes are started anew after one of them died

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most


def split_words(words: Sequence[str]) -> tuple[list[str], Nodes]:
    """The words of the run, and the machines that nodes=, gpus=, gpu= and restarts= ask for. Raises ConfigError."""
    rest = [word for word in words if word.partition("=")[0] not in _WORDS]
    values = dict(word.split("=", 1) for word in words if word.partition("=")[0] in _WORDS and "=" in word)
    problems: list[tuple[str, str]] = []
    nodes = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", values.get("nodes", "1"))
    if nodes is None or (nodes[2] is not None and int(nodes[2]) < int(nodes[1])):
        problems.append(("nodes", f"is a number, or a range as 1:4, not {values['nodes']!r}"))
    for name, least in (("gpus", 1), ("restarts", 0)):
        if name in values and not (values[name].isdecimal() and int(values[name]) >= least):
            problems.append((name, f"is a number, at least {least}, not {values[name]!r}"))
    if "gpu" in values and re.fullmatch(r"[\w.-]+", values["gpu"]) is None:
        problems.append(("gpu", f"is the name of a GPU, as H100, not {values['gpu']!r}"))
    if problems or nodes is None:
        raise ConfigError(problems)
    least, most = int(nodes[1]), int(nodes[2] or nodes[1])
    return rest, Nodes(least, most, int(values.get("gpus", "1")), values.get("gpu"), int(values.get("restarts", "3")))


def script(target: Target, words: Sequence[str], name: str, output: Path, nodes: Nodes, options: Sequence[str] = ()) -> str:
    """The text to submit. words: those of `fewstep train`. output: OUTPUT_ROOT, which all machines must see.

    options: further lines: for Slurm of #SBATCH (--partition=gpu), for SkyPilot of its resources (use_spot=true).
    """
    return slurm(words, name, output, nodes, options) if target == "slurm" else skypilot(words, name, output, nodes, options)


def slurm(words: Sequence[str], name: str, output: Path, nodes: Nodes, options: Sequence[str]) -> str:
    """A script for sbatch: a torchrun on each node, which find one another at a port of the first node."""
    count = f"{nodes.least}-{nodes.most}" if nodes.is_elastic else str(nodes.most)
    gpus = f"{nodes.gpu.lower()}:{nodes.gpus}" if nodes.gpu else str(nodes.gpus)
    lines = [
        f"--job-name={name}",
        f"--nodes={count}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={gpus}",
        "--open-mode=append",
        f"--output={name}-%j.log",
        "--requeue",
        "--signal=TERM@300",
        *(["--no-kill"] if nodes.is_elastic else []),
        *options,
    ]
    torchrun = _torchrun(words, f"{nodes.least}:$SLURM_NNODES" if nodes.is_elastic else "$SLURM_NNODES", str(nodes.gpus), nodes)
    srun = "srun --no-kill" if nodes.is_elastic else "srun --kill-on-bad-exit=1"
    heads = "\n".join(f"#SBATCH {line}" for line in lines)
    return f"""#!/bin/bash
{heads}

set -euo pipefail
export OUTPUT_ROOT={shlex.quote(str(output))}
RENDEZVOUS_ID="$SLURM_JOB_ID"
RENDEZVOUS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
export RENDEZVOUS RENDEZVOUS_ID
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store for every attempt, without the addresses of processes that died

# 300 s before the time is over SIGTERM arrives: the run saves a checkpoint and ends; the same script goes on from there.
{srun} {torchrun}
"""


def skypilot(words: Sequence[str], name: str, output: Path, nodes: Nodes, options: Sequence[str]) -> str:
    """A task for `sky launch`, or for `sky jobs launch`, which starts it again where machines are taken away."""
    if nodes.is_elastic:
        raise UserError("SkyPilot has a fixed number of nodes and starts all of them again: give nodes=N, not a range")
    torchrun = _torchrun(words, "$SKYPILOT_NUM_NODES", str(nodes.gpus), nodes)
    resources: dict[str, Any] = {"accelerators": f"{nodes.gpu or 'H100'}:{nodes.gpus}"}
    for option in options:
        key, equals, value = option.removeprefix("--").partition("=")
        if not equals:
            raise UserError(f"--option {option}: give KEY=VALUE of SkyPilot's resources, as use_spot=true")
        resources[key.replace("-", "_")] = yaml.safe_load(value)
    run = f"""\
export RENDEZVOUS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):29400"
export RENDEZVOUS_ID="$SKYPILOT_TASK_ID"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store for every attempt, without the addresses of processes that died
{torchrun}
"""
    task = {
        "name": re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-"),
        "workdir": ".",
        "num_nodes": nodes.most,
        "resources": resources,
        "envs": {"OUTPUT_ROOT": str(output)},
        "setup": "pip install .\n",
        "run": run,
    }
    return yaml.dump(task, sort_keys=False, default_style=None, width=10_000, Dumper=_Blocks)


def submit(target: Target, text: str, place: Path) -> None:
    """Writes the text and hands it to sbatch or sky. Raises UserError where that is not there, or refuses it."""
    program = "sbatch" if target == "slurm" else "sky"
    if shutil.which(program) is None:
        hint = "run this on a login node of the cluster" if target == "slurm" else "pip install 'fewstep[skypilot]'"
        raise UserError(f"{program} is not here: {hint}, or print the text with --dry-run and submit it by hand")
    write_text(place, text)
    command = [program, str(place)] if target == "slurm" else [program, "jobs", "launch", "--yes", str(place)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{shlex.join(command)} failed, see above")


def _torchrun(words: Sequence[str], nnodes: str, gpus: str, nodes: Nodes) -> str:
    return (
        f"torchrun --nnodes={nnodes} --nproc_per_node={gpus} --max-restarts={nodes.restarts} --rdzv-backend=c10d "
        f'--rdzv-endpoint="$RENDEZVOUS" --rdzv-id="$RENDEZVOUS_ID" -m fewstep.train {shlex.join(words)}'
    )


class _Blocks(yaml.SafeDumper):
    """Text of several lines as a block, which a person can read and edit."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)
