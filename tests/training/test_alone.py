"""Two runs in one folder: the second is refused while the first is at work, and only then."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.inference.synthetic import MixtureSamples
from fewstep.methods import Finetune
from fewstep.networks.analytic import MixtureSpec
from fewstep.networks.roles import Full, Networks
from fewstep.networks.tiny import TinySpec
from fewstep.training.alone import alone_in
from fewstep.training.errors import TrainingError
from fewstep.training.loop import train
from fewstep.training.run import Job, Run, Trainer

MIXTURE = MixtureSpec(means=((1.0, 0.0),))
HOLDS = """
import sys, time
from pathlib import Path
from fewstep.training.alone import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_has_ended_even_by_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    run = Run(
        job=Job(name="twice"),
        method=Finetune(),
        networks=Networks(MIXTURE, Full(TinySpec(width=16, depth=2), init="random")),
        data=MixtureSamples(MIXTURE, num=100),
        trainer=Trainer(max_iter=2, batch_size=8, num_threads=1, log_every=1),
    )
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(run.job.folder())], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=rf"another run is at work in it \(process {first.pid} on "):
            train(run)
        assert not (run.job.folder() / "config.yaml").exists()  # nothing of the first one's was touched
        os.kill(first.pid, signal.SIGKILL)
    assert train(run)["step"] == 2
    assert train(run)["step"] == 2  # its own lock is no one's
    greeting = (run.job.folder() / "log.txt").read_text().splitlines()[0]
    assert "from the beginning; model (networks.student), a teacher to be: " in greeting  # finetuning makes no student


def test_a_file_system_without_locks_is_no_reason_not_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone_in(tmp_path / "run"):
        pass
