"""python -m fewstep VERB ... is the command fewstep."""

from fewstep.cli import script

script()
