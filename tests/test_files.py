"""Files are written whole, by one module, which follows no link and says in one line what cannot be written."""

from __future__ import annotations

import ast
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fewstep import files
from fewstep.data.files import video
from fewstep.errors import UserError
from fewstep.files import Lines, Locked, WriteError, lock, whole_file, whole_folder

PACKAGE = Path(files.__file__).parent
# What other files may call, and why.
EXCEPTIONS = {
    ("untrusted/text.py", "os.open"): "opened to read",
    ("untrusted/torch_files.py", "zipfile.ZipFile"): "the same",
    ("data/files/video.py", "av.open"): "the partial file of whole_file",
    ("evaluation/report/films.py", "av.open"): "a temporary file, whose bytes go into the page",
    ("evaluation/report/films.py", "tempfile.TemporaryDirectory"): "the same",
    ("data/shards.py", "tempfile.TemporaryDirectory"): "members of a tar for readers that take a path",
    ("data/shards.py", ".write_bytes"): "the same",
    ("prepare/shards.py", "tempfile.TemporaryDirectory"): "a tar that is sent whole to any store",
    ("prepare/shards.py", "tarfile.open"): "the same",
    ("networks/files/distributed.py", "torch.save"): "into an open file of new_file",
    ("networks/weights/convert.py", ".save_config"): "the partial folder of whole_folder",
    ("export/to_diffusers.py", ".save_pretrained"): "the same",
    ("training/checkpoint.py", "dcp.save"): "into the folder of new_folder",
    ("training/log.py", "SummaryWriter"): "into the folder of own_folder, under a name that none can foresee",
    ("toyworld/release.py", ".save_pretrained"): "makes the files that the package ships; no command",
    ("toyworld/release.py", ".chmod"): "the same",
    ("toyworld/demo/plain_diffusers.py", ".mkdir"): "shows a user's own script, which imports nothing of this package",
    ("toyworld/demo/plain_diffusers.py", ".write_text"): "the same",
    ("toyworld/demo/plain_diffusers.py", "av.open"): "the same",
    ("toyworld/demo/plain_diffusers.py", "tempfile.TemporaryDirectory"): "the same",
}
METHODS = {
    *("write_text", "write_bytes", "mkdir", "rename", "unlink", "rmdir", "touch", "symlink_to", "hardlink_to", "chmod"),
    *("save_pretrained", "save_config", "savefig", "tofile"),
}
FUNCTIONS = {"save_file", "SummaryWriter", "NamedTemporaryFile", "mkdtemp", "TemporaryDirectory"}
MODULES = {"shutil": {"disk_usage", "which"}, "tempfile": set[str](), "tarfile": set[str](), "zipfile": set[str]()}  # but for
SAVING = {"np": ("save", "savez", "savetxt"), "torch": ("save",), "dcp": ("save",), "cv2": ("imwrite",)}
OF_OS = {"open", "replace", "rename", "link", "symlink", "remove", "unlink", "rmdir", "mkdir", "makedirs", "truncate", "mkfifo"}


def writes(call: ast.Call) -> str | None:
    """The name of a call that writes, renames or removes a file; None for others."""
    function = call.func
    name = function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    modes = [arg.value for arg in (*call.args, *(word.value for word in call.keywords)) if isinstance(arg, ast.Constant)]
    is_for_writing = any(isinstance(mode, str) and len(mode) < 4 and set(mode) & set("wax+") for mode in modes)
    if owner == "os":
        return f"os.{name}" if name in OF_OS else None
    if owner in MODULES:
        return f"{owner}.{name}" if name not in MODULES[owner] and (owner != "tarfile" or is_for_writing) else None
    if name in SAVING.get(owner, ()):
        return f"{owner}.{name}"
    if isinstance(function, ast.Name):
        return name if name in FUNCTIONS or (name == "open" and is_for_writing) else None
    if name in METHODS or (name == "replace" and len(call.args) == 1 and not call.keywords and owner != "dataclasses"):
        return f".{name}"
    return f"{owner if owner == 'av' else ''}.{name}" if name == "open" and is_for_writing else None


def test_no_other_module_writes_renames_or_removes_a_file() -> None:
    found: dict[tuple[str, str], int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name != "files.py" and (call := writes(node)) is not None:
                found.setdefault((name, call), node.lineno)
    assert {place: line for place, line in found.items() if place not in EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() - found.keys() == set()


WRITERS: dict[str, Callable[[Path], object]] = {  # each writes some kilobytes
    "bytes": lambda path: files.write_bytes(path, b"0" * 9000),
    "json": lambda path: files.write_json(path, list(range(3000))),
    "tensors": lambda path: files.write_tensors(path, {"x": torch.zeros(3000)}),
    "torch": lambda path: files.write_torch(path, {"x": torch.zeros(3000)}),
    "video": lambda path: video.write(path, torch.randint(0, 255, (9, 64, 64, 3), dtype=torch.uint8).numpy(), 16.0),
    "copy": lambda path: files.copy_file(Path(__file__), path),
}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can be larger than 3000 bytes, as on a full disk; the system says so in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", list(WRITERS))
def test_what_does_not_fit_leaves_the_earlier_file_and_nothing_else(tmp_path: Path, small_files: None, name: str) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")
    with pytest.raises(WriteError) as caught:
        WRITERS[name](path)
    assert str(caught.value).startswith(f"{path}: cannot be written: File too large (")
    assert str(caught.value).endswith("MiB are free). Free some space and run the same command again")
    assert caught.value.errno == errno.EFBIG
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and path.read_text() == "earlier"


@pytest.mark.parametrize("name", list(WRITERS))
def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The second comes when the first has written all of its file and has not renamed it. Others may read the result."""
    path, rename = tmp_path / "file", files._rename

    def second(partial: Path, target: Path) -> None:
        monkeypatch.setattr(files, "_rename", rename)
        WRITERS[name](path)
        rename(partial, target)

    monkeypatch.setattr(files, "_rename", second)
    WRITERS[name](path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_line_that_does_not_fit_is_not_there_in_part(tmp_path: Path, small_files: None) -> None:
    log = Lines(tmp_path / "log")
    for _ in range(2):
        log.add("x" * 999)
    with pytest.raises(WriteError, match=r"log: cannot be written"):
        log.add("y" * 1999)
    log.add("z")
    log.close()
    assert (tmp_path / "log").read_text().split("\n") == ["x" * 999, "x" * 999, "z", ""]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space and run the same command again"),  # no inodes
        (errno.EDQUOT, "Free some space and run the same command again"),
        (errno.EROFS, "Change its permissions, or choose another place"),
        (errno.EACCES, "Change its permissions, or choose another place"),
        (errno.ENAMETOOLONG, "Choose a shorter name"),
    ],
)
def test_what_cannot_be_made_is_one_message_with_the_path_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def fail(path: Path, flags: int) -> int:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(files, "_open", fail)
    for write in (files.write_text, files.write_json):
        with pytest.raises(WriteError) as caught:
            write(tmp_path / "file", "text")
        assert str(caught.value).startswith(f"{tmp_path / 'file'}: cannot be written: ") and str(caught.value).endswith(advice)
    with pytest.raises(WriteError, match=advice):
        Lines(tmp_path / "log")


def test_an_error_of_reading_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "out"):
        (tmp_path / "nothing").read_text()


def test_links_are_not_followed(tmp_path: Path) -> None:
    """At the name of a file, of its partial file, of a lock, of a log, of a folder."""
    victim, place = tmp_path / "victim", tmp_path / "place"
    victim.write_text("mine")
    place.mkdir()
    for name in ("file", ".file.partial", "log", ".lock", ".folder.partial"):
        (place / name).symlink_to(victim)
    (place / "checkpoints").symlink_to(tmp_path)
    files.write_text(place / "file", "ours")
    with whole_folder(place / "folder") as partial:
        files.write_text(partial / "file", "ours")
    for use in (lambda: Lines(place / "log"), lambda: lock(place / ".lock").__enter__()):
        with pytest.raises(UserError, match="Links are not followed here: remove it"):
            use()
    with pytest.raises(UserError, match="is a link, which is not followed"):
        files.own_folder(place / "checkpoints")
    assert victim.read_text() == "mine" and not (place / "file").is_symlink()
    assert (place / "file").read_text() == (place / "folder" / "file").read_text() == "ours"
    with pytest.raises(UserError, match="is a device or a pipe"):
        files.write_text(Path("/dev/null"), "ours")
    assert Path("/dev/null").is_char_device()


def test_a_name_that_is_not_utf_8_is_written_with_escapes(tmp_path: Path) -> None:
    files.write_text(tmp_path / "page.html", os.fsdecode(b"a\xff.mp4"))
    log = Lines(tmp_path / "log")
    log.add(os.fsdecode(b"a\xff.mp4"))
    log.close()
    assert (tmp_path / "page.html").read_bytes() == b"a\\udcff.mp4" and (tmp_path / "log").read_bytes() == b"a\\udcff.mp4\n"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_place_without_a_name_of_its_own_is_refused(name: str) -> None:
    for write in (whole_folder, whole_file, files.restore):
        with pytest.raises(UserError, match=r"name of its own|is a folder"):
            write(Path(name)).__enter__()  # pyright: ignore[reportAttributeAccessIssue]  # of the last, which raises before


def test_tensors_of_any_layout_are_read_by_safetensors_as_they_were(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "expanded": torch.tensor(1.5).expand(1),
        "many": torch.tensor(2.5).expand(3, 2),
        "scalar": torch.tensor(7),
        "part": whole[:, 1:, ::2],
        "transposed": whole.mT,
        "empty": torch.zeros(0, 3),
        "later": whole[1],
        "half": whole.bfloat16()[:, 0],
        "flags": whole[0] > 5,
        "one": whole[1:2, :1, :1].transpose(0, 2),
    }
    files.write_tensors(tmp_path / "x.safetensors", tensors)
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_two_writers_of_one_file_do_not_take_it_from_each_other(tmp_path: Path) -> None:
    path = tmp_path / "about.json"
    with whole_file(path) as first:
        first.write_text("whole")
        with whole_file(path) as second:
            second.write_text("whole")
        assert path.read_text() == "whole"
    assert path.read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["about.json"]
    with pytest.raises(RuntimeError), whole_file(path) as third:
        third.write_text("half")
        raise RuntimeError
    assert path.read_text() == "whole" and len(list(tmp_path.iterdir())) == 1
    with whole_folder(tmp_path / "folder"), pytest.raises(Locked, match="another process writes here"):
        whole_folder(tmp_path / "folder").__enter__()


KILLED = """
import os, sys
from pathlib import Path
from fewstep import files
place, after, rename = Path(sys.argv[1]), int(sys.argv[2]), files._rename
def counted(path, target):
    global after
    if after == 0:
        os._exit(9)
    after -= 1
    rename(path, target)
files._rename = counted
with files.whole_folder(place / "folder", replaces=True) as partial:
    for name in ("a", "b"):
        files.write_text(partial / name, "new")
"""


@pytest.mark.parametrize("after", range(5))  # renames: two files, the folder aside, the new one in its place
def test_a_folder_that_is_replaced_is_there_whenever_a_kill_comes(tmp_path: Path, after: int) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("old")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path, str(after)], env=environment, check=False)
    files.restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == (["mine"] if after < 4 else ["a", "b"])
    with whole_folder(folder, replaces=True) as partial:
        files.write_text(partial / "a", "again")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and [path.name for path in folder.iterdir()] == ["a"]


def test_a_hidden_folder_that_another_process_removes_at_once_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being made and being locked it looks like one that a killed process left there."""
    opened, seen = files._open, list[Path]()

    def gone(path: Path, flags: int) -> int:
        if flags & os.O_DIRECTORY and not seen:
            seen.append(path)
            path.rmdir()
        return opened(path, flags)

    monkeypatch.setattr(files, "_open", gone)
    with whole_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("y")
    assert (tmp_path / "a/x").read_text() == "y" and len(seen) == 1
