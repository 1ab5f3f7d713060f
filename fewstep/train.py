"""torchrun --nproc_per_node=8 -m fewstep.train experiment=NAME a.b=c ... is `fewstep train` on every process."""

from __future__ import annotations

from fewstep.cli import script

if __name__ == "__main__":
    script("train")
