"""Names for classes and functions, by group: how kinds, recipes, text encoders and scorers become known.

    provide("scorer", "my_package.scorers")   # modules that register names of a group; of a package, all its modules
    register("scorer", "sharpness", Sharpness)
    find("scorer", "sharpness")               # imports what was provided until the name is there; None if it never is

`fewstep/__init__.py` provides the modules of this package, the toy world among them; a file given with `--config` registers its
own. No room of the core imports another in order to know its names.
"""

from __future__ import annotations

import importlib
from threading import RLock
from typing import Any

from fewstep.errors import UserError

_ENTRIES: dict[str, dict[str, Any]] = {}
_SOURCES: dict[str, list[str]] = {}
_IMPORTING = RLock()  # a second thread waits until a name is there, instead of missing it


def provide(group: str, *modules: str) -> None:
    """Adds modules that register names of `group`. They are imported when a name that is not registered is asked for."""
    _SOURCES.setdefault(group, []).extend(modules)


def register(group: str, name: str, entry: Any) -> None:
    """Registers a class or function under a name; UserError if the name belongs to another one."""
    entries = _ENTRIES.setdefault(group, {})
    other = entries.get(name)
    if other is not None and _address(other) != _address(entry):  # the same address: its module was reloaded
        raise UserError(f"{group} {name!r} is both {_address(other)} and {_address(entry)}: give one of them another name")
    entries[name] = entry


def find(group: str, name: str) -> Any | None:
    """The entry of that name; None if no module registers it."""
    with _IMPORTING:
        while name not in _ENTRIES.get(group, {}) and _SOURCES.get(group):
            _import_next(_SOURCES[group])
        return _ENTRIES.get(group, {}).get(name)


def registered(group: str) -> frozenset[str]:
    """The names of a group that are registered so far; imports nothing."""
    return frozenset(_ENTRIES.get(group, {}))


def entries(group: str) -> dict[str, Any]:
    """Every entry of a group by name, sorted."""
    with _IMPORTING:
        while _SOURCES.get(group):
            _import_next(_SOURCES[group])
        return dict(sorted(_ENTRIES.get(group, {}).items()))


def groups() -> list[str]:
    """The names of all groups, sorted."""
    return sorted({*_ENTRIES, *_SOURCES})


def _import_next(sources: list[str]) -> None:
    """Imports the first of `sources`; the modules of a package take its place."""
    name = sources.pop(0)
    try:
        module = importlib.import_module(name)
    except BaseException:
        sources.insert(0, name)
        raise
    if hasattr(module, "__path__"):  # a package
        from pkgutil import iter_modules

        sources[:0] = [f"{name}.{child.name}" for child in iter_modules(module.__path__)]


def _address(entry: Any) -> str:
    return f"{entry.__module__}.{entry.__qualname__}"
