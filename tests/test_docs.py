"""What the documents promise is there: every file they name, and the verb, options, recipe and settings of every command."""

import ast
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from fewstep import TOY
from fewstep.cli import main
from fewstep.cli.app import app
from fewstep.config import build_recipe, choices, compose, fields_help, read_command, recipes
from fewstep.inference import coming_from_cosmos
from fewstep.inference import command as generate_command
from fewstep.training.plan.request import split_words
from fewstep.training.run import Run
from fewstep.training.search import Request
from fewstep.training.trials import plan_sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
OWN_PATH = re.compile(r"(?<![\w./-])((?:docs|tests|fewstep|benchmarks|examples)/[\w./-]*\w)")
THEIRS = {"examples/inference.py", "trainer.fsdp"}  # of Cosmos-Predict2.5 and FastGen
START = re.compile(r"(?:^|\s)(?:torchrun\s.*-m\s+fewstep(?:\.train)?|python -m fewstep(?:\.\w+)*|fewstep)(?=\s)")


def commands(page: Path) -> Iterator[str]:
    """The commands of a page, in blocks and within lines, without what follows them: comments and arrows to what is written."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in (*lines, *(" ".join(span.replace("\\|", "|").split()) for span in spans)):
        command = re.split(r"\s+#|\s->", line)[0].strip()
        if START.match(command) and "`" not in command:
            yield command


def verbs(group: Any) -> dict[str, set[str]]:  # Any: typer carries a click of its own
    """Of each verb its options; of `prepare text` under its two words."""
    found: dict[str, set[str]] = {}
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            found |= {f"{name} {inner}": options for inner, options in verbs(one).items()}
        else:
            found[name] = {"--help"} | {
                option for parameter in one.params for option in (*parameter.opts, *parameter.secondary_opts)
            }
    return found


VERBS = verbs(typer.main.get_command(app))
VERBS["generate"] |= generate_command._parser().options()
for known in VERBS.values():
    known |= {option.replace("-", "_").replace("__", "--", 1) for option in known}  # either is understood
VERBS["generate"] |= {f"--{name}" for name in (*coming_from_cosmos.ALIASES, *coming_from_cosmos.WITHOUT_EFFECT)}
VERBS["train"] |= {"--config", "--dryrun"}
COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)})


def split(command: str) -> tuple[str, list[str]]:
    """The verb, and the words after it; of `python -m` the module."""
    start = START.match(command)
    assert start is not None, command
    rest = shlex.split(command[start.end() :])
    if start[0].endswith("fewstep.train"):
        return "train", rest
    if "python -m fewstep." in start[0]:
        return start[0].split()[-1], rest
    size = 2 if rest and any(verb.startswith(f"{rest[0]} ") for verb in VERBS) and len(rest) > 1 else 1
    return " ".join(rest[:size]), rest[size:]


def test_the_page_of_options_is_current() -> None:
    spec = spec_from_file_location("list_options", ROOT / "docs" / "list_options.py")
    assert spec is not None and spec.loader is not None
    listing = sys.modules[spec.name] = module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(listing)
    assert listing.PAGE.read_text() == listing.page(), "run: python docs/list_options.py"


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    named = {path for path in OWN_PATH.findall(text) if "." in Path(path).name} - THEIRS
    missing = [path for path in named if not (ROOT / path).exists()]
    for target, _, heading in (link.partition("#") for link in re.findall(r"\]\(([^):]+)\)", text)):
        other = page.parent / target if target else page
        if not other.exists() or (heading and heading not in headings(other)):
            missing.append(f"{target}#{heading}")
    assert not missing, missing


def headings(page: Path) -> set[str]:
    """As links name them: lower case, words joined by dashes."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def links(page: Path) -> set[Path]:
    """The pages that a page links to."""
    targets = (link.partition("#")[0] for link in re.findall(r"\]\(([^):]+)\)", page.read_text()))
    return {(page.parent / target).resolve() for target in targets if target.endswith(".md")}


def test_the_index_links_to_every_page_and_the_readme_to_the_index() -> None:
    index = ROOT / "docs/index.md"
    assert index in links(ROOT / "README.md")
    lost = {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - {index} - links(index)
    assert not lost, lost


def test_every_file_that_a_docstring_or_comment_names_is_there() -> None:
    """Whole paths, and paths within the package that begin with one of its rooms (`networks/contract.py`)."""
    rooms = "|".join(sorted(path.name for path in (ROOT / "fewstep").iterdir() if (path / "__init__.py").exists()))
    within = re.compile(rf"(?<![\w./-])((?:{rooms})/[\w./-]*\.py)\b")
    missing = []
    for file in sorted(
        path for folder in ("fewstep", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py")
    ):
        text = file.read_text()
        paths = [path for path in OWN_PATH.findall(text) if "." in Path(path).name] + [
            f"fewstep/{path}" for path in within.findall(text)
        ]
        missing += [f"{file.relative_to(ROOT)}: {path}" for path in paths if not (ROOT / path).exists()]
    assert not missing, missing


def test_the_numbers_of_the_readme_are_those_of_the_kept_demo() -> None:
    kept = sorted(ROOT.glob("docs/results/demo_default_*.json"))[-1]
    scores = json.loads(kept.read_text())
    rows = []
    for model in ("real", "teacher", "teacher_4calls", "4step", "teacher_1call", "1step"):
        distance, spread = (scores[f"frechet_{model}{part}"] for part in ("", "_spread"))
        speed = scores.get(f"clips_per_s_{model}")
        shown = "-" if speed is None else f"{speed:.2g}"
        rows.append(f"{abs(round(distance, 1)):.1f} +- {spread:.1f} | {scores[f'adherence_{model}']:.2f} | {shown} |")
    readme = (ROOT / "README.md").read_text()
    assert kept.name in readme
    missing = [row for row in rows if row not in readme]
    assert not missing, missing


def test_the_numbers_of_the_causal_students_are_those_of_the_kept_demo() -> None:
    scores = json.loads((ROOT / "docs/results/demo_causal_2026-11-30.json").read_text())
    page = (ROOT / "docs/demo.md").read_text()

    def shown(name: str, digits: int) -> str:
        return f"{scores[name]:.{digits}f} +- {scores[f'{name}_spread']:.{digits}f}"

    for who in ("kd_causal", "sf", "consistency", "sf_consistency"):
        ratio = shown(f"frechet_ratio_{who}", 2) if who.startswith("sf") else ""
        (row,) = (line for line in page.splitlines() if f"| {shown(f'frechet_{who}', 1)} | {ratio} |" in line)
        assert f"| {scores[f'recall_{who}']:.2f} | {scores[f'adherence_{who}']:.2f} |".replace(" 0.", " .") in row
        long = [shown(f"long_{name}_{who}", 2) for name in ("drift", "sink_rise", "sink_similarity")]
        assert row.endswith(f"{' | '.join(long)} |")
    assert all(f"{scores[f'core_seconds_{who}']:.0f} with" in page for who in ("sf", "sf_consistency"))


def test_the_strip_of_frames_is_the_one_that_its_script_draws() -> None:
    spec = spec_from_file_location("strip", ROOT / "docs/pictures/strip.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = module.strip(sorted(ROOT.glob("docs/results/demo_long_*.html"))[-1])
    kept = Image.open(ROOT / "docs/pictures/strip.png")
    left = module.MARGIN + module.LABEL_WIDTH  # the labels depend on the version of the font library, the frames do not
    top = module.MARGIN + module.TITLE_HEIGHT
    area = (left, top, *kept.size)
    assert drawn.size == kept.size and drawn.crop(area).tobytes() == kept.convert("RGB").crop(area).tobytes()


def test_the_log_has_dated_entries_of_at_most_ten_lines_newest_first() -> None:
    entries = re.split(r"^## ", (ROOT / "docs/log.md").read_text(), flags=re.MULTILINE)[1:]
    dates = [entry[:11] for entry in entries]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d:", date) for date in dates) and dates == sorted(dates, reverse=True)
    lengths = {entry.splitlines()[0]: len([line for line in entry.splitlines()[1:] if line]) for entry in entries}
    assert max(lengths.values()) <= 10, lengths


@pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])
def test_what_a_page_imports_of_ours_is_there(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewstep"):
                module = import_module(node.module or "")
                missing = [
                    name.name
                    for name in node.names
                    if not hasattr(module, name.name) and find_spec(f"{node.module}.{name.name}") is None
                ]
                assert not missing, f"{node.module}: {missing}"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_names_a_verb_and_options_that_are_there(page: str, command: str) -> None:
    verb, words = split(command)
    if verb.startswith("fewstep."):
        spec = find_spec(verb)
        assert spec is not None and spec.origin is not None and "__main__" in Path(spec.origin).read_text()
        return
    known = VERBS.get(verb) or set().union(*(VERBS[name] for name in VERBS if name.startswith(f"{verb} ")))
    assert known, f"no verb {verb!r}; there are {sorted(VERBS)}"
    said = {word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
    assert said <= known, said - known


def of_recipes() -> list[tuple[str, str]]:
    """Commands that name a recipe of ours: a name in capitals stands for any."""
    return [(page, line) for page, line in COMMANDS if re.search(r"\bexperiment=[a-z]", line) and "my_" not in line]


@pytest.mark.parametrize(("page", "command"), of_recipes(), ids=[f"{page}: {command}" for page, command in of_recipes()])
def test_a_run_that_a_page_starts_can_be_composed(page: str, command: str) -> None:
    verb, words = split(command)
    if verb == "sweep":
        request = Request(1) if "--trials" in words else None
        assert plan_sweep(read_command([word for word in words if "=" in word]), Run, request).keys
        return
    words = [f"teacher={TOY}" if word.startswith("teacher=") else word for word in words]  # the reader's own is not here
    settings = [word for word in words if word not in ("...", "a.b=c", "--json")]
    assert compose(read_command(split_words(settings)[0]), Run).job.name


def settings() -> tuple[set[str], dict[str, set[str]]]:
    """The keys of all recipes' runs, and of `method.`, `data.`, `networks.ROLE.` what any of their kinds has."""
    ours = {
        name: [f"teacher={TOY}"] if "teacher=" in found.usage else []
        for name, found in recipes().items()
        if found.module.startswith("fewstep.recipes.")  # not those of tests
    }
    groups = {"method": ("method",), "data": ("data",), "networks": ("role", "network")}
    kinds = {room: [cls for group in of for cls in choices(group).values()] for room, of in groups.items()}
    named = {room: {field.name for cls in found for field in fields(cls)} for room, found in kinds.items()}
    return {row.key for name, words in ours.items() for row in fields_help(build_recipe(name, words))}, named


def test_every_setting_that_a_page_names_is_there() -> None:
    known, kinds = settings()
    rooms = sorted({key.split(".")[0] for key in known if "." in key})
    named = re.compile(rf"(?<![\w./-])((?:{'|'.join(rooms)})(?:\.[a-z_0-9]+)+)(?![\w/])")
    wrong = [
        f"{page.name}: {key}"
        for page in PAGES
        for key in named.findall(page.read_text())
        if not key.endswith((".md", ".py")) and key not in THEIRS
        if not any(other == key or other.startswith(f"{key}.") for other in known)
        if key.split(".")[-1] not in kinds.get(key.split(".")[0], set())
    ]
    assert not wrong, wrong


LISTS = sorted({command for _, command in COMMANDS if split(command)[0] == "ls"})


@pytest.mark.parametrize("command", LISTS)
def test_a_list_that_a_page_names_has_rows(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", *split(command)[1]]) == 0
    assert capsys.readouterr().out


def test_the_targets_of_make_are_there() -> None:
    there = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    said = {name for page in PAGES for name in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)}
    assert said and said <= there, said - there
