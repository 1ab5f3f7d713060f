"""Writes a configuration as plain data. Reading it back gives an equal configuration.

Settings without effect are left out where they have their defaults (`Idle`): what is written is what counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from fewstep.config.reader import parse
from fewstep.config.text import read_text, read_yaml_mapping, write_yaml
from fewstep.config.types import Choice, Either, Items, Leaf, Record, Shape, Table, kind_of, settings_of, shape_of

T = TypeVar("T")


@runtime_checkable
class Idle(Protocol):
    """A configuration some of whose settings have no effect beside others."""

    @property
    def idle(self) -> frozenset[str]: ...


def dump(config: object) -> dict[str, Any]:
    """Nested dicts, lists and scalars such that parse(type(config), dump(config)) == config."""
    idle = config.idle if isinstance(config, Idle) else frozenset[str]()
    return {
        name: _plain(setting.declared, getattr(config, name), name)
        for name, setting in settings_of(type(config)).items()
        if name not in idle or setting.default is None or getattr(config, name) != setting.default()
    }


def to_yaml(config: object) -> str:
    """The dumped configuration as YAML, in ASCII."""
    return write_yaml(dump(config))


def from_yaml(cls: type[T], source: str | Path) -> T:
    """The instance that YAML describes: a str is the YAML itself, a Path the file that holds it."""
    text, where = (read_text(source), str(source)) if isinstance(source, Path) else (source, "the YAML text")
    return parse(cls, read_yaml_mapping(text, where))


def _plain(declared: Any, value: Any, key: str) -> Any:
    shape = shape_of(declared)
    if not _fits(shape, value):
        raise TypeError(f"{key} holds {value!r}, which its type {declared} does not allow: it could not be read back")
    match shape:
        case Leaf():
            return str(value) if isinstance(value, Path) else value
        case Either(members):
            fitting = [member for member in members if _fits(shape_of(member), value)]
            return None if value is None else _plain(fitting[0], value, key)
        case Choice():
            return {"kind": value.kind, **dump(value)}
        case Record():
            return dump(value)
        case Items(types, is_open):
            each = types * len(value) if is_open else types
            return [_plain(of, item, f"{key}.{place}") for place, (of, item) in enumerate(zip(each, value, strict=True))]
        case Table(of):
            return {name: _plain(of, item, f"{key}.{name}") for name, item in value.items()}


def _fits(shape: Shape, value: Any) -> bool:
    """Whether a value has the outer type of a shape; its content is checked when it is dumped itself."""
    match shape:
        case Either(members, optional):
            return optional if value is None else any(_fits(shape_of(member), value) for member in members)
        case Choice(group):
            own = kind_of(value)
            return own is not None and own[0] == group
        case Record(cls):
            return type(value) is cls
        case Items(types, is_open):
            return type(value) in (tuple, list) and (is_open or len(value) == len(types))
        case Table():
            return isinstance(value, Mapping)
        case Leaf():
            return isinstance(value, (bool, int, float, str, Path))
