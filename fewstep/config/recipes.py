"""Recipes: functions without arguments that return one complete configuration, by name."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from fewstep import registry
from fewstep.config.problems import ConfigError, hint
from fewstep.config.reader import read_layers

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Recipe:
    """A registered recipe: the function that returns it, the first line of its docstring, and its module."""

    name: str
    make: Callable[[], Any]
    doc: str
    module: str

    @classmethod
    def of(cls, name: str, make: Callable[[], Any]) -> "Recipe":
        return cls(name, make, (inspect.getdoc(make) or "").partition("\n")[0], make.__module__)


def recipe(name: str) -> Callable[[F], F]:
    """A decorator that registers a function, callable without arguments, under `experiment=name`."""

    def decorate(make: F) -> F:
        if any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _parameters(make)):
            raise TypeError(f"recipe {name!r}: give every parameter of {make.__qualname__} a default")
        registry.register("recipe", name, make)
        return make

    return decorate


def recipes() -> dict[str, Recipe]:
    """Every recipe by name, sorted. Imports every module that is known to register one."""
    return {name: Recipe.of(name, make) for name, make in registry.entries("recipe").items()}


def build_recipe(name: str) -> Any:
    """A new configuration that shares nothing with any other, checked against its declared types."""
    make = registry.find("recipe", name)
    if make is None:
        raise ConfigError([("experiment", f"no recipe is named {name!r}{hint(name, recipes())}")])
    made = make()
    if isinstance(made, type) or not is_dataclass(made):
        raise TypeError(f"recipe {name!r} returned {made!r}; it must return a frozen dataclass")
    try:
        return read_layers(type(made), [made])  # read anew: a mapping kept in a module constant is copied here
    except ConfigError as error:
        raise ConfigError([(key, f"{text} (set by recipe {name})") for key, text in error.problems]) from None


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(make).parameters.values())
