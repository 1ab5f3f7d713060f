"""The declared types a setting may have, and the classes that a choice may take."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fewstep import registry
from fewstep.errors import UserError

C = TypeVar("C", bound=type)
F = TypeVar("F", bound=Callable[[], Any])
R = TypeVar("R")


@dataclass(frozen=True)
class OneOf:
    """Marks a field as a choice among the kinds of a group: `method: Annotated[Method, OneOf("method")]`."""

    group: str


def kind(name: str, *, group: str) -> Callable[[C], C]:
    """A class decorator, outside @dataclass(frozen=True), that makes the class the choice `name` of a group."""

    def decorate(cls: C) -> C:
        _refuse_mutable(cls)
        _refuse_name(name, cls)
        clashes = {"kind", "group"} & {field.name for field in fields(cls)}
        if clashes:
            raise TypeError(f"{cls.__qualname__}: rename the field {clashes.pop()!r}, @kind uses that name")
        if {"kind", "group"} & vars(cls).keys():
            raise TypeError(f"{cls.__qualname__} is a registered kind already; a class has one name")
        registry.register(group, name, cls)
        cls.kind, cls.group = name, group
        return cls

    return decorate


def alike(cls: type[R], other: Any, **more: Any) -> R:  # Any: another dataclass; fields of `cls`
    """A `cls` with the values of those of its fields that `other` has, too, and with `more`."""
    shared = {field.name for field in fields(other)}
    return cls(**{f.name: getattr(other, f.name) for f in fields(cast(Any, cls)) if f.name in shared} | more)


def preset(name: str, *, group: str) -> Callable[[F], F]:
    """A decorator of a function without arguments that returns a value of a kind of the group: the choice `name`.

    A configuration in which it was chosen holds the value; its dump names the kind of that value, and every setting.
    """

    def decorate(make: F) -> F:
        _refuse_name(name, make)
        registry.register(group, name, make)
        return make

    return decorate


def presets(group: str) -> dict[str, Callable[[], Any]]:
    """The functions registered with @preset in a group, by name, sorted."""
    return {name: entry for name, entry in registry.entries(group).items() if not isinstance(entry, type)}


def choices(group: str) -> dict[str, type]:
    """The classes of a group by kind, sorted. Imports every module that is known to register one."""
    return {name: entry for name, entry in registry.entries(group).items() if isinstance(entry, type)}


def kind_of(value: object) -> tuple[str, str] | None:
    """The (group, kind) under which the value's own class is registered; None for other values and for subclasses."""
    own = vars(type(value))
    return (own["group"], own["kind"]) if "group" in own and "kind" in own else None


@dataclass(frozen=True)
class Leaf:
    """bool, int, float, str, Path or a Literal; with constraints, if any, in `declared`."""

    declared: Any


@dataclass(frozen=True)
class Record:
    """A nested frozen dataclass."""

    cls: type


@dataclass(frozen=True)
class Choice:
    """One of the kinds of a group."""

    group: str


@dataclass(frozen=True)
class Items:
    """A tuple: of one type at any length (`open`), or of one type per place."""

    types: tuple[Any, ...]
    open: bool


@dataclass(frozen=True)
class Table:
    """A mapping from str. Given as a whole it replaces the old one: else nothing could be removed."""

    value: Any


@dataclass(frozen=True)
class Maybe:
    """A type, or None."""

    declared: Any


Shape = Leaf | Record | Choice | Items | Table | Maybe


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass: its declared type, and a maker of its default (None: it must be given)."""

    declared: Any
    default: Callable[[], Any] | None


def split(declared: Any) -> tuple[Any, tuple[Any, ...]]:
    """The bare type and its annotations."""
    return (declared.__origin__, declared.__metadata__) if get_origin(declared) is Annotated else (declared, ())


def shape_of(declared: Any) -> Shape:
    """How a declared type is read and dumped; TypeError, for the developer, where that could not be exact."""
    bare, rules = split(declared)
    origin, args = get_origin(bare), get_args(bare)
    groups = [rule.group for rule in rules if isinstance(rule, OneOf)]
    if NoneType in args and groups:  # Annotated[A | B | None, OneOf(...)]: the alternatives are the group's
        return Maybe(Annotated[Any, OneOf(groups[0])])
    if NoneType in args and len(args) == 2:
        (member,) = set(args) - {NoneType}  # a constraint on the whole, Annotated[float | None, Gt(0)], is one on it
        return Maybe(Annotated[(member, *rules)] if rules else member)
    if groups:
        return Choice(groups[0])
    if origin is tuple:
        is_open = len(args) == 2 and args[1] is Ellipsis
        return Items(args[:1] if is_open else args, is_open)
    if origin in (dict, Mapping) and args[0] is str:
        return Table(args[1])
    if isinstance(bare, type) and is_dataclass(bare):
        return Record(bare)
    if origin is Literal or bare in (bool, int, float, str, Path):
        return Leaf(declared)
    raise TypeError(
        f"{type_text(declared)} cannot be a setting; use bool, int, float, str, Path, Literal, tuple[...], "
        'Mapping[str, ...], a frozen dataclass, Annotated[..., OneOf("group")], or one of these | None'
    )


@cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The fields of a dataclass by name; TypeError, for the developer, if it could be mutated or not be dumped."""
    _refuse_mutable(cls)
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise TypeError(f"{cls.__qualname__}: {error}; import it in its module, not under TYPE_CHECKING") from error
    settings: dict[str, Setting] = {}
    for field in fields(cls):
        where = f"{cls.__qualname__}.{field.name}"
        if not field.init:
            raise TypeError(f"{where}: init=False cannot be read back from a file; make it a property")
        try:
            shape_of(hints[field.name])
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from None
        default: Callable[[], Any] | None = None
        if field.default_factory is not MISSING:
            default = field.default_factory
            if isinstance(default(), (list, set)):  # `= []` is refused by dataclasses; replace() would share this one
                raise TypeError(f"{where}: its default can be mutated; use a tuple")
        elif field.default is not MISSING:
            default = _constant(field.default)
        settings[field.name] = Setting(hints[field.name], default)
    return settings


def type_text(declared: Any) -> str:
    """A declared type in the user's words: `float or none`, `kd | dmd2`, `[int, ...]`."""
    bare, rules = split(declared)
    origin, args = get_origin(bare), get_args(bare)
    groups = [rule.group for rule in rules if isinstance(rule, OneOf)]
    if groups:
        names = registry.entries(groups[0])
        return (" | ".join(names) or groups[0]) + (" or none" if NoneType in args else "")
    if origin in (Union, UnionType):
        return " or ".join("none" if arg is NoneType else type_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin is tuple:
        return "[" + ", ".join("..." if arg is Ellipsis else type_text(arg) for arg in args) + "]"
    if origin in (dict, Mapping):
        return "{" + ": ".join(type_text(arg) for arg in args) + "}"
    words = {bool: "true | false", str: "text", Path: "path"}
    return words.get(bare) or getattr(bare, "__name__", str(bare))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _refuse_name(name: str, entry: type | Callable[[], Any]) -> None:
    if not name.isidentifier() or name.lower() in ("none", "null"):
        raise UserError(f"{entry.__qualname__}: {name!r} is not a word that can name a kind")


def _refuse_mutable(cls: type) -> None:
    name = cls.__qualname__
    if not is_dataclass(cls):
        raise TypeError(f"{name} is not a dataclass; decorate it with @dataclass(frozen=True)")
    # Any: the only public way to find out is to try to write to an instance, and there is none yet.
    if not cast(Any, cls).__dataclass_params__.frozen:
        raise TypeError(f"{name} can be mutated; declare it @dataclass(frozen=True)")
