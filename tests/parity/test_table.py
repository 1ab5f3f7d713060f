"""The table of parity tests in docs/models.md names tests that are there."""

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_named_in_the_table_is_there() -> None:
    page = (HERE.parents[1] / "docs" / "models.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)::(\w+)`", page))
    assert len(named) > 30
    there = {
        (path.name, node.name)
        for path in HERE.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert not named - there
