"""From layers of values to one configuration: a recipe, then files, then the command line.

Each layer is an instance, plain data, or the edits of a command line, and may be partial. A key is decided by the last
layer that speaks of it; choosing another kind forgets what the layers below said inside it. Reading goes on after a
problem, so that one error names all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, cast

from fewstep import registry
from fewstep.config.leaf import obey_rules, read_leaf
from fewstep.config.problems import ConfigError, Problem, hint, join, nearest_keys
from fewstep.config.text import Text, read_yaml
from fewstep.config.types import (
    Choice,
    Items,
    Leaf,
    Maybe,
    OneOf,
    Record,
    Table,
    kind_of,
    settings_of,
    shape_of,
    split,
    type_text,
)
from fewstep.errors import show

T = TypeVar("T")
Layers = list[Any]  # Any: what users write has no type before it is read


def parse(cls: type[T], data: Mapping[str, Any]) -> T:
    """The instance of a dataclass that nested plain data describe; ConfigError with every problem."""
    return read_layers(cls, [data])


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """A new configuration with `a.b=c` edits applied, kinds before what is inside them; the old one is untouched."""
    return read_layers(type(config), [config], overrides)


def read_layers(cls: type[T], layers: Sequence[Any], overrides: Sequence[str] = (), also: Sequence[str] = ()) -> T:
    """The instance that the layers, then the overrides, make; ConfigError with every problem.

    also: names that the same command line could set besides, to be suggested for an unknown one.
    """
    reader = _Reader(also)
    result = reader.record(cls, [*layers, *reader.edits(overrides)], "")
    reader.report()
    return cast(T, result)


class _Edit(dict[str, Any]):
    """One override, a.b=c as {a: {b: Text(c)}}: it changes a part of a value, where any other mapping is a whole one."""


class _Reader:
    """Reads one configuration. The results of its methods are valid only while it has no `problems` and no `unknown`."""

    def __init__(self, also: Sequence[str] = ()) -> None:
        self.problems: list[Problem] = []
        self.unknown: list[tuple[str, str, list[str]]] = []  # key, the level that lacks it, what that level has
        self.keys: list[str] = list(also)
        self.also = list(also)

    def edits(self, overrides: Sequence[str]) -> list[_Edit]:
        texts: dict[str, Text] = {}
        for word in overrides:
            key, equals, text = word.partition("=")
            if not key or not equals:
                self.problems.append((key, f"{show(word)} is not KEY=VALUE"))
            elif key.count(".") >= 100:  # far deeper than any configuration, not yet too deep for Python's stack
                self.problems.append((key, "no such setting; keys are at most 100 names deep"))
            else:
                texts[key] = Text(text)  # the last one counts: `repeated` says so to the user
        for key, whole in texts.items():
            parts = [other for other in texts if other.startswith(f"{key}.")]
            kind = texts.get(f"{key}.kind", whole)
            if parts and (_is_mapping_text(whole) or whole.lower() in ("none", "null")):
                self.problems.append((key, f"given as {show(whole)}, and {', '.join(parts)} too; keep one"))
            elif kind != whole:
                self.problems.append((key, f"given twice, as {show(whole)} and as {show(kind)}; keep one"))
        layers: list[_Edit] = []
        for key in sorted(texts, key=lambda key: key.removesuffix(".kind").count(".")):  # what is chosen before what is in it
            layer: Any = texts[key]
            for name in reversed(key.split(".")):
                layer = _Edit({name: layer})
            layers.append(layer)
        return layers

    def report(self) -> None:
        """Raises ConfigError if there was any problem.

        It is called last, when all keys that could be suggested are collected.
        """
        for key, level, names in self.unknown:
            names = names if level else [*self.also, *names]
            near = nearest_keys(key, level, names, self.keys)
            there = f"{level} has" if level else "there are"
            advice = f"did you mean {' or '.join(near)}?" if near else f"{there}: {', '.join(names) or 'no settings'}"
            self.problems.append((key, f"no such setting; {advice}"))
        if self.problems:
            raise ConfigError(self.problems)

    def read(self, declared: Any, parts: Layers, key: str) -> Any:
        self.keys.append(key)
        before = self.count()
        match shape_of(declared):
            case Leaf():
                return self.leaf(declared, parts, key)
            case Maybe(member):
                return self.maybe(member, parts, key)
            case Choice(group):
                value = self.choice(group, parts, key)
            case Record(cls):
                value = self.record(cls, parts, key)
            case Items() as shape:
                value = self.items(declared, shape, parts, key)
            case Table(of):
                value = self.table(declared, of, parts, key)
        if self.count() == before:
            self.attempt(key, obey_rules, split(declared)[1], value)
        return value

    def count(self) -> int:
        return len(self.problems) + len(self.unknown)

    def attempt(self, key: str, call: Callable[..., Any], *arguments: Any, **fields: Any) -> Any:
        """What the call returns; _NOTHING and a problem if it raises ValueError."""
        try:
            return call(*arguments, **fields)
        except ValueError as error:
            self.problems.append((key, str(error)))
            return _NOTHING

    def leaf(self, declared: Any, parts: Layers, key: str) -> Any:
        for edit in _edits_of(parts):
            self.lose(edit, key, [])
        value = self.value(declared, parts, key)
        return value if value is _NOTHING else self.attempt(key, read_leaf, declared, value)

    def record(self, cls: type, parts: Layers, key: str) -> Any:
        settings = settings_of(cls)
        layers: dict[str, Layers] = {
            name: [] if setting.default is None else [setting.default()] for name, setting in settings.items()
        }
        before = self.count()
        for part in parts:
            if type(part) is cls:
                entries: Mapping[str, Any] = {name: getattr(part, name) for name in settings}
            else:
                entries = self.mapping(part, key, f"the settings of {cls.__name__} ({', '.join(settings)})")
            self.lose({name: value for name, value in entries.items() if name not in settings}, key, list(settings))
            for name in settings.keys() & entries.keys():
                layers[name].append(entries[name])
        values: dict[str, Any] = {}
        for name, setting in settings.items():
            full = join(key, name)
            if layers[name]:
                values[name] = self.read(setting.declared, layers[name], full)
            else:
                self.keys.append(full)
                owner = vars(cls).get("kind", cls.__name__)
                self.problems.append((full, f"needs a value ({type_text(setting.declared)}): {owner} has no default"))
        # A ValueError of the class itself is a rule in its __post_init__.
        return self.attempt(key, cls, **values) if self.count() == before else None

    def choice(self, group: str, parts: Layers, key: str) -> Any:
        name: str | None = None
        inside: Layers = []
        for part in parts:
            kind, body = self.kind_in(group, part, key)
            if kind is not None and kind != name:
                name, inside = kind, []  # another kind: what was said inside the old one is forgotten
            inside.append(body)
        if name is None:
            self.problems.append((key, f"choose a {group} first, with {key}=NAME{hint('', registry.entries(group))}"))
            return None
        entry = registry.find(group, name)
        if entry is None:
            self.problems.append((key, f"no {group} is named {show(name)}{hint(name, registry.entries(group))}"))
            return None
        if isinstance(entry, type):
            return self.record(entry, inside, key)
        value: object = entry()  # a preset
        return self.record(type(value), [value, *inside], key)

    def kind_in(self, group: str, part: Any, key: str) -> tuple[str | None, Any]:
        """The kind that a part names, if it names one, and what it says inside that kind."""
        own = kind_of(part)
        if own is not None and own[0] == group:
            return own[1], part
        if isinstance(part, str) and not _is_mapping_text(part):
            return str(part), {}
        values = self.mapping(part, key, type_text(Annotated[Any, OneOf(group)]))
        name = values.get("kind")
        if "kind" in values and not isinstance(name, str):
            self.problems.append((join(key, "kind"), f"must be a name{hint('', registry.entries(group))}"))
            return None, {}
        rest = {name: value for name, value in values.items() if name != "kind"}
        return (None if name is None else str(name)), _Edit(rest) if isinstance(part, _Edit) else rest

    def maybe(self, member: Any, parts: Layers, key: str) -> Any:
        nones = [index for index, part in enumerate(parts) if _is_none(part, member)]
        parts = parts[nones[-1] + 1 :] if nones else parts
        if not parts:
            return None
        return self.read(member, parts, key)

    def items(self, declared: Any, shape: Items, parts: Layers, key: str) -> Any:
        value = self.value(declared, parts, key)
        if isinstance(value, str):
            value = self.attempt(key, _listed, value)
        if value is _NOTHING:
            return None
        if not isinstance(value, (list, tuple)):
            self.problems.append((key, f"expected {type_text(declared)}, got {show(value)}"))
            return None
        slots: dict[str, Layers] = {str(place): [item] for place, item in enumerate(cast("list[Any]", value))}
        if not shape.open and len(slots) != len(shape.types):
            self.problems.append((key, f"expected {len(shape.types)} values {type_text(declared)}, got {len(slots)}"))
            return None
        for edit in _edits_of(parts):
            self.lose({place: below for place, below in edit.items() if place not in slots}, key, list(slots))
            for place in slots.keys() & edit.keys():
                slots[place].append(edit[place])
        types = shape.types * len(slots) if shape.open else shape.types
        return tuple(self.read(of, slots[place], join(key, place)) for of, place in zip(types, slots, strict=True))

    def table(self, declared: Any, of: Any, parts: Layers, key: str) -> Any:
        value = _last_value(parts)
        rows: dict[str, Layers] = {}
        if value is not _NOTHING:
            rows = {str(name): [row] for name, row in self.mapping(value, key, type_text(declared)).items()}
        for edit in _edits_of(parts):
            for name, below in edit.items():
                rows.setdefault(name, []).append(below)
        return {name: self.read(of, row, join(key, name)) for name, row in rows.items()}

    def value(self, declared: Any, parts: Layers, key: str) -> Any:
        """The last whole value; _NOTHING and a problem if there are only edits of parts."""
        value = _last_value(parts)
        if value is _NOTHING:
            self.problems.append((key, f"needs a value ({type_text(declared)})"))
        return value

    def mapping(self, part: Any, key: str, expected: str) -> Mapping[str, Any]:
        """The part as a mapping with names for keys; {} and a problem if it is none."""
        if isinstance(part, str) and _is_mapping_text(part):
            part = self.attempt(key, read_yaml, part)
        if not isinstance(part, Mapping):
            if part is _NOTHING:
                return {}
            self.problems.append((key, f"expected {expected}, got {show(part)}"))
            return {}
        values = cast("Mapping[Any, Any]", part)
        for name in values:
            if not isinstance(name, str):
                self.problems.append((key, f"expected names, got the key {show(name)}; put it in quotes"))
        return {name: value for name, value in values.items() if isinstance(name, str)}

    def lose(self, entries: Mapping[str, Any], level: str, names: list[str]) -> None:
        """Adds an unknown key for each entry below a level that has only these names."""
        for name, value in entries.items():
            key = join(level, name)
            while isinstance(value, _Edit):
                ((name, value),) = value.items()
                key = f"{key}.{name}"
            self.unknown.append((key, level, names))


_NOTHING: Any = object()  # the value of a key of which only parts are set


def _edits_of(parts: Layers) -> list[_Edit]:
    return [part for part in parts if isinstance(part, _Edit)]


def _last_value(parts: Layers) -> Any:
    values = [part for part in parts if not isinstance(part, _Edit)]
    return values[-1] if values else _NOTHING


def _is_mapping_text(text: str) -> bool:
    return text.lstrip().startswith("{")


def _listed(text: str) -> Any:
    """The items of `[a, b]` (YAML: may be nested, may be quoted) or of `a,b` (taken as they are)."""
    if text.lstrip().startswith("["):
        return read_yaml(text)
    words = [type(text)(word.strip()) for word in text.split(",")]
    return words if words[-1] else words[:-1]


def _is_none(part: Any, member: Any) -> bool:
    # A quoted "none" where text is allowed is that text; everywhere else it can only mean None.
    if isinstance(part, str) and part.lower() in ("none", "null"):
        is_text = isinstance(shape_of(member), Leaf) and split(member)[0] not in (bool, int, float)
        return isinstance(part, Text) or not is_text
    return part is None
