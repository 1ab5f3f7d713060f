"""The verbs of the command `fewstep`: a file for each, its name in VERBS of entry.py."""

from fewstep.cli.entry import main, script

__all__ = ["main", "script"]
