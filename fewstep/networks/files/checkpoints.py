"""Which checkpoints a run's folder `checkpoints/` holds: the whole ones, the newest, the best."""

from __future__ import annotations

from pathlib import Path

from fewstep.errors import UserError
from fewstep.files import plain_name
from fewstep.untrusted.text import read_text

POINTER, BEST = "latest_checkpoint.txt", "best_checkpoint.txt"


def whole_ones(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the oldest first."""
    return sorted(path for path in folder.glob("iter_*") if path.suffix != ".partial" and _is_whole(path))


def newest_in(folder: Path) -> Path | None:
    """The newest whole checkpoint. The pointer is written last: without it, or where it is damaged, one may still be whole.

    Where there is none, the one that the pointer names, which may have its weights and no record of its progress.
    """
    pointed = _pointed(folder, POINTER)
    if pointed is not None and _is_whole(pointed):
        return pointed
    return next(reversed(whole_ones(folder)), pointed)


def best_in(folder: Path) -> Path | None:
    """The checkpoint at the best value of checkpoint.best_metric; None where there is no such metric."""
    return _pointed(folder, BEST)


def damaged_after(checkpoint: Path) -> Path | None:
    """A newer checkpoint that lost a file; None where there is none."""
    newer = (path for path in checkpoint.parent.glob("iter_*") if path.suffix != ".partial" and path.name > checkpoint.name)
    return next((path for path in newer if path.is_dir() and not _is_whole(path)), None)


def _pointed(folder: Path, pointer: str) -> Path | None:
    try:
        path = folder / plain_name(read_text(folder / pointer, 4096).strip())
    except (OSError, UserError):
        return None
    return path if (path / ".metadata").is_file() else None


def _is_whole(path: Path) -> bool:
    return (path / ".metadata").is_file() and (path / "trainer.json").is_file()
