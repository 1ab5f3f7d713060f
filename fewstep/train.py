"""torchrun --nproc_per_node=8 -m fewstep.train experiment=NAME a.b=c ... is `fewstep train` on every process."""

from __future__ import annotations

import sys

from fewstep.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
