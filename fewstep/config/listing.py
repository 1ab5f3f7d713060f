"""Lists every setting of a configuration with its type, value and comment, for a person who looks for an override."""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, NamedTuple, cast

from fewstep import registry
from fewstep.config.dump import dump
from fewstep.config.problems import ConfigError, hint, join
from fewstep.config.recipes import build_recipe
from fewstep.config.types import Choice, Maybe, kind_of, settings_of, shape_of, type_text


class Row(NamedTuple):
    """One setting: dotted key, declared type in the user's words, value as plain data, the comment on its line."""

    key: str
    type: str
    value: Any
    comment: str


def fields_help(config: object) -> list[Row]:
    """One row per setting, in order of declaration; a choice gives its kind, then the settings of that kind."""
    return list(_rows(config, dump(config), ""))


def settings_help(word: str, arguments: Sequence[str] = ()) -> list[Row]:
    """One row per setting of what GROUP=NAME names, with its default: method=dmd2, or experiment=NAME for a whole recipe.

    arguments: words NAME=VALUE for the parameters of that recipe.
    """
    group, _, name = word.partition("=")
    if group == "experiment":
        return fields_help(build_recipe(name, arguments))
    names = registry.entries(group)
    if name not in names:
        raise ConfigError(f"ls: {word}: there is no {group} {name!r}{hint(name, names)}")
    entry = names[name]
    if not is_dataclass(entry):
        return fields_help(entry())  # a preset
    rows: list[Row] = []
    for key, setting in settings_of(cast(type, entry)).items():
        value = setting.default() if setting.default is not None else "(required)"
        comment = _comments(cast(type, entry)).get(key, "")
        if is_dataclass(value) and not isinstance(value, type):
            if _has_choice(setting.declared):
                rows.append(Row(key, type_text(setting.declared), (kind_of(value) or ("", ""))[1], comment))
            rows += _rows(value, dump(value), key)
        else:
            rows.append(Row(key, type_text(setting.declared), value, comment))
    return rows


def _rows(config: object, plain: Mapping[str, Any], prefix: str) -> Iterator[Row]:
    comments = _comments(type(config))
    for name, setting in settings_of(type(config)).items():
        if name not in plain:
            continue
        value, data = getattr(config, name), plain[name]
        key, text, comment = join(prefix, name), type_text(setting.declared), comments.get(name, "")
        if is_dataclass(value):
            if _has_choice(setting.declared):
                yield Row(key, text, (kind_of(value) or ("", ""))[1], comment)
            yield from _rows(value, data, key)
        elif isinstance(value, tuple) and any(is_dataclass(item) for item in cast("tuple[Any, ...]", value)):
            for place, item in enumerate(cast("tuple[Any, ...]", value)):
                yield from _rows(item, data[place], f"{key}.{place}")
        else:
            yield Row(key, text, data, comment)


def _has_choice(declared: Any) -> bool:
    shape = shape_of(declared)
    return isinstance(shape, Choice) or (isinstance(shape, Maybe) and _has_choice(shape.declared))


@cache
def _comments(cls: type) -> Mapping[str, str]:
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
            words = list(tokenize.generate_tokens(io.StringIO(source).readline))
        except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # typed at a prompt, or made without a file
            continue
        by_line = {word.start[0]: word.string.lstrip("# ") for word in words if word.type == tokenize.COMMENT}
        for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
                comments[node.target.id] = by_line.get(node.end_lineno) or comments.get(node.target.id, "")
    return comments
