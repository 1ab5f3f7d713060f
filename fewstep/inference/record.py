"""Records of how files were made, beside the files: what differs from the settings of now, and from the files read then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from fewstep.networks.weights.addresses import checkpoint_of, pieces_of
from fewstep.untrusted.text import opened

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")


def differences(before: Mapping[str, Any], record: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """(key, value before, value now) of each entry of `record` that is another before; keys of nested entries are dotted."""
    for key, new in record.items():
        old = before.get(key)
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            yield from ((f"{key}.{name}", one, other) for name, one, other in differences(old, new))
        elif old != new:
            yield key, old, new


def stamps(addresses: Iterable[str]) -> dict[str, str]:
    """By address a hash of the names, sizes and times of change of its files of weights, or of the file itself.

    An address without files here, a hub id, is left out. No weights are read: models are large.
    """
    by_address = {address: sorted(_files(address)) for address in addresses}
    return {address: _stamp(files) for address, files in by_address.items() if files}


def weights_stamp(address: str) -> str:
    """A hash of 64 blocks of each file of weights, which a copy has, too; "" without files here."""
    digest, files = hashlib.sha256(), sorted(_files(address))
    for path in files:
        size = path.stat().st_size
        with opened(path) as file:
            for block in range(64):
                file.seek(size * block // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16] if files else ""


def _files(address: str) -> Iterable[Path]:
    if Path(address).is_file():
        return [Path(address)]
    try:
        folder = Path(address) if _in(Path(address)) else checkpoint_of(address.partition(":")[0])
    except ValueError:
        return [Path(place) for _, place, _ in pieces_of(address) or []]
    return _in(folder)


def _in(folder: Path) -> list[Path]:
    """The files of weights of a model's folder, and of its parts' folders."""
    return [path for path in chain(folder.glob("*"), folder.glob("*/*")) if path.suffix in _WEIGHTS and path.is_file()]


def _stamp(files: Iterable[Path]) -> str:
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
