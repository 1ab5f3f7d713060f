"""Writes a configuration as plain data. Reading it back gives an equal configuration.

Settings without effect are left out where they have their defaults (`Idle`): what is written is what counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from fewstep.config.reader import parse
from fewstep.config.text import read_text, read_yaml_mapping, write_yaml
from fewstep.config.types import Choice, Items, Leaf, Maybe, Record, Table, kind_of, settings_of, shape_of

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
    match shape_of(declared):
        case Maybe(member):
            return None if value is None else _plain(member, value, key)
        case Leaf() if isinstance(value, (bool, int, float, str, Path)):
            return str(value) if isinstance(value, Path) else value
        case Choice(group) if (kind_of(value) or ("",))[0] == group:
            return {"kind": value.kind, **dump(value)}
        case Record(cls) if type(value) is cls:
            return dump(value)
        case Items(types, is_open) if type(value) in (tuple, list) and (is_open or len(value) == len(types)):
            each = types * len(value) if is_open else types
            return [_plain(of, item, f"{key}.{place}") for place, (of, item) in enumerate(zip(each, value, strict=True))]
        case Table(of) if isinstance(value, Mapping):
            return {name: _plain(of, item, f"{key}.{name}") for name, item in cast("Mapping[str, Any]", value).items()}
        case _:
            raise TypeError(f"{key} holds {value!r}, which its type {declared} does not allow: it could not be read back")
