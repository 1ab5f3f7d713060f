"""Writes mission.md from mission.csv: python docs/draw_mission.py. A row: number | document | capability | state | proof.

A proof is a test below tests/ (FILE or FILE::NAME), a page (docs/..), or a command; of a row that does not work it is what is
missing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
DOCUMENTS = {
    "T1": "Distilling Cosmos-Transfer1 Models",
    "P2": "Cosmos Predict2-Distill Codebase",
    "G": "Distillation (guide of the Cosmos Cookbook)",
    "P1": "Post-training diffusion-based Video2World models (Cosmos-Predict1)",
    "FG": "Knowledge Distillation Methods (FastGen)",
}
STATES = ("works", "partly", "open")
HEAD = """# The mission, row by row

```bash
python docs/draw_mission.py      # writes this page from docs/mission.csv
```

Five documents describe what fewstep is for; each row is a capability, command, format or setting that one of them names. A row
works if its proof does: a test, a page, or a command. `tests/test_mission.py` checks that every proof exists; the tests run in
`make test` and `make test-all`. Of other rows the last column says what is missing.
"""


@dataclass(frozen=True)
class Row:
    number: int
    document: str
    capability: str
    state: str
    proof: str


def rows() -> list[Row]:
    lines = (FOLDER / "mission.csv").read_text(encoding="utf-8").splitlines()
    split = [line.split("|") for line in lines]
    return [Row(int(number), *rest) for number, *rest in split]


def page() -> str:
    table = rows()
    counts = Counter((row.document, row.state) for row in table)
    text = [HEAD, "| document | rows | works | partly | open |\n|---|---|---|---|---|"]
    for name, title in (*DOCUMENTS.items(), ("", "all")):
        of = [
            sum(n for (document, state), n in counts.items() if name in ("", document) and state == wanted) for wanted in STATES
        ]
        text.append(f"| {title} | {sum(of)} | {' | '.join(map(str, of))} |")
    for name, title in DOCUMENTS.items():
        text.append(f"\n## {title}\n\n| # | what | state | proof, or what is missing |\n|---|---|---|---|")
        text += [f"| {row.number} | {row.capability} | {row.state} | {shown(row)} |" for row in table if row.document == name]
    return "\n".join(text) + "\n"


def shown(row: Row) -> str:
    """The proof with its file as a link, a command as code."""
    if row.proof.startswith("docs/"):
        words = row.proof.split(" ", 1)
        name = words[0].removeprefix("docs/")
        return " ".join([f"[{name}]({name})", *words[1:]])
    if row.state != "works":
        return row.proof
    if row.proof.startswith(("fewstep ", "torchrun ")):
        return f"`{row.proof}`"
    file, _, name = row.proof.partition("::")
    return f"[{file}](../tests/{file})" + (f" `{name}`" if name else "")


if __name__ == "__main__":
    (FOLDER / "mission.md").write_text(page(), encoding="utf-8")
