"""Names become known when they are first asked for, wherever a file that registers them lies."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from fewstep import registry
from fewstep.config import OneOf, choices, parse
from fewstep.errors import UserError

FILE = """
from dataclasses import dataclass
from fewstep.config import kind

@kind("{name}", group="{group}")
@dataclass(frozen=True)
class Mine:
    size: int = 3
"""


@pytest.fixture
def group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A group that no other test knows, gone again after the test."""
    name = f"registry_{request.node.name}"
    monkeypatch.setattr(registry, "_ENTRIES", {group: dict(known) for group, known in registry._ENTRIES.items()})
    monkeypatch.setattr(registry, "_SOURCES", {group: list(names) for group, names in registry._SOURCES.items()})
    return name


def package(folder: Path, group: str, *names: str) -> str:
    """A package with a module for each name, one of them in a folder of its own."""
    root = folder / f"package_of_{group}"
    (root / "inner").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "inner" / "__init__.py").touch()
    for n, name in enumerate(names):
        (root / ("inner" if n == 0 else "") / f"{name}.py").write_text(FILE.format(name=name, group=group))
    return root.name


def test_modules_are_imported_until_the_name_is_there(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    name = package(tmp_path, group, "first", "second", "third")
    registry.provide(group, name)
    assert name not in sys.modules
    assert registry.find(group, "second").kind == "second"
    assert f"{name}.inner.first" in sys.modules and f"{name}.third" not in sys.modules
    assert registry.find(group, "fourth") is None
    assert list(choices(group)) == ["first", "second", "third"] and group in registry.groups()


def test_a_file_beside_the_others_can_be_named_in_a_configuration(
    group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.provide(group, package(tmp_path, group, "mine"))

    @dataclass(frozen=True)
    class Settings:
        choice: Any

    Settings.__annotations__["choice"] = Annotated[Any, OneOf(group)]
    assert parse(Settings, {"choice": {"kind": "mine", "size": 5}}).choice.size == 5


def test_a_module_that_fails_to_import_is_tried_again(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / f"alone_{group}.py"
    file.write_text("import no_such_module_anywhere\n")
    registry.provide(group, file.stem)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            registry.find(group, "mine")


def test_one_name_for_two_things_is_refused(group: str) -> None:
    registry.register(group, "same", Path)
    registry.register(group, "same", Path)  # its module was reloaded
    with pytest.raises(UserError, match=r"'same' is both pathlib\S*Path and pathlib\S*PurePath: give one of them another name"):
        registry.register(group, "same", __import__("pathlib").PurePath)
