"""The demo is told to end in the middle of a stage: its commands hear of it once, and are waited for while they save."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ends as a training does: at the first signal it begins to save, at a second it ends at once.
WORKER = """
import os, signal, sys, time
from pathlib import Path
told = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: told.append(1))
Path(sys.argv[1] + ".begun").write_text(str(os.getpid()))
while not told:
    time.sleep(0.05)
time.sleep(1)
Path(sys.argv[1] + ".told").write_text(str(len(told)))
"""
DEMO = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background ignores
from pathlib import Path
from fewstep.cli import main
import fewstep.toyworld.demo
from fewstep.distill.stages import Stage, run
work = [(sys.executable, sys.argv[1], sys.argv[2] + "/" + name) for name in ("a", "b")]
fewstep.toyworld.demo.demo = lambda *_: run(Stage.of("wait", "two that wait", *work), Path(sys.argv[2]), 0)
raise SystemExit(main(["demo"]))
"""


@pytest.mark.parametrize("how", ["ctrl-c in a terminal", "kill", "the terminal is closed"])
def test_each_command_is_told_once_and_saves(how: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-c", DEMO, str(tmp_path / "worker.py"), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as demo:  # type: ignore[call-overload]
        try:
            _wait(lambda: (tmp_path / "a.begun").exists() and (tmp_path / "b.begun").exists())
            if how == "ctrl-c in a terminal":
                os.killpg(demo.pid, signal.SIGINT)  # a terminal's goes to the whole group
            else:
                demo.send_signal(signal.SIGTERM if how == "kill" else signal.SIGHUP)
            said, _ = demo.communicate(timeout=60)
        finally:
            demo.kill()
    assert demo.returncode == 1 and "aborted" in said and "Traceback" not in said, said
    assert [(tmp_path / f"{name}.told").read_text() for name in "ab"] == ["1", "1"], said
    assert not (tmp_path / "stages" / "wait.json").exists()
    for name in "ab":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{name}.begun").read_text()), 0)


def _wait(is_so: object, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_is_printed_is_what_a_shell_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep import TOY
    from fewstep.cli import main
    from fewstep.cli.demo import METHODS
    from fewstep.distill.facts import facts_of
    from fewstep.distill.stages import text_of
    from fewstep.toyworld.demo.stages import METHODS as TITLES
    from fewstep.toyworld.demo.stages import beginning, request, students

    assert tuple(TITLES) == METHODS

    monkeypatch.chdir(tmp_path)
    out, toy = Path("my demo"), str(TOY)
    for name in ("world", "heldout"):
        where = ["--out", str(out / name), "--num", "2", "--seed", "1", "--workers", "0", "--only", "videos,metas"]
        assert main(["prepare", "toyworld", *where]) == 0
    facts = facts_of(request(out, "quick", toy, "4step"))
    for stage in [*beginning(out, "quick", "my demo/toy"), *students(out, "quick", facts, METHODS)]:
        for lane in stage.lanes:
            for command in lane:
                told = text_of(command)
                needs_root = any(
                    word in told for word in (" train experiment=", " export ", "toyworld.release", "train_tokenizer")
                )
                assert told.startswith("OUTPUT_ROOT='my demo' ") == needs_root, told
                split = ["sh", "-c", f'for word in {told}; do echo "$word"; done']
                words = subprocess.run(split, capture_output=True, text=True, check=True).stdout.splitlines()
                assert words == ["python" if word == sys.executable else word for word in command]


COPIES = """
import os, signal, sys, time
from pathlib import Path
from fewstep.distill.worker import Copy
if __name__ == "__main__":
    outside = os.getsid(0)
    for words, status, part in ((["--version"], 0, "0.1"), (["nothing"], 2, "No such command"), (["ls", "heads"], 0, "")):
        copy = Copy("fewstep", words, {})
        with copy.stdout:
            text = copy.stdout.read()
        assert (copy.wait(), part in text) == (status, True), text
    words = ["experiment=analytic_finetune", "trainer.log_every=1"]
    copy = Copy("fewstep", ["train", *words], {"OUTPUT_ROOT": sys.argv[1], "OMP_NUM_THREADS": "1"})
    lines = []
    with copy.stdout:
        for line in copy.stdout:
            lines.append(line)
            if line.startswith("step 3/"):
                assert os.getsid(copy._process.pid) not in (0, outside)
                copy.send_signal(signal.SIGTERM)
    assert copy.wait() == 1 and "SIGTERM received: iteration" in "".join(lines), lines[-5:]
    assert list(Path(sys.argv[1]).glob("analytic/basic/analytic_finetune/checkpoints/iter_*/.metadata"))
"""


def test_a_copy_is_a_process_of_its_own_that_saves_when_it_is_told_to_end(tmp_path: Path) -> None:
    (tmp_path / "copies.py").write_text(COPIES)
    command = [sys.executable, str(tmp_path / "copies.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
