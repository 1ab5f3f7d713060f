"""Collects the problems of a configuration, so that one error names all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any, cast

from fewstep.errors import UserError

Problem = tuple[str, str]  # (dotted key, what is wrong and what to do)
WARN = "warn:"


class ConfigError(UserError):
    """Every problem of a configuration, one per line, each line starting with its dotted key."""

    def __init__(self, problems: str | Sequence[Problem]):
        super().__init__(problems)  # the argument as given, so that the error survives pickling between processes
        self.problems: tuple[Problem, ...] = (("", problems),) if isinstance(problems, str) else tuple(problems)

    def __str__(self) -> str:
        problems = self.args[0]
        return problems if isinstance(problems, str) else "\n".join(_line(key, message) for key, message in self.problems)


def check(config: object) -> list[str]:
    """The warnings of a configuration, one line each; ConfigError with every problem at once.

    Each nested dataclass may have a method `problems()`, which yields pairs (key relative to itself, message). A key that
    starts with "warn:" makes a warning. A key names a setting of the dataclass or of one inside it, so a rule between two
    dataclasses belongs to the one that holds both.
    """
    errors: list[Problem] = []
    warnings: list[str] = []
    for prefix, holder in _holders(config, ""):
        for key, message in holder.problems():
            full = join(prefix, key.removeprefix(WARN))
            if key.startswith(WARN):
                warnings.append(_line(full, message))
            else:
                errors.append((full, message))
    if errors:
        raise ConfigError(errors)
    return warnings


def join(prefix: str, name: str) -> str:
    """The dotted key of a name below a prefix; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def hint(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest existing one, and all of a few names; else the shortest."""
    existing = sorted(names)
    if not existing:
        return "; there are none"
    near = get_close_matches(name, existing, n=1)
    shortest = existing if len(existing) <= 12 else [*sorted(existing, key=len)[:12], "..."]
    listed = f"there are: {', '.join(shortest)}"
    if not near:
        return f"; {listed}"
    return f"; did you mean {near[0]}?" + (f" ({listed})" if len(existing) <= 12 else "")


def nearest_keys(key: str, level: str, names: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Up to three existing dotted keys for an unknown one: corrected at its level, of that name elsewhere, spelled alike."""
    wrong, _, rest = key.removeprefix(f"{level}." if level else "").partition(".")
    corrected = [join(join(level, name), rest) for name in get_close_matches(wrong, names, n=1)]
    last = key.rpartition(".")[2]
    elsewhere = [other for other in keys if other.rpartition(".")[2] == last]
    elsewhere.sort(key=lambda other: (other.count("."), -SequenceMatcher(None, key, other).ratio()))
    ranked = [other for other in corrected if other in keys] + elsewhere[:2] or get_close_matches(key, keys, n=1)
    return [other for other in dict.fromkeys(ranked) if other != level or not names]


def _line(key: str, message: str) -> str:
    return " ".join((f"{key}: {message}" if key else message).split())


def _holders(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:  # Any: a walk over whatever a config holds
    if is_dataclass(value):
        if hasattr(value, "problems"):  # optional by contract: most dataclasses have no rule of their own
            yield prefix, value
        below = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, tuple):
        below = [(str(index), item) for index, item in enumerate(cast("tuple[Any, ...]", value))]
    elif isinstance(value, Mapping):
        below = list(cast("Mapping[str, Any]", value).items())
    else:
        return
    for name, item in below:
        yield from _holders(item, join(prefix, name))
