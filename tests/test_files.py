"""A file that several processes write at once: each is whole, whoever ends first."""

from pathlib import Path

import pytest

from fewstep.files import whole_file


def test_two_writers_of_one_file_do_not_take_it_from_each_other(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    with whole_file(path, shared=True) as first:
        first.write_text("whole")
        with whole_file(path, shared=True) as second:
            second.write_text("whole")
        assert path.read_text() == "whole"
    assert path.read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["about.json"]
    with pytest.raises(RuntimeError), whole_file(path, shared=True) as third:
        third.write_text("half")
        raise RuntimeError
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
