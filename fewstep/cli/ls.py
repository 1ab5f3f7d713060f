"""`fewstep ls`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.app import app
from fewstep.cli.options import JSON, UsageError, option

# What `fewstep ls` lists, and the group of each.
LISTS = {
    "recipes": "recipe", "methods": "method", "networks": "network", "data": "data", "roles": "role", "heads": "head",
    "controls": "control", "paths": "path", "times": "times", "previews": "preview", "scorers": "scorer",
    "features": "features", "text_encoders": "text_encoder", "codecs": "codec", "rewards": "reward",
    "sample_weights": "sample_weight", "guardrails": "guardrail", "upsamplers": "upsampler", "judges": "judge",
    "annotators": "annotator", "consistency_schedules": "consistency_schedule", "derivatives": "derivative",
    "samplers": "sampler",
}  # fmt: skip


@app.command(name="ls")
def list_names(
    what: Annotated[str, typer.Argument(help=f"One of {', '.join(LISTS)}, settings, runs.")] = "recipes",
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="GROUP=NAME", help="With settings: method=dmd2, experiment=NAME, ..; with runs: a folder."),
    ] = None,
    by: Annotated[str | None, option("--by", "With runs: score to sort by. Default: the first that previews measure.")] = None,
    highest: Annotated[bool, option("--highest", "With runs: the highest score is the best.")] = False,
    as_json: Annotated[bool, option("--json", JSON)] = False,
) -> None:
    """List the names that a configuration can use, or every setting of one of them: fewstep ls settings method=dmd2.

    fewstep ls runs [FOLDER] --by SCORE  lists the run folders below OUTPUT_ROOT, the best first
    """
    if what == "runs":
        _print_runs(names or [], by, highest, as_json)
        return
    if what not in (*LISTS, "settings"):
        raise UsageError(f"there is no list of {what!r}; there are {', '.join(LISTS)}, settings and runs.")
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


def _print_runs(places: Sequence[str], by: str | None, highest: bool, as_json: bool) -> None:
    """Run folders with their method, progress and first scores, sorted by one."""
    if len(places) > 1 or (places and not Path(places[0]).is_dir()):
        raise UsageError(f"fewstep ls runs [FOLDER]: {' '.join(places)} is no folder.")
    from fewstep.environment import output_root
    from fewstep.training.records import best_first, find_runs, number, score_of, table

    root = Path(places[0]) if places else output_root()
    records = list(find_runs(root))
    score = score_of(records, by)
    ordered = best_first(records, score, highest) if score else records
    if as_json:
        rows = [
            {"folder": str(r.folder), "state": r.state, "step": r.step, "settings": dict(r.settings), "values": dict(r.values)}
            for r in ordered
        ]
        print(json.dumps(rows))
        return
    if not records:
        print(f"no runs in {root}")
        return
    columns: list[str] = list(dict.fromkeys([score or "", *(name for r in records for name in r.scores)]))[:3]
    lines = [("run", "method", "step", "state", *columns)]
    for record in ordered:
        cells = (record.name, record.settings.get("method.kind", "-"), str(record.step), record.state)
        lines.append((*cells, *(number(record.values.get(name)) for name in columns)))
    print(table(lines))


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
