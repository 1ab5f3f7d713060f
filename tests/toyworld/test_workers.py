"""Worker processes end with the one they work for."""

import os
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
import os, sys, time
from fewstep.toyworld.workers import spawned

def name(_):
    time.sleep(0.5)
    return os.getpid()

if __name__ == "__main__":
    with spawned(2) as pool:
        print(*set(pool.map(name, range(4))), flush=True)
        pool.submit(time.sleep, 0)
        sys.stdin.read()
"""


def test_workers_of_a_killed_process_end(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert workers
        assert all(_is_there(pid) for pid in workers)
        parent.kill()
    until = time.monotonic() + 30
    while any(_is_there(pid) for pid in workers):
        assert time.monotonic() < until, "orphans"
        time.sleep(0.1)


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # one that ended and that nobody has asked after is no process any more
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
