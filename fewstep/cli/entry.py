"""The command `fewstep`: runs a verb, and makes one line of an error that is meant for the user."""

from __future__ import annotations

import gc
import re
import sys
from functools import cache
from importlib import import_module
from typing import Any

import typer

from fewstep.cli.app import app
from fewstep.cli.options import UsageError
from fewstep.errors import UserError, plain_streams
from fewstep.files import explain

# A file each, in the order of --help. Each imports what it needs when it runs, so that --help answers at once.
VERBS = (
    "distill",
    "pipeline",
    "train",
    "sweep",
    "compare",
    "launch",
    "plan",
    "export",
    "convert",
    "generate",
    "ls",
    "prepare",
    "check",
    "pairs",
    "evaluate",
    "report",
    "demo",
)

for _verb in VERBS:
    import_module(f"fewstep.cli.{_verb}")


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0 when it is done, 1 when it failed at its work, 2 when it was used wrongly.

    Errors that are meant for the user become one line; any other keeps its traceback.
    """
    with plain_streams():
        return _run(argv)


def _run(argv: list[str] | None) -> int:
    from fewstep.config import ConfigError
    from fewstep.training.errors import TrainingError

    try:
        status = _command()(args=argv, prog_name="fewstep", standalone_mode=False)
    except UsageError as error:
        return _fail(_wrong_use(error), 2)
    except ConfigError as error:
        return _fail(str(error), 2)
    except typer.Exit as end:
        return end.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _fail("aborted", 1)
    except (UserError, TrainingError) as error:
        is_wrong_use = re.match("--?[a-z]", str(error))  # an option is what is wrong
        return _fail(str(error), 2 if is_wrong_use else 1)
    except OSError as error:
        return _fail(explain(error), 1)
    # typer returns the status of its Exit; 130 is what it makes of Ctrl-C.
    return _fail("aborted", 1) if status == 130 else status if isinstance(status, int) else 0


@cache
def _command() -> Any:  # Any: of typer, which has no public name for it
    """The tree of all verbs, which takes longer to build than to use: a process may run many commands."""
    return typer.main.get_command(app)


def _wrong_use(error: Any) -> str:  # Any: UsageError
    """The message of wrong use, with the value that was given, and where the help is."""
    text = str(error.format_message()).replace("Input should be", "the value should be")
    reasons = getattr(error.__cause__, "errors", None)  # of pydantic, which reads the values
    if reasons is not None and "the value should be" in text:
        text = text.replace("the value should be", f"{reasons()[0]['input']}: the value should be")
    return f"{text} ({'fewstep' if error.ctx is None else error.ctx.command_path} --help)"


def _fail(message: str, status: int) -> int:
    print(f"fewstep: {message}", file=sys.stderr)
    return status


def script(*words: str) -> None:
    """The entry point of the installed command. words: come before those of the command line."""
    status = main([*words, *sys.argv[1:]])
    gc.freeze()  # otherwise Python looks through all objects of torch once more before it ends: a fifth of importing it
    raise SystemExit(status)
