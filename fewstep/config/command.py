"""The command line of a run: words to a Command, a Command to one complete configuration."""

import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from fewstep.config.problems import ConfigError, Problem, check, hint
from fewstep.config.reader import read_layers
from fewstep.config.recipes import build_recipe, find_recipe, recipes
from fewstep.config.text import read_text, read_yaml_mapping
from fewstep.errors import UserError

T = TypeVar("T")

_YAML = (".yaml", ".yml")
_FLAGS = ("--config", "--dryrun")
_ORIGINAL = re.compile(r"(^|/)(cosmos_(predict|transfer)\d|fastgen)/(.+/)?configs?/(.+/)?\w+\.py$")


@dataclass(frozen=True)
class Command:
    """The parsed words of a command line."""

    experiment: str | None = None  # name of a recipe
    files: tuple[str, ...] = ()  # .py to import, .yaml to lay over the recipe, in this order
    overrides: tuple[str, ...] = ()  # KEY=VALUE
    dryrun: bool = False

    def repeated(self) -> list[str]:
        """One line for each setting that is given more than once with different values: the last one counts."""
        values: dict[str, list[str]] = {}
        for word in self.overrides:
            key, _, value = word.partition("=")
            values.setdefault(key, []).append(value)
        return [
            f"{key} is given {len(texts)} times; the last one counts: {key}={texts[-1]}, not {', '.join(texts[:-1])}"
            for key, texts in values.items()
            if len(set(texts)) > 1
        ]


def read_command(argv: Sequence[str]) -> Command:
    """Parses the words of a command line. Raises ConfigError with every problem.

    Understands `experiment=NAME`, `run.yaml`, `KEY=VALUE`, `--config FILE`, `--config=FILE` and `--dryrun`. A lone
    `-` or `--` is ignored anywhere: the launchers of the Cosmos and FastGen tools need it before the overrides.
    """
    problems: list[Problem] = []
    names: list[str] = []
    files: list[str] = []
    overrides: list[str] = []
    dryrun = False
    words = [word for word in argv if word not in ("-", "--")]
    while words:
        word = words.pop(0)
        if word == "--dryrun":
            dryrun = True
        elif word == "--config" and words and _is_file(words[0]):
            files.append(words.pop(0))
        elif word.startswith("--config=") and word != "--config=":
            files.append(word.removeprefix("--config="))
        elif word in ("--config", "--config="):
            problems.append((word, "needs a file: --config FILE.py or --config FILE.yaml"))
        elif word.startswith("-"):
            near = get_close_matches(word.partition("=")[0], _FLAGS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(_FLAGS)}; settings are KEY=VALUE"
            problems.append((word, f"no such option; {hint}"))
        elif word.startswith("experiment="):
            names.append(word.removeprefix("experiment="))
        elif _is_file(word) and word.endswith(".py"):
            problems.append((word, f"is a program, which is run only where it is named as one: --config {word}"))
        elif _is_file(word):
            files.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            problems.append((word, f"neither KEY=VALUE nor a .yaml or .py file; did you mean experiment={word}?"))
    if len(set(names)) > 1:
        problems.append(
            ("experiment", f"given twice, as {' and as '.join(dict.fromkeys(names))}: settings belong to one of them; keep one")
        )
    if problems:
        raise ConfigError(problems)
    return Command(names[0] if names else None, tuple(files), tuple(overrides), dryrun)


def load_file(path: str | Path) -> Mapping[str, Any]:
    """The content of a .yaml file, for `parse`; {} for a .py file, which is imported for the recipes and kinds it registers."""
    path = Path(path)
    text = read_text(path)
    if path.suffix in _YAML:
        return read_yaml_mapping(text, str(path))
    if path.suffix != ".py":
        raise ConfigError([(str(path), "must be a .py or a .yaml file")])
    _import(path.resolve(), str(path))
    return {}


def compose(command: Command, run_type: type[T]) -> T:
    """The complete, checked run: its recipe, the yaml files over it, the overrides over both.

    Recipes inside the package must have been imported by the caller; `check` gives the warnings once more.
    """
    ignored = originals(command)
    data = [layer for layer in map(load_file, (file for file in command.files if file not in ignored)) if layer]
    if command.experiment is None and ignored:
        wrong = f"{ignored[0]} is a configuration of the original code; say which run it is here{hint('', recipes())}"
        raise ConfigError([("experiment", wrong)])
    if command.experiment is None and not data:
        raise ConfigError([("experiment", f"which run? Give experiment=NAME or a .yaml file{hint('', recipes())}")])
    if command.experiment is None:
        config = read_layers(run_type, data, command.overrides)
    else:
        recipe = find_recipe(command.experiment)
        arguments, overrides = recipe.split(command.overrides)
        recipe_run = build_recipe(command.experiment, arguments)
        if not isinstance(recipe_run, run_type):
            wrong = f"{command.experiment} makes a {type(recipe_run).__name__}, not a {run_type.__name__}"
            raise ConfigError([("experiment", wrong)])
        config = read_layers(
            type(recipe_run), [recipe_run, *data], overrides, also=[each.name for each in fields(recipe.parameters)]
        )
    check(config)
    return config


def originals(command: Command) -> tuple[str, ...]:
    """The files of the command that are configurations of Cosmos or FastGen, by their place in those projects.

    They have no effect: what they set up is a recipe, chosen with experiment=NAME, so that a command written for those tools
    can be pasted. A file that mentions fewstep is the user's own, whatever its place.
    """
    return tuple(file for file in command.files if _ORIGINAL.search(file) and "fewstep" not in _text(file))


def _text(file: str) -> str:
    try:
        return read_text(Path(file))
    except ConfigError:
        return ""


def _is_file(word: str) -> bool:
    # runs/lr=1/config.yaml is a file although it looks like KEY=VALUE; data.index=clips.yaml is KEY=VALUE.
    return Path(word).suffix in (*_YAML, ".py") and ("=" not in word or Path(word).is_file())


def _import(path: Path, name: str) -> None:
    digest = sha256(str(path).encode(errors="surrogateescape")).hexdigest()[:8]
    module_name = f"fewstep_config_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path  # a .py always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: dataclasses look up the module of their annotations there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[module_name]
        raise ConfigError([(f"{error.filename or name}:{error.lineno}", f"is not Python: {error.msg}")]) from error
    except Exception as error:  # the file is the user's: anything may come out of it
        del sys.modules[module_name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        advice = "; put the folder of that module on PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        where = f"{name}:{lines[-1]}" if lines else name
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "  # for the log of an error of theirs
        raise ConfigError([(where, f"{kind}{error}{advice}")]) from error
