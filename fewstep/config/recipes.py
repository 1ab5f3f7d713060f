"""Recipes: functions without arguments that return one complete configuration, by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from fewstep.config.problems import ConfigError, hint
from fewstep.config.reader import read_layers
from fewstep.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])

_RECIPES: dict[str, "Recipe"] = {}


@dataclass(frozen=True)
class Recipe:
    """A registered recipe: what makes it, the first line of its docstring, and where it stands."""

    name: str
    make: Callable[[], Any]
    doc: str
    module: str


def recipe(name: str) -> Callable[[F], F]:
    """A decorator that registers a function, callable without arguments, under `experiment=name`."""

    def register(make: F) -> F:
        if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _parameters(make)):
            raise TypeError(f"recipe {name!r}: give every parameter of {make.__qualname__} a default")
        other = _RECIPES.get(name)
        if other is not None and _address(other.make) != _address(make):  # the same address: its module was reloaded
            raise UserError(f"recipe {name!r} is {_address(other.make)} already; give {_address(make)} another name")
        doc = (inspect.getdoc(make) or "").partition("\n")[0]
        _RECIPES[name] = Recipe(name, make, doc, make.__module__)
        return make

    return register


def recipes() -> dict[str, Recipe]:
    """The registered recipes by name, sorted; those of modules not imported yet are missing."""
    return dict(sorted(_RECIPES.items()))


def build_recipe(name: str) -> Any:
    """A new configuration that shares nothing with any other, checked against its declared types."""
    if name not in _RECIPES:
        raise ConfigError([("experiment", f"no recipe is named {name!r}{hint(name, _RECIPES)}")])
    made = _RECIPES[name].make()
    if isinstance(made, type) or not is_dataclass(made):
        raise TypeError(f"recipe {name!r} returned {made!r}; it must return a frozen dataclass")
    try:
        return read_layers(type(made), [made])  # read anew: a mapping kept in a module constant is copied here
    except ConfigError as error:
        raise ConfigError([(key, f"{text} (set by recipe {name})") for key, text in error.problems]) from None


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(make).parameters.values())


def _address(make: Callable[..., Any]) -> str:
    return f"{make.__module__}.{make.__qualname__}"
