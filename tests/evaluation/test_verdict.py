"""Verdicts of two files of scores: the sentences that people read in the terminal and in the report."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from score_records import record

from fewstep.cli import main
from fewstep.evaluation.verdict import advice, conclusion, table, verdicts

TEACHER = {"sampler": "unipc", "num_calls": 8}


def test_one_score(tmp_path: Path) -> None:
    few = record(tmp_path, "few", TEACHER, frechet=2.0, motion=1.0)
    worse, same = record(tmp_path, "worse", frechet=2.9, motion=9.0), record(tmp_path, "same", frechet=2.8, motion=9.0)
    (verdict,) = verdicts(worse, few)  # a score without a better end judges nobody
    assert verdict.outcome == "worse"
    assert str(verdict) == (
        "frechet: the student is WORSE than its teacher in 8 calls (2.9 against 2, lower is better, difference 0.068 to 1.7)"
    )
    (verdict,) = verdicts(same, few)  # within 1.96 sqrt(2) 0.3
    assert verdict.outcome == "same"
    assert "the student is as good, as far as these clips tell, as its teacher in 8 calls (2.8 against 2" in str(verdict)
    (verdict,) = verdicts(few, worse)
    assert verdict.outcome == "better" and "the student is better than worse (2 against 2.9" in str(verdict)
    assert verdicts(record(tmp_path, "none", frechet=None, motion=1.0), few) == []
    worse.write_text(worse.read_text().replace("2.9", '"2.9"'))
    with pytest.raises(ValueError, match=r"worse.json: scores.frechet.value: must be .* got '2.9'. Evaluate the model again"):
        verdicts(worse, few)


def test_a_student_whose_legend_lacks_a_score_is_judged_by_the_others(tmp_path: Path) -> None:
    student, other = record(tmp_path, "student", frechet=2.0), record(tmp_path, "other", frechet=4.0)
    content = json.loads(student.read_text())
    student.write_text(json.dumps(content | {"legend": [row for row in content["legend"] if row["name"] != "frechet"]}))
    assert [one.outcome for one in verdicts(student, other)] == ["better"]


def test_two_equal_models_are_told_apart_in_one_score_of_twenty(tmp_path: Path) -> None:
    """Each value is drawn around the same truth with the spread that its file states."""
    draws = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)) * 0.3 + 5
    outcomes = []
    for mine, other in draws.tolist():
        files = (record(tmp_path, name, frechet=value) for name, value in (("student", mine), ("kd", other)))
        outcomes += [one.outcome for one in verdicts(*files)]
    assert 4 < sum(outcome != "same" for outcome in outcomes) < 27  # of 300: 15 expected, deviation 3.8


def test_what_tells_nothing_is_no_verdict(tmp_path: Path) -> None:
    few = record(tmp_path, "few", TEACHER, frechet=2.0, recall=0.0)
    noted = record(tmp_path, "noted", {"notes": ["frechet is undetermined: 8 clips."]}, frechet=9.0, recall=0.0)
    assert verdicts(noted, few) == []
    assert conclusion([]) == "No score tells the two apart: score more clips (--num-eval, --num)."


SAME = "As far as 8 clips can tell, the student is as good as its teacher in 8 calls: no score tells the two apart."
WORSE = "Against its teacher in 8 calls the student is worse in frechet."
MIXED = "Against its teacher in 8 calls the student is better in recall, and worse in frechet."
NOT_RANKED = " By 1 of 2 scores 8 clips do not tell them apart."


@pytest.mark.parametrize(
    ("frechet", "recall", "sentence"), [(2.1, 0.6, SAME), (9.0, 0.6, WORSE + NOT_RANKED), (9.0, 1.6, MIXED)]
)
def test_the_conclusion_says_what_the_intervals_allow(tmp_path: Path, frechet: float, recall: float, sentence: str) -> None:
    few = record(tmp_path, "few", TEACHER, frechet=2.0, recall=0.5)
    assert conclusion(verdicts(record(tmp_path, "student", frechet=frechet, recall=recall), few)) == sentence


def test_a_training_that_made_the_student_worse_is_told_with_what_to_do(tmp_path: Path) -> None:
    student, kd = record(tmp_path, "student", frechet=9.0), record(tmp_path, "kd", frechet=2.0)
    (sentence,) = advice(verdicts(student, kd))
    assert sentence == (
        "The last training made the student worse in frechet than kd: train it longer, or with a lower learning rate "
        "(optim.lr=..)."
    )
    assert advice(verdicts(student, record(tmp_path, "few", TEACHER, frechet=2.0))) == [] == advice(verdicts(kd, student))


def test_the_table_names_calls_and_leaves_out_who_is_not_there(tmp_path: Path) -> None:
    files = {"a": record(tmp_path, "few", TEACHER, frechet=2.0), "b": record(tmp_path, "one", {"num_calls": 1}, frechet=2.5)}
    text = table(files | {"c": tmp_path / "missing.json"}, {"a": "teacher in few steps", "b": "student", "c": "no"})
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == ["teacher in few steps, 8 calls", "student, 1 call"]
    assert text.splitlines()[2].endswith("2.5 +- 0.3")


def test_the_page_and_its_record_have_the_verdict_and_the_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [record(tmp_path, "few", TEACHER, frechet=2.0, recall=0.5), record(tmp_path, "kd", frechet=2.0, recall=0.5)]
    files.append(record(tmp_path, "student", frechet=9.0, recall=0.6))
    words = ["report", *map(str, files), "--out", str(tmp_path / "page.html")]
    told = ["--verdict", "student:few", "--verdict", "student:kd", "--warning", "The clips <are> large."]
    assert main([*words, *told]) == 0
    page = (tmp_path / "page.html").read_text()
    text = html.unescape(page)
    for scores in (verdicts(files[2], files[0]), verdicts(files[2], files[1])):
        assert all(one.sentence in text for one in scores) and conclusion(scores) in text
    assert "The clips &lt;are&gt; large." in page and advice(verdicts(files[2], files[1]))[0] in text
    assert page.index('id="verdict"') < page.index('id="scores"')
    saved = json.loads(page.split('id="numbers">')[1].split("</script>")[0])
    assert saved["warnings"] == ["The clips <are> large.", *advice(verdicts(files[2], files[1]))]
    assert [one["outcome"] for one in saved["verdicts"]] == ["worse", "same", "worse", "same"]
    assert saved["verdicts"][0]["sentence"] == str(verdicts(files[2], files[0])[0])
    for wrong, message in (("student", "is written STUDENT:OTHER"), ("student:fed", "no file of scores is called fed")):
        assert main([*words, "--verdict", wrong]) == 2 and message in capsys.readouterr().err
