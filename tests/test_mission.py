"""docs/mission.md: as many rows as the documents have, and every proof is there."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_docs import VERBS, split

ROOT = Path(__file__).parents[1]


def mission() -> Any:
    spec = spec_from_file_location("draw_mission", ROOT / "docs/draw_mission.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["draw_mission"] = module  # its dataclass looks up the module of its annotations
    spec.loader.exec_module(module)
    return module


MISSION = mission()


def test_the_page_is_that_of_the_table() -> None:
    assert (ROOT / "docs/mission.md").read_text() == MISSION.page()
    assert [row.number for row in MISSION.rows()] == list(range(1, 191))
    assert {row.document for row in MISSION.rows()} == set(MISSION.DOCUMENTS)
    assert {row.state for row in MISSION.rows()} <= set(MISSION.STATES)


@pytest.mark.parametrize("row", MISSION.rows(), ids=lambda row: str(row.number))
def test_a_row_that_works_has_its_proof(row: Any) -> None:
    proof = row.proof
    if row.state != "works":
        assert proof
    elif proof.startswith(("fewstep ", "torchrun ")):
        verb, words = split(proof)
        assert verb in VERBS and {word for word in words if word.startswith("--")} <= VERBS[verb], proof
    elif proof.startswith("docs/"):
        assert (ROOT / proof).is_file(), proof
    else:
        file, _, name = proof.partition("::")
        text = (ROOT / "tests" / file).read_text()
        assert not name or re.search(rf"^def {name}\b", text, flags=re.MULTILINE), proof
