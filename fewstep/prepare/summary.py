"""What a command of `fewstep prepare` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """How many entries there are after a command, and what it did to get there."""

    num: int  # entries there are now: clips, captions, rows
    new: int  # of them, written by this command
    foreign: int = 0  # files that the command did not write in this or an earlier run, left as they are
    dropped: int = 0  # rows of clips that changed or are gone
    shards: int = 0

    def __add__(self, other: Summary) -> Summary:
        return Summary(
            self.num + other.num,
            self.new + other.new,
            self.foreign + other.foreign,
            self.dropped + other.dropped,
            self.shards + other.shards,
        )

    def text(self, entries: str) -> str:
        """One line: 40 clips, 12 of them new, 3 that were there before are left as they are."""
        shards = f" in {self.shards} shards" if self.shards else ""
        foreign = f", {self.foreign} that were there before are left as they are" if self.foreign else ""
        dropped = f", {self.dropped} of clips that changed or are gone dropped" if self.dropped else ""
        return f"{self.num} {entries}{shards}, {self.new} of them new{foreign}{dropped}"
