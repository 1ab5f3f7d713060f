"""`fewstep ls`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fewstep.cli.app import app
from fewstep.cli.options import JSON, UsageError, option

# What `fewstep ls` lists, and the group of each.
LISTS = {
    "recipes": "recipe", "methods": "method", "networks": "network", "data": "data", "roles": "role", "heads": "head",
    "controls": "control", "paths": "path", "times": "times", "previews": "preview", "scorers": "scorer",
    "features": "features", "text_encoders": "text_encoder", "codecs": "codec", "rewards": "reward",
    "sample_weights": "sample_weight", "guardrails": "guardrail", "upsamplers": "upsampler",
    "consistency_schedules": "consistency_schedule", "derivatives": "derivative",
}  # fmt: skip


@app.command(name="ls")
def list_names(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(LISTS)}, settings.")] = "recipes",
    names: Annotated[
        list[str] | None, typer.Argument(metavar="GROUP=NAME", help="With settings: method=dmd2, experiment=NAME, ..")
    ] = None,
    as_json: Annotated[bool, option("--json", JSON)] = False,
) -> None:
    """List the names that a configuration can use, or every setting of one of them: fewstep ls settings method=dmd2."""
    if what not in (*LISTS, "settings"):
        raise UsageError(f"there is no list of {what!r}; there are {', '.join(LISTS)} and settings.")
    if (what == "settings") != bool(names):
        raise UsageError("fewstep ls settings GROUP=NAME, for instance method=dmd2 or experiment=analytic_kd.")
    from fewstep.config import choices, presets, settings_help

    if what == "networks":
        from fewstep.networks import support

        print(json.dumps(support.as_json()) if as_json else support.text())
        return
    if what == "settings":
        recipe = next((name for name in names or () if name.startswith("experiment=")), None)
        arguments = [] if recipe is None else [name for name in names or () if name != recipe]  # of the recipe
        settings = [row for name in ([recipe] if recipe else names or ()) for row in settings_help(name, arguments)]
        rows = {
            row.key: f"{row.type} = {row.value}".ljust(32) + (f"  # {row.comment}" if row.comment else "") for row in settings
        }
        if as_json:
            print(json.dumps([row._asdict() for row in settings]))
            return
    elif what == "recipes":
        _print_recipes(as_json)
        return
    else:
        group = LISTS[what]
        rows = {name: _about(entry) for name, entry in sorted((choices(group) | presets(group)).items())}
    if as_json:
        print(json.dumps([{"name": name, "about": about} for name, about in rows.items()]))
        return
    _print_rows(rows)


def _print_rows(rows: Mapping[str, str], indent: str = "") -> None:
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{indent}{name:{width}}  {text}".rstrip())


def _print_recipes(as_json: bool) -> None:
    """Recipes by what they are for, the most useful first; those that only a file of the user's registers come last."""
    from fewstep.config import recipes
    from fewstep.recipes import GROUPS, NAMES

    entries = recipes()
    abouts = {name: f"{recipe.doc}  {recipe.usage}".rstrip() for name, recipe in entries.items()}
    groups = {title: names for title, names in (*GROUPS.items(), ("Others", tuple(sorted(entries.keys() - NAMES)))) if names}
    if as_json:
        rows = [{"name": name, "about": abouts[name], "group": title} for title, names in groups.items() for name in names]
        print(json.dumps(rows))
        return
    for number, (title, names) in enumerate(groups.items()):
        print(f"{title}\n" if number == 0 else f"\n{title}\n")
        _print_rows({name: abouts[name] for name in names}, "  ")


def _about(cls: Any) -> str:  # Any: a class, or a function that returns a preset
    """The first line of its docstring; of its file's docstring, where it has none of its own."""
    doc = cls.__doc__ or ""
    if doc.startswith(f"{cls.__name__}("):  # what dataclass writes when there is no docstring
        doc = sys.modules[cls.__module__].__doc__ or ""
    return doc.strip().split("\n")[0]
