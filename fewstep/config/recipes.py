"""Recipes: functions that return one complete configuration, by name.

A recipe may have parameters with defaults, which a command line sets beside the settings of the configuration:

    @recipe("kd")
    def kd(teacher: str = "", steps: int = 4) -> Run: ...

    fewstep train experiment=kd teacher=wan2.1 steps=2 optim.lr=1e-5

They are read as settings are, by their annotations. What a recipe made of them is all in the configuration it returns: its
config.yaml runs again without them.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cached_property
from typing import Any, TypeVar, get_type_hints

from fewstep import registry
from fewstep.config.problems import ConfigError, hint
from fewstep.config.reader import read_layers
from fewstep.config.types import settings_of

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Recipe:
    """A registered recipe: the function that returns it, the first line of its docstring, and its module."""

    name: str
    make: Callable[..., Any]
    doc: str
    module: str

    @classmethod
    def of(cls, name: str, make: Callable[..., Any]) -> "Recipe":
        return cls(name, make, (inspect.getdoc(make) or "").partition("\n")[0], make.__module__)

    @cached_property
    def parameters(self) -> type[Any]:  # Any: made of the function
        """The annotated parameters of the function, as the fields of a frozen dataclass."""
        hints = get_type_hints(self.make, include_extras=True) if _parameters(self.make) else {}
        listed = [(p.name, hints[p.name], field(default=p.default)) for p in _parameters(self.make) if p.name in hints]
        return make_dataclass(f"arguments_of_{self.name}", listed, frozen=True)

    @property
    def usage(self) -> str:
        """Its parameters as they are written on a command line: "teacher= steps=4"; "" if it has none."""
        return " ".join(f"{each.name}={'' if each.default in (None, ()) else each.default}" for each in fields(self.parameters))

    def split(self, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words KEY=VALUE of a command line that set parameters of this recipe, and the others."""
        names = {each.name for each in fields(self.parameters)}
        arguments = [word for word in overrides if word.partition("=")[0] in names]
        return arguments, [word for word in overrides if word not in arguments]


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


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; ConfigError if there is none."""
    make = registry.find("recipe", name)
    if make is None:
        raise ConfigError([("experiment", f"no recipe is named {name!r}{hint(name, recipes())}")])
    return Recipe.of(name, make)


def build_recipe(name: str, arguments: Sequence[str] = ()) -> Any:
    """A new configuration that shares nothing with any other, checked against its declared types.

    arguments: words NAME=VALUE for the recipe's parameters.
    """
    recipe = find_recipe(name)
    values = read_layers(recipe.parameters, [], arguments)
    run = recipe.make(**{each.name: getattr(values, each.name) for each in fields(values)})
    if isinstance(run, type) or not is_dataclass(run):
        raise TypeError(f"recipe {name!r} returned {run!r}; it must return a frozen dataclass")
    hidden = {each.name for each in fields(values)} & settings_of(type(run)).keys()
    if hidden:
        raise TypeError(f"recipe {name!r}: rename its parameter {hidden.pop()!r}, which is a setting of what it returns")
    try:
        return read_layers(type(run), [run])  # read anew: a mapping kept in a module constant is copied here
    except ConfigError as error:
        raise ConfigError([(key, f"{text} (set by recipe {name})") for key, text in error.problems]) from None


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(make).parameters.values())
