"""Runs as frozen dataclasses: declare, override, suggest, dump. Knows no method and no network; imports no torch.

A setting is a field of a frozen dataclass; its type says how text becomes a value, the comment on its line says what it
is for. A field that is one of several classes is declared `Annotated[Method, OneOf("method")]`. `@kind("kd", group="method")`
registers such a class, `@preset("dmd2_fastgen", group="method")` a function that returns a value of one under a name of its
own, and `@recipe("name")` a function that returns one complete run, which may have parameters with defaults.
"""

from fewstep.config.command import Command, compose, load_file, originals, read_command
from fewstep.config.dump import dump, from_yaml, to_yaml
from fewstep.config.listing import Row, fields_help, settings_help
from fewstep.config.problems import ConfigError, check
from fewstep.config.reader import apply_overrides, parse
from fewstep.config.recipes import Recipe, build_recipe, find_recipe, recipe, recipes
from fewstep.config.types import OneOf, alike, choices, kind, preset, presets

__all__ = [
    "Command",
    "ConfigError",
    "OneOf",
    "Recipe",
    "Row",
    "alike",
    "apply_overrides",
    "build_recipe",
    "check",
    "choices",
    "compose",
    "dump",
    "fields_help",
    "find_recipe",
    "from_yaml",
    "kind",
    "load_file",
    "originals",
    "parse",
    "preset",
    "presets",
    "read_command",
    "recipe",
    "recipes",
    "settings_help",
    "to_yaml",
]
