"""Records of how files were made, beside the files: what differs from the settings of now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def differences(before: Mapping[str, Any], record: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(key, value before, value now) of each entry of `record` that is another before; keys of nested entries are dotted."""
    for key, new in record.items():
        old = before.get(key)
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            yield from ((f"{key}.{name}", one, other) for name, one, other in differences(old, new))
        elif old != new:
            yield key, old, new
