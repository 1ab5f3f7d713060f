"""A stage of the demo: lanes side by side, commands of a lane in order, a failure that ends its lane alone, no second run."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewstep.distill.stages import Stage, claim, run


def says(file: Path, text: str, then: str = "") -> tuple[str, ...]:
    return (sys.executable, "-c", f"open({str(file)!r}, 'a').write({text!r}); {then}")


def test_lanes_keep_their_order_and_a_done_stage_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    slow = (sys.executable, "-c", f"import time\nwhile open({str(b)!r}).read() != '12': time.sleep(.05)")
    b.write_text("")
    stage = Stage("both", "two lanes", ((slow, says(a, "1")), (says(b, "1"), says(b, "2"))))  # the first waits for the second
    run(stage, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1", "12")
    run(stage, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1", "12")
    assert "done earlier" in capsys.readouterr().out


def test_a_command_that_fails_ends_its_lane_and_the_stage_is_to_be_run_again(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    fails = says(a, "1", "raise SystemExit(3)")
    stage = Stage("one", "one of two fails", ((fails, says(a, "2")), (says(b, "1"), says(b, "2"))))
    with pytest.raises(ValueError, match="stage 'one' failed"):
        run(stage, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1", "12")
    mended = Stage("one", "now it does not", ((says(a, "x"),), (says(b, "x"),)))
    run(mended, tmp_path, 0)
    assert (a.read_text(), b.read_text()) == ("1x", "12x")


@pytest.mark.parametrize(
    ("number", "said"),
    [(9, "ended by signal 9 (Killed). The system sends it where memory is short"), (15, "ended by signal 15 (Terminated)")],
)
def test_a_command_that_a_signal_ended_is_not_silent(
    number: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = says(tmp_path / "a", "1", f"import os; os.kill(os.getpid(), {number})")
    with pytest.raises(ValueError, match="stage 'one' failed, see above"):
        run(Stage.of("one", "is killed", command), tmp_path, 0)
    assert f"    {said}\n" in capsys.readouterr().out


def marks(out: Path, *stages: Stage) -> None:
    for order, stage in enumerate(stages):
        run(stage, out, order)


def test_a_stage_is_done_anew_where_the_files_that_it_reads_have_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = ["a", "b"]
    first = Stage.of("text", "about", says(tmp_path / "text", "1"), reads=lambda: " ".join(clips))
    road = [first, Stage.of("train", "about", says(tmp_path / "train", "1"))]
    for _ in range(2):
        claim(road, tmp_path)
        marks(tmp_path, *road)
    assert capsys.readouterr().out.count("done earlier") == 2
    clips.append("c")
    claim(road, tmp_path)
    assert "the files of stage 'text' have changed: clips and captions, or the teacher's weights" in capsys.readouterr().out
    marks(tmp_path, *road)
    assert (tmp_path / "text").read_text() == (tmp_path / "train").read_text() == "11"


def test_what_has_changed_is_said_and_done_anew_with_all_after_it_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def road(iters: int) -> list[Stage]:
        folders = {name: tmp_path / name for name in ("pairs", "kd", "dmd2")}
        makes = "import os, sys; os.makedirs(sys.argv[1], exist_ok=True); open(sys.argv[1] + '/made', 'a').write(sys.argv[2])"
        words = {"pairs": "4", "kd": str(iters), "dmd2": "9"}
        return [
            Stage(name, "about", (((sys.executable, "-c", makes, str(folder), words[name]),),), resumes=(folder,))
            for name, folder in folders.items()
        ]

    claim(road(2), tmp_path)
    marks(tmp_path, *road(2))
    capsys.readouterr()
    claim(road(2), tmp_path)
    marks(tmp_path, *road(2))
    assert capsys.readouterr().out.count("done earlier") == 3
    claim(road(3), tmp_path)
    said = capsys.readouterr().out
    assert said == (
        "the commands of stage 'kd' have changed: 2 -> 3\n"
        f"  it is done anew, and so is dmd2; kept: {tmp_path}/kd as kd.001, {tmp_path}/dmd2 as dmd2.001\n"
    )
    marks(tmp_path, *road(3))
    assert capsys.readouterr().out.count("done earlier") == 1
    made = {path.parent.name: path.read_text() for path in tmp_path.glob("*/made")}
    assert made == {"pairs": "4", "kd.001": "2", "dmd2.001": "9", "kd": "3", "dmd2": "9"}
    claim(road(5), tmp_path, ["dmd2"])  # kd is not among those that are to be run
    claim(road(2), tmp_path)
    assert f"{tmp_path}/kd as kd.002" in capsys.readouterr().out and (tmp_path / "kd.002" / "made").read_text() == "3"


def test_a_stage_killed_between_two_others_that_are_forgotten_is_forgotten_again(tmp_path: Path) -> None:
    """The changed stage is forgotten last, and a half-done one after it does not go on with what came of the old one."""
    one, other = (Stage.of("one", "", says(tmp_path / "a", text)) for text in "xy")
    later = Stage("later", "", ((says(tmp_path / "b", "1"),),), resumes=(tmp_path / "half",))
    marks(tmp_path, one)
    (tmp_path / "half").mkdir()  # later was killed
    claim([other, later], tmp_path)
    assert not (tmp_path / "half").exists() and (tmp_path / "half.001").is_dir()
    assert not list((tmp_path / "stages").iterdir())


def test_another_folder_and_another_way_to_write_a_path_are_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def road(out: str, num: str) -> list[Stage]:
        return [Stage.of("one", "", ("OUTPUT_ROOT=" + out, "true", f"{out}/clips", "--num", num))]

    monkeypatch.chdir(tmp_path)
    marks(Path("work"), *road("work", "4"))
    (tmp_path / "deeper").mkdir()
    for folder, out in (("deeper", "../work"), (".", str(tmp_path / "work")), (".", "./work")):
        monkeypatch.chdir(tmp_path / folder)
        claim(road(out, "4"), Path(out))
        assert Path(out, "stages", "one.json").is_file()
    capsys.readouterr()
    claim(road("work", "5"), Path("work"))
    assert "have changed: --num 4 -> --num 5\n" in capsys.readouterr().out


def test_lines_of_two_lanes_are_never_glued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line reaches the terminal in one piece: between two pieces the other lane could speak."""
    pieces: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=pieces.append, flush=lambda: None))
    counts = (sys.executable, "-c", "for n in range(3): print(n)")
    run(Stage.of("both", "two lanes", counts, counts), tmp_path, 0)
    spoken = [piece for piece in pieces if "[" in piece]
    assert len(spoken) == 8 and all(piece.endswith("\n") and piece.count("\n") == 1 for piece in spoken), pieces
