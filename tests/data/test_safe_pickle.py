"""Against pickle itself on honest files; against hand-made attacks, random bytes and mutated files on the others."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewstep.data.safe_pickle import UnsafePickle, load, loads
from fewstep.untrusted.pickles import _HANDLERS, Reader

_NUMBERS = np.random.default_rng(0)

HONEST = {
    "t5 list": [_NUMBERS.standard_normal((7, 16)).astype(np.float16)],
    "noise": _NUMBERS.standard_normal((4, 3, 5, 6)).astype(np.float32),
    "seg": [
        {
            "phrase": "a red ball",
            "segmentation_mask_rle": {"data": {"size": [64, 1], "counts": b"01\xffd\x00"}, "mask_shape": (4, 4, 4)},
        }
    ],
    "keypoint": {0: [{"body-keypoints": np.ones((133, 3)), "hand-keypoints": np.zeros((42, 3), np.float32)}], 1: []},
    "transposed": np.arange(24.0).reshape(2, 3, 4).transpose(1, 0, 2),
    "fortran": np.asfortranarray(np.arange(12).reshape(3, 4)),
    "views": np.arange(20)[::3],
    "empty": np.zeros((0, 3), np.int16),
    "no axes": np.array(2.5),
    "bools": np.array([True, False]),
    "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.float16("nan")],
    "shared": (lambda array: [array, array, {"again": array}])(np.arange(3)),
    "plain": [
        None,
        True,
        0,
        -1,
        300,
        70_000,
        2**40,
        -(10**50),
        1.5,
        "text",
        "x" * 300,
        "\u00e9\u2603\U0001f600",
        b"",
        b"\xff\x00",
    ],
    "containers": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, []),
    "keys": {1: 2, "a": 3, (1, "b"): 4, None: 5, b"c": 6, 1.5: 7},
    "ordered": OrderedDict(b=1, a=[2, 3]),
    "long list": [[i, float(i)] for i in range(2_500)],  # several batches of APPENDS
}
TENSORS = {
    "negative prompt": {"t5_text_embeddings": torch.arange(6).reshape(2, 3).to(torch.bfloat16)},
    "strided": torch.arange(12, dtype=torch.float64).reshape(3, 4).t()[1:],
    "two on one storage": (lambda t: [t[:2], t[1:]])(torch.arange(4.0)),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False]),
    "needs gradient": torch.ones(2, requires_grad=True),
}


def same(a: object, b: object) -> bool:
    """Equal in type, dtype, shape and value, NaN included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", HONEST)
def test_what_pickle_reads_is_read_alike(name: str, protocol: int) -> None:
    assert same(loads(pickle.dumps(HONEST[name], protocol)), HONEST[name])


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_detached_on_the_cpu(name: str, protocol: int) -> None:
    read = loads(pickle.dumps(TENSORS[name], protocol))
    assert same(read, TENSORS[name])
    leaves = read if isinstance(read, list) else [read["t5_text_embeddings"] if isinstance(read, dict) else read]
    assert not any(leaf.requires_grad for leaf in leaves)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_both_numpy_generations(protocol: int) -> None:
    data = pickle.dumps(HONEST["keypoint"], protocol)
    old = data.replace(b"numpy._core.", b"numpy.core.")
    if protocol >= 4:  # the length byte before the module's name, and the frame around it
        old = old.replace(b"\x8c\x16numpy.core.multiarray", b"\x8c\x15numpy.core.multiarray")
        old = old.replace(b"\x8c\x13numpy.core.numeric", b"\x8c\x12numpy.core.numeric")
    assert old != data
    assert same(loads(old), HONEST["keypoint"])


def test_a_pickle_of_python_2_is_refused_in_one_line() -> None:
    """As Python 2 with numpy 1 wrote it: byte strings for text and for the elements."""
    data = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85U\x01b\x87Rq\x02(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x08\x00\x00\x80?\x00\x00\x00@tb."
    )
    with pytest.raises(UnsafePickle, match=r"the opcode SHORT_BINSTRING.*save those alone, as npy, safetensors or json"):
        loads(data)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [{1, 2}, frozenset("a"), bytearray(b"xy"), 1 + 2j, np.array(["ab", "c"]), np.array([b"ab"]), np.array([1j]), np.str_("a")],
    ids=repr,
)
def test_what_no_file_of_a_data_set_holds_is_refused_in_one_line(value: object, protocol: int) -> None:
    if protocol == 5 and isinstance(value, bytearray):
        assert loads(pickle.dumps(value, protocol)) == value  # an opcode, in which numpy writes its elements
        return
    with pytest.raises(UnsafePickle, match="Only numbers, text"):
        loads(pickle.dumps(value, protocol))


def test_swapped_bytes_become_native_and_arrays_are_their_own() -> None:
    swapped = np.arange(3, dtype=">f4")
    read = loads(pickle.dumps([swapped, np.arange(1_000)], 2))
    assert read[0].dtype == np.dtype("f4") and np.array_equal(read[0], swapped)
    assert all(array.flags.writeable and array.flags.owndata for array in read)


def test_paths_files_and_names_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "clip_04.pickle"
    path.write_bytes(pickle.dumps([1, 2]))
    assert load(path) == load(str(path)) == loads(path.read_bytes()) == [1, 2]
    path.write_bytes(b"cos\nsystem\n.")
    with pytest.raises(UnsafePickle, match=r"clip_04\.pickle: refused at byte 0: it asks for 'os\.system'"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing.pickle")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"abc", "damaged"),
        (pickle.dumps([1, 2])[:-1], "damaged"),
        (pickle.dumps([1, 2]) + b"tail", "4 bytes follow"),
        (b"PK\x03\x04zip", "zip archive"),
        (b"\x93NUMPY\x01", "npy"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_pickle_says_so(data: bytes, message: str) -> None:
    with pytest.raises(UnsafePickle, match=message):
        loads(data)


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *args: object):
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.args


class Stateful:
    def __init__(self) -> None:
        self.field = 1


def _torch_pickle_inside(payload: bytes) -> bytes:
    return pickle.dumps(Calls(torch.storage._load_from_bytes, payload))


def _legacy_storage(payload: bytes) -> bytes:
    saved = io.BytesIO()
    torch.save(Calls(os.system, "touch hacked"), saved, _use_new_zipfile_serialization=False)
    return saved.getvalue() + payload


_WITH_METADATA = np.dtype("f4", metadata={"call": 1})
HOSTILE = {
    "os.system": (pickle.dumps(Calls(os.system, "touch hacked")), r"'posix\.system'"),
    "eval": (pickle.dumps(Calls(eval, "open('hacked', 'w')"), 0), r"eval'"),
    "getattr": (pickle.dumps(Calls(getattr, "text", "format"), 4), r"'builtins\.getattr'"),
    "nested name": (b"\x80\x04\x8c\x08builtins\x8c\x0fbytes.__class__\x93.", r"'builtins\.bytes\.__class__'"),
    "dotted name of numpy": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", r"'numpy\.ndarray\.__init__'"),
    "import": (pickle.dumps(Calls(__import__, "os")), "__import__"),
    "subprocess": (pickle.dumps(Calls(subprocess.Popen, ["touch", "hacked"])), r"subprocess\.Popen"),
    "numpy.load": (pickle.dumps(Calls(np.load, "x.npy")), r"numpy"),
    "torch.load": (pickle.dumps(Calls(torch.load, "x.pt")), r"torch\.serialization\.load"),
    "an instance": (pickle.dumps(Stateful()), "Stateful"),
    "an instance, old": (pickle.dumps(Stateful(), 0), r"copy_reg\._reconstructor|copyreg"),
    "INST": (b"(Vx\nios\nsystem\n.", "INST"),
    "OBJ": (b"(cos\nsystem\no.", r"os\.system"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n(K\x09K\x09t\x81.", r"it calls numpy\.ndarray"),
    "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
    "persistent id": (b"Pwho\n.", "PERSID"),
    "binary persistent id": (b"\x80\x02K\x01Q.", "BINPERSID"),
    "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    "objects": (pickle.dumps(np.array([1, "a", None], object)), "Python objects"),
    "objects, old": (pickle.dumps(np.array([{}], object), 0), "Python objects"),
    "list for elements": (
        pickle.dumps(np.arange(2, dtype="i1"), 3).replace(b"C\x02\x00\x01", b"]"),
        "Python objects",
    ),
    "structured": (pickle.dumps(np.zeros(2, [("a", "f4")])), "dtype"),
    "dates": (pickle.dumps(np.array(["2020"], "M8[D]")), "dtype"),
    "metadata": (pickle.dumps(np.zeros(2, _WITH_METADATA), 4), "metadata"),
    "a class as a value": (pickle.dumps([np.ndarray]), "not data"),
    "a half-built array": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
        "half-built",
    ),
    "masked array": (pickle.dumps(np.ma.array([1, 2])), r"numpy\.ma"),
    "matrix": (pickle.dumps(np.arange(4).view(np.recarray)), "recarray"),
    "BUILD on a list": (b"\x80\x02]}b.", "state of a list"),
    "BUILD on a dict": (b"\x80\x02}}b.", "state of a dict"),
    "call of a string": (b"\x80\x02X\x01\x00\x00\x00a)R.", "it calls str"),
    "call of ndarray": (b"\x80\x02cnumpy\nndarray\nK\x09\x85R.", r"it calls numpy\.ndarray"),
    "encode as a codec": (b"c_codecs\nencode\n(Vx\nVbz2\ntR.", "encoding 'bz2'"),
    "bytes of a number": (b"c__builtin__\nbytes\n(I1000000000000\ntR.", "damaged"),
    "bytearray of a number": (b"c__builtin__\nbytearray\n(I1000000000000\ntR.", r"__builtin__\.bytearray"),
    "array as a key": (b"\x80\x04}]K\x01s.", "unhashable"),
    "list in itself": (b"\x80\x04]\x94h\x00a.", "contains itself"),
    "integer of 16 kB": (b"\x80\x02\x8b\x00\x40\x00\x00" + b"\x7f" * 0x4000 + b".", "the opcode LONG4"),
    "torch: pickle in the storage": (_torch_pickle_inside(pickle.dumps(Calls(os.system, "touch hacked"))), r"posix\.system"),
    "torch: legacy file with a call": (_torch_pickle_inside(_legacy_storage(b"")), r"posix\.system"),
    "torch: zip in the storage": (_torch_pickle_inside(b"PK\x03\x04"), "zip"),
    "torch: parameter": (pickle.dumps(torch.nn.Parameter(torch.ones(2))), "_rebuild_parameter"),
    "torch: module": (pickle.dumps(torch.nn.Linear(2, 2)), r"torch\.nn"),
    "torch: sparse": (pickle.dumps(torch.eye(2).to_sparse()), "_rebuild_sparse"),
    "torch: expanded": (pickle.dumps(torch.ones(1).expand(1_000)), "tensor of shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_attacks_are_refused_by_name_and_run_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = HOSTILE[name]
    with pytest.raises(UnsafePickle, match=message):
        loads(data)
    assert not list(tmp_path.iterdir())


def _edited(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1, data
    return data.replace(old, new)


def _storage_bytes() -> bytes:
    """What a pickled tensor of four float32 carries: legacy torch.save output with the length in two places."""
    return next(arg for _, arg, _ in pickletools.genops(pickle.dumps(torch.arange(4.0))) if type(arg) is bytes)


def _laughing(num: int) -> bytes:
    """Tuples of two times the one before, in memo slots 0 .. num; the last unfolds to 2^num ones."""
    return b"K\x01\x940" + b"".join(b"h%ch%c\x86\x940" % (i, i) for i in range(num))


_U1 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1\x89\x88tR(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
_MEGABYTE = (1 << 20).to_bytes(8, "little")

BOMBS = {
    "shape": (
        _edited(pickle.dumps(np.arange(2, dtype="i1"), 2), b"K\x01K\x02\x85", b"K\x01\x8a\x06\x00\x10\xa5\xd4\xe8\x00\x85"),
        r"an array of shape \(1000000000000,\) of int8 from 2 bytes",
    ),
    "shape of empty text": (
        b"\x80\x04cnumpy.core.numeric\n_frombuffer\n(C\x00cnumpy\ndtype\n(X\x02\x00\x00\x00U0\x89\x88tR(K\x03X\x01\x00\x00\x00<NNNK\x00"
        b"K\x04K\x08tbJ\x00\x00\x00\x7f\x85X\x01\x00\x00\x00CtR.",
        "the numpy dtype 'U0'",
    ),
    "itemsize": (
        b"\x80\x04cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x0a\x00\x00\x00S999999999\x89\x88tR(K\x03X\x01\x00\x00\x00|NNN"
        b"J\xff\xc9\x9a;K\x01K\x00tbC\x01xtR.",
        "the numpy dtype 'S999999999'",
    ),
    "claimed text": (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.", "it ends too early"),
    "claimed bytes": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "it ends too early"),
    "claimed buffer": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.", "it ends too early"),
    "claimed number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "the opcode LONG4"),
    "claimed memo slot": (b"\x80\x02Nr\xff\xff\xff\x7f]h\x01.", "damaged"),
    "storage, header": (
        _torch_pickle_inside(_edited(_storage_bytes(), b"q\x03K\x04Nt", b"q\x03\x8a\x06\x00\x00\x00\x00\x00\x01Nt")),
        "storage of 1,099,511,627,776 float32 from 16 bytes",
    ),
    "storage, both": (
        _torch_pickle_inside(
            _edited(_storage_bytes(), b"q\x03K\x04Nt", b"q\x03\x8a\x06\x00\x00\x00\x00\x00\x01Nt").replace(
                b"\x04\x00\x00\x00\x00\x00\x00\x00", b"\x00\x00\x00\x00\x00\x01\x00\x00"
            )
        ),
        "storage of 1,099,511,627,776 float32 from 16 bytes",
    ),
    "tensor beyond its storage": (
        _edited(pickle.dumps(torch.arange(4.0), 2), b"K\x00K\x04\x85", b"K\x00K\x05\x85"), r"tensor of shape \(5,\)"
    ),
    "tensor before its storage": (
        _edited(pickle.dumps(torch.arange(4.0), 2), b"K\x00K\x04\x85", b"J\xff\xff\xff\xffK\x04\x85"), "tensor of shape"
    ),
    "laughing lists": (
        b"\x80\x04(]\x94" + b"".join(b"]\x94(" + b"h%c" % i * 10 + b"e" for i in range(60)) + b"t.", "once unfolded"
    ),
    "laughing tuples": (b"\x80\x04" + _laughing(90) + b"h\x5a.", "once unfolded"),
    "laughing tuples as a key": (b"\x80\x04" + _laughing(90) + b"}h\x5aNs.", "once unfolded"),
    "laughing tuples in a set": (b"\x80\x04" + _laughing(90) + b"\x8f(h\x5a\x90.", "the opcode EMPTY_SET"),
    "laughing tuples as an encoding": (b"\x80\x04" + _laughing(90) + b"c_codecs\nencode\n(Vx\nh\x5atR.", "of type tuple"),
    "laughing tuples as a dtype": (b"\x80\x04" + _laughing(90) + b"cnumpy\ndtype\nh\x5a\x85R.", "of type tuple"),
    "laughing tuples as a shape": (
        b"\x80\x04" + _laughing(90) + b"cnumpy.core.numeric\n_frombuffer\n(C\x00" + _U1 + b"h\x5aX\x01\x00\x00\x00CtR.",
        "not a shape",
    ),
    "deep lists": (b"]" * 20_000 + b"a" * 19_999 + b".", "more than 100 deep"),
    "deep tuples": (b")" + b"\x85" * 20_000 + b".", "more than 100 deep"),
    "deep tuples as a key": (b"}N" + b"\x85" * 20_000 + b"Ns.", "more than 100 deep"),
    "many tables": (b"\x80\x04(" + b"}" * 110_000 + b"t.", "more than 2,000,000 objects"),
    "one text encoded again and again": (
        b"\x80\x04c_codecs\nencode\n\x94X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"\x94\x85\x94(" + b"h\x00h\x02R" * 50 + b"t.",
        "far more bytes",
    ),
    "one buffer under many arrays": (
        b"\x80\x05(cnumpy.core.numeric\n_frombuffer\n\x94(\x96" + _MEGABYTE + bytes(1 << 20) + _U1
        + b"J\x00\x00\x10\x00\x85X\x01\x00\x00\x00Ct\x94" + b"h\x00h\x01R" * 50 + b"t.",
        "far more bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_swell(name: str) -> None:
    data, message = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(UnsafePickle, match=message):
            loads(data, max_opcodes=100_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40e6, f"{peak / 1e6:.0f} MB"


def test_of_the_standard_machine_only_what_touches_no_name_and_claims_no_memory_is_taken() -> None:
    ours = {
        "REDUCE",
        "NEWOBJ",
        "BUILD",
        "APPEND",
        "APPENDS",
        "SETITEM",
        "SETITEMS",
        "DICT",
        "BYTEARRAY8",
        "INT",
        "LONG",
        "FRAME",
    }
    never = {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER", "LONG4"}
    machine = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
    for name in ours | never:
        code = getattr(pickle, name)[0]
        assert (code in _HANDLERS) == (name in ours) and _HANDLERS.get(code) is not machine[code], name
    assert Reader.find_class is not pickle._Unpickler.find_class  # type: ignore[attr-defined]


def test_limits_are_named() -> None:
    with pytest.raises(UnsafePickle, match=r"more than 2,000,000 objects\. Have its maker write npy"):
        loads(pickle.dumps(list(range(100))), max_opcodes=100)


# Fuzz. The reader has no door to the outside, and this counts on it: whatever the bytes, a value or an UnsafePickle.

_WATCHED = {
    "open",
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
}
_armed, _seen = [False], []  # an audit hook cannot be taken away again, hence the switch


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _armed[0] and event in _WATCHED:
        _seen.append((event, args))


@pytest.fixture(scope="module", autouse=True)
def audit() -> None:
    for value in (
        "\u00e9",
        1.5,
        HONEST["noise"],
        torch.ones(1),
    ):  # the codecs are imported on their first use, which is no attack
        for protocol in range(6):
            loads(pickle.dumps(value, protocol))
    sys.addaudithook(_hook)


def _survives(data: bytes) -> None:
    _armed[0] = True
    try:
        loads(data, max_opcodes=20_000)
    except UnsafePickle:
        pass
    finally:
        _armed[0] = False
    assert not _seen


_FUZZ = settings(max_examples=1_500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
_SEEDS = [pickle.dumps(value, protocol) for value in (*HONEST.values(), *TENSORS.values()) for protocol in range(6)]
_SEEDS = [seed for seed in _SEEDS if len(seed) < 5_000] + [data for data, _ in HOSTILE.values() if len(data) < 5_000]
_SYMBOLS = [
    *(b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n"),
    *(b"cnumpy.core.multiarray\nscalar\n", b"cnumpy.core.numeric\n_frombuffer\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ctorch.storage\n_load_from_bytes\n", b"ccollections\nOrderedDict\n", b"c__builtin__\nset\n", b"cos\nsystem\n"),
]
_PIECES = [
    *_SYMBOLS,
    *(b"(", b"t", b"R", b"b", b"]", b"}", b")", b"e", b"u", b"s", b"a", b"0", b"1", b"2", b"\x85", b"\x86", b"\x87", b"\x90"),
    *(b"\x8f", b"\x91", b"\x94", b"h\x00", b"h\x01", b"h\x02", b"N", b"\x88", b"\x89", b"K\x00", b"K\x01", b"K\x08", b"Q"),
    *(b"J\xff\xff\xff\xff", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"C\x08\x00\x00\x80?\x00\x00\x00@", b"C\x00"),
    *(b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00U0", b"X\x02\x00\x00\x00U1", b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00K"),
    *(b"X\x06\x00\x00\x00latin1", b"\x93"),
    *(b"G?\xf0\x00\x00\x00\x00\x00\x00", b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffK\x00K\x00tb"),
]  # fmt: skip


@given(st.binary(max_size=300))
@_FUZZ
def test_random_bytes(data: bytes) -> None:
    _survives(data)


@given(st.lists(st.sampled_from(_PIECES), max_size=40))
@_FUZZ
def test_random_programs(pieces: list[bytes]) -> None:
    _survives(b"\x80\x04" + b"".join(pieces) + b".")


@given(
    st.sampled_from(_SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
@_FUZZ
def test_mutated_pickles(data: bytes, edits: list[tuple[float, int, bytes]]) -> None:
    for place, kind, patch in edits:
        at = int(place * len(data))
        if kind == 0:
            data = data[:at] + patch + data[at + len(patch) :]
        elif kind == 1:
            data = data[:at] + patch + data[at:]
        elif kind == 2:
            data = data[:at] + data[at + len(patch) :]
        else:
            data = data[:at] + data[at:][: len(patch)] * 2 + data[at:]
    _survives(data)
