"""Commands of this package, each in a copy of one process that has imported once what they all need.

Two dozen commands would import torch and diffusers two dozen times. Python's fork server imports them once (imports.py) and
copies itself for each command; a copy has a session, an environment and pipes of its own, as a command of a shell has.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import Lock
from typing import TextIO

IMPORTS = "fewstep.distill.imports"
_STARTING = Lock()  # the first of two lanes starts the server


class Copy:
    """A running command; it has the few members of subprocess.Popen that a lane uses."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], preload: str = IMPORTS):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preload])
        reader, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_run, args=(module, list(arguments), dict(environment), writer))
        with _STARTING:
            before = os.environ.get("OMP_NUM_THREADS")
            if "OMP_NUM_THREADS" in environment:  # numbers of threads are fixed at import
                os.environ["OMP_NUM_THREADS"] = environment["OMP_NUM_THREADS"]
            try:
                self._process.start()
            finally:
                if before is None:
                    os.environ.pop("OMP_NUM_THREADS", None)
                else:
                    os.environ["OMP_NUM_THREADS"] = before
        writer.close()
        self.stdout: TextIO = os.fdopen(os.dup(reader.fileno()), errors="replace")
        reader.close()
        self._ended = False

    def send_signal(self, number: int) -> None:
        if not self._ended and self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def wait(self) -> int:
        """Its exit status; negative for the number of the signal that ended it."""
        self._process.join()
        self._ended = True
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(module: str, arguments: Sequence[str], environment: Mapping[str, str], output: Connection) -> None:
    """What the copy does: `python -m MODULE ARGUMENTS`."""
    os.setsid()  # Ctrl-C in a terminal is the parent's to pass on
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
