"""Pickles read as data. The stream is interpreted here, one opcode at a time, and nothing in it is ever called.

Pickle is a program: `pickle.load` imports what the file names and calls it. This reader knows some forty opcodes and a dozen
names, each of which stands for a function of this file; there is no `pickle.Unpickler` behind it, no import, no getattr, no
`__setstate__`, no `torch.load`. It reads the numbers, texts and containers of Python, numpy arrays and scalars of numbers or
text (protocols 0 to 5, module paths of numpy 1 and 2), and dense torch tensors. Everything else is refused by name.

Budgets limit decompression bombs: bytes of the file, opcodes, bytes that builders may copy (in proportion to the file, since an
honest pickle holds every byte it unpacks to), and the depth and the unfolded size of the result.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fewstep.errors import UserError

MAX_BYTES = 2 << 30
MAX_OPCODES = 2_000_000  # an empty set costs 216 bytes of memory for its one opcode, so this also bounds memory: 430 MB

_PIECE = 1 << 24  # bytes read at once
_MAX_DEPTH = 100  # containers in containers; keeps repr, json and copy of the result off the recursion limit
_MAX_UNFOLDED = 50_000_000  # elements met by one who walks the result; a billion-laughs list is small only while shared
_MAX_KEY_PARTS = 64  # hash() of a tuple walks it, shared parts again and again, in C and without a depth limit
_MAX_INT_BITS = 8_192
_COPIES = 4  # bytes built per byte of the file: text -> bytes -> storage -> tensor is the longest honest chain

_CONSTANTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"),
        *("SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
        *("BINBYTES8", "BYTEARRAY8"),
    )
)
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_IGNORED = frozenset(("PROTO", "FRAME"))
_SCALARS = frozenset((str, bytes, int, float, bool, type(None), complex))
_SIMPLE_DTYPE = re.compile(r"[biufcSU]\d{1,9}")

# What a file may be that is no pickle, by its first bytes, and what to do about it.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (torch.save or .npz); read it with torch.load(weights_only=True) or numpy.load"),
    (b"\x93NUMPY", "a .npy array; read it with numpy.load(allow_pickle=False)"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"BZh", "bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run: git lfs pull"),
)


class UnsafePickle(UserError):  # noqa: N818  # the name says what the file is
    """A pickle that is damaged, too large, or holds more than arrays, tensors and plain containers."""


def load(
    path_or_file: str | os.PathLike[str] | BinaryIO, *, max_bytes: int = MAX_BYTES, max_opcodes: int = MAX_OPCODES
) -> Any:  # a pickle holds whatever plain data its writer put in
    """The plain data of one pickle; raises UnsafePickle, and never runs anything the file names.

    A file object is read from where it stands to its end. Tensors come back on the CPU without gradient, arrays writable.
    Costs about 2 us an opcode (a 14 MB noise file: a few dozen opcodes); arrays are copied twice.
    """
    if isinstance(path_or_file, (str, os.PathLike)):
        with Path(path_or_file).open("rb") as file:
            return _read(file, str(path_or_file), max_bytes, max_opcodes)
    return _read(path_or_file, str(getattr(path_or_file, "name", "<file>")), max_bytes, max_opcodes)


def loads(data: bytes, *, max_bytes: int = MAX_BYTES, max_opcodes: int = MAX_OPCODES) -> Any:  # as load
    """The plain data of a pickle held in memory; otherwise as `load`."""
    return _read(io.BytesIO(data), "<bytes>", max_bytes, max_opcodes)


def _read(file: BinaryIO, name: str, max_bytes: int, max_opcodes: int) -> Any:  # as load
    data = _content(file, max_bytes + 1)
    if len(data) > max_bytes:
        raise UnsafePickle(f"{name}: more than {max_bytes:,} bytes. If you trust it, pass a larger max_bytes.")
    for magic, what in _FOREIGN:
        if data.startswith(magic):
            raise UnsafePickle(f"{name}: not a pickle but {what}.")
    stream = io.BytesIO(data)
    budget = _Budget(max_opcodes, _COPIES * len(data) + 4_096)
    value = _Reader(name, budget, _data_symbols(name, budget)).run(stream)
    if rest := len(data) - stream.tell():
        raise UnsafePickle(f"{name}: damaged, {rest:,} bytes follow the end of the pickle. Write the file again.")
    _check_result(value, name)
    return value


def _content(file: BinaryIO, most: int) -> bytes:
    """The rest of a file, `most` bytes of it. In pieces: read(2 GiB) would take 2 GiB of memory to read one byte."""
    pieces, left = list[bytes](), most
    while left > 0 and (piece := file.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


_Symbols = dict[str, Callable[..., Any] | None]  # a known name -> what builds its value; None: known, but never called


class _Budget:
    """The remaining budget, shared by a pickle and the storages inside it."""

    def __init__(self, opcodes: int, copied: int):
        self.opcodes, self.copied = opcodes, copied

    def charge(self, num_bytes: int) -> None:
        self.copied -= num_bytes
        if self.copied < 0:
            raise _RefusalError("it unpacks to far more bytes than it holds")


class _RefusalError(Exception):
    """The reason why a stream is refused; the reader adds the file's name and the place."""


class _Symbol:
    """A known name of the stream. It stands for `build`; the thing the name means elsewhere is not touched."""

    def __init__(self, name: str, build: Callable[..., Any] | None):
        self.name, self.build = name, build


class _Pending:
    """An array or dtype between the opcode that starts it and the BUILD that fills it; `slots` are its places in the memo."""

    def __init__(self, build: Callable[[Any], Any]):
        self.build = build
        self.slots: list[int] = []


class _Storage:
    """The checked bytes of a torch storage, until a tensor is laid over them."""

    def __init__(self, dtype: str, raw: bytes):
        self.dtype, self.raw = dtype, raw


class _Reader:
    """A stack machine for the opcodes that plain data needs."""

    def __init__(self, name: str, budget: _Budget, symbols: _Symbols, persistent: Callable[[Any], Any] | None = None):
        self.name, self.budget, self.symbols, self.persistent = name, budget, symbols, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below the open marks
        self.memo: dict[int, Any] = {}

    def run(self, stream: io.BytesIO) -> Any:  # as load
        """The object on top of the stack at STOP; the stream is left behind the STOP."""
        place = stream.tell()
        opcodes = pickletools.genops(stream)
        while True:
            try:
                opcode, arg, position = next(opcodes)
                place = position or 0
            except Exception as error:  # pickletools passes on whatever its number and text parsers raise
                raise self._damaged(place, error) from None
            self.budget.opcodes -= 1
            if self.budget.opcodes < 0:
                raise UnsafePickle(f"{self.name}: too many objects. If you trust it, pass a larger max_opcodes.")
            try:
                if opcode.name == "STOP":
                    if self.marked or len(self.stack) != 1:
                        raise UserError("the stack does not hold one object")
                    return self.stack[0]
                self._step(opcode.name, arg)
            except _RefusalError as refusal:
                raise UnsafePickle(
                    f"{self.name}: refused at byte {place:,}: {refusal}. Only numbers, text, plain containers, numpy arrays "
                    "and torch tensors are read from pickles; have its maker write npy, safetensors or json instead."
                ) from None
            except UnsafePickle:
                raise
            except (LookupError, TypeError, ValueError, OverflowError, MemoryError, RuntimeError, AttributeError) as error:
                raise self._damaged(place, error) from None

    def _damaged(self, place: int, error: Exception) -> UnsafePickle:
        why = str(error)[:120] or type(error).__name__
        return UnsafePickle(f"{self.name}: not a pickle, or a damaged one, near byte {place:,} ({why}). Write the file again.")

    def _step(self, name: str, arg: Any) -> None:  # the type of arg follows from the opcode
        stack, memo = self.stack, self.memo
        if name in _CONSTANTS:
            if type(arg) is int and arg.bit_length() > _MAX_INT_BITS:
                raise _RefusalError(f"an integer of {arg.bit_length():,} bits")
            stack.append(arg)
        elif name in ("BINPUT", "MEMOIZE", "LONG_BINPUT", "PUT"):
            slot = len(memo) if name == "MEMOIZE" else arg
            memo[slot] = stack[-1]
            if isinstance(stack[-1], _Pending):
                stack[-1].slots.append(slot)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        elif name in _FIXED:
            stack.append(_FIXED[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name == "TUPLE":
            items = self._pop_mark()
            self.stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            num = int(name[-1])
            if len(stack) < num:
                raise UserError("stack underflow")
            stack[-num:] = [tuple(stack[-num:])]
        elif name == "SETITEMS":
            items = self._pop_mark()
            _set_items(self.stack[-1], items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "APPENDS":
            items = self._pop_mark()
            _exactly(self.stack[-1], list).extend(items)
        elif name == "APPEND":
            item = stack.pop()
            _exactly(stack[-1], list).append(item)
        elif name == "ADDITEMS":
            items = self._pop_mark()
            _exactly(self.stack[-1], set).update(_key(item) for item in items)
        elif name == "GLOBAL":
            module, _, attribute = arg.partition(" ")
            stack.append(self._symbol(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._symbol(_exactly(module, str), _exactly(attribute, str)))
        elif name == "REDUCE":
            args, symbol = stack.pop(), stack.pop()
            if not isinstance(symbol, _Symbol) or symbol.build is None:
                raise _RefusalError(f"it calls {symbol.name if isinstance(symbol, _Symbol) else type(symbol).__name__}")
            stack.append(symbol.build(*_exactly(args, tuple)))
        elif name == "BUILD":
            state, pending = stack.pop(), stack.pop()
            if not isinstance(pending, _Pending):
                raise _RefusalError(f"it sets the state of a {type(pending).__name__}")
            value = pending.build(state)
            for slot in pending.slots:
                if memo[slot] is pending:
                    memo[slot] = value
            stack.append(value)
        elif name == "LIST":
            items = self._pop_mark()
            self.stack.append(items)
        elif name == "DICT":
            items, fresh = self._pop_mark(), {}
            _set_items(fresh, items)
            self.stack.append(fresh)
        elif name == "FROZENSET":
            items = self._pop_mark()
            self.stack.append(frozenset(_key(item) for item in items))
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        elif name == "POP" and stack:
            stack.pop()
        elif name in ("POP", "POP_MARK"):
            self._pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in _IGNORED:
            raise _RefusalError(f"the opcode {name}, which plain data never needs")

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _symbol(self, module: str, attribute: str) -> _Symbol:
        full = f"{module}.{attribute}"
        if full not in self.symbols:
            raise _RefusalError(f"it asks for {full[:200]!r}")
        return _Symbol(full, self.symbols[full])


def _exactly(value: Any, kind: type) -> Any:  # value may be anything the stream held
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def _short(value: Any) -> str:  # value may be anything the stream held
    """Text for a message. Only text is shown: the repr of shared tuples can be longer than the memory."""
    return repr(value[:40]) if type(value) is str else f"of type {type(value).__name__}"


def _set_items(target: Any, flat: list[Any]) -> None:  # target is on the stack, of any type
    if type(target) not in (dict, OrderedDict):
        raise _RefusalError(f"it sets items of a {type(target).__name__}")
    if len(flat) % 2:
        raise UserError("a key without a value")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        target[_key(key)] = value


def _key(key: Any) -> Any:  # of any hashable plain type
    """The key itself, once it is known that hashing and comparing it is cheap."""
    parts, num_parts = [key], 0
    while parts:
        part = parts.pop()
        num_parts += 1
        if type(part) in (tuple, frozenset):
            parts.extend(part)
        elif type(part) not in _SCALARS and not isinstance(part, np.generic):
            raise _RefusalError(f"a {type(part).__name__} as a key")
        if num_parts + len(parts) > _MAX_KEY_PARTS:
            raise _RefusalError(f"a key of more than {_MAX_KEY_PARTS} parts")
    return key


def _check_result(root: Any, name: str) -> None:  # as load
    """Refuses what is no data (a bare name, a half-built array), cycles, depth, and results that unfold without end."""
    measured: dict[int, tuple[int, int]] = {}  # id of a finished container: its depth, its unfolded size
    open_: set[int] = set()
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        value, is_finished = todo.pop()
        kind = type(value)
        if kind in _SCALARS:
            continue
        if kind in (list, tuple, set, frozenset, dict, OrderedDict):
            children = list(value) if kind not in (dict, OrderedDict) else [*value.keys(), *value.values()]
            if is_finished:
                inner = [measured.get(id(child), (0, 1)) for child in children]
                depth = 1 + max((d for d, _ in inner), default=0)
                size = 1 + sum(s for _, s in inner)
                if depth > _MAX_DEPTH or size > _MAX_UNFOLDED:
                    raise UnsafePickle(f"{name}: refused: containers {depth} deep with {size:,} elements once unfolded.")
                measured[id(value)] = depth, size
                open_.discard(id(value))
            elif id(value) in open_:
                raise UnsafePickle(f"{name}: refused: a container that contains itself.")
            elif id(value) not in measured:
                open_.add(id(value))
                todo.append((value, True))
                todo.extend((child, False) for child in children if type(child) not in _SCALARS)
        elif isinstance(value, (_Symbol, _Pending, _Storage)):
            what = value.name if isinstance(value, _Symbol) else "a half-built array or tensor"
            raise UnsafePickle(f"{name}: refused: it holds {what} as a value, which is not data.")


# The builders. Each takes what the stream gives and trusts none of it.


def _data_symbols(name: str, budget: _Budget) -> _Symbols:
    """The names plain data may use, as Python 2 and 3, numpy 1 and 2 and torch write them."""

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _RefusalError(f"the text encoding {_short(encoding)}")
        budget.charge(len(_exactly(text, str)))
        return text.encode("latin1")

    def plain(kind: type, accepts: tuple[type, ...]) -> Callable[..., Any]:
        def build(*args: Any) -> Any:
            if len(args) > 1 or (args and type(args[0]) not in accepts):
                raise _RefusalError(f"{kind.__name__}() of {', '.join(type(arg).__name__ for arg in args)[:80]}")
            if args:
                budget.charge(len(args[0]))
            is_hashed = kind in (set, frozenset)
            return kind(_key(item) for item in args[0]) if args and is_hashed else kind(*args)

        return build

    def complex_of(real: float, imaginary: float) -> complex:
        return complex(_exactly(real, float), _exactly(imaginary, float))

    def ordered(*args: Any) -> OrderedDict[Any, Any]:
        out: OrderedDict[Any, Any] = OrderedDict()
        for pairs in args[:1]:  # only Python 2 passes the pairs here
            budget.charge(len(_exactly(pairs, list)))
            for key, value in pairs:
                out[_key(key)] = value
        return out

    def dtype(code: Any, *flags: Any) -> _Pending:
        code = code.decode("ascii") if type(code) is bytes else code
        if type(code) is str and code.startswith("O"):
            raise _RefusalError("a numpy array of Python objects")
        if type(code) is not str or not _SIMPLE_DTYPE.fullmatch(code):
            raise _RefusalError(f"the numpy dtype {_short(code)}")
        return _Pending(lambda state: _dtype(code, state))

    def reconstruct(kind: Any, shape: Any, code: Any) -> _Pending:
        if not isinstance(kind, _Symbol) or kind.name != "numpy.ndarray":
            raise _RefusalError("a numpy array of a foreign class")

        def build(state: Any) -> np.ndarray:
            _, shape, element, is_fortran, raw = _exactly(state, tuple)
            raw = raw.encode("latin1") if type(raw) is str else raw  # text: written by Python 2
            return _array(raw, element, shape, "F" if is_fortran is True else "C", budget)

        return _Pending(build)

    def frombuffer(raw: Any, element: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        if order == "K":  # numpy 2.3 and later: C order of the axes as they lie in memory
            array = _array(raw, element, shape, "C", budget)
            if axes is None or len(_shape(axes)) != array.ndim:
                raise UserError("the order of axes does not fit the shape")
            return array.transpose(axes)
        if order not in ("C", "F"):
            raise UserError("unknown memory order")
        return _array(raw, element, shape, order, budget)

    def scalar(element: Any, raw: Any) -> Any:  # the numpy scalar of whichever type
        raw = raw.encode("latin1") if type(raw) is str else raw
        return _array(raw, element, (), "C", budget)[()]

    def storage(raw: Any) -> _Storage:
        return _torch_storage(_exactly(raw, bytes), name, budget)

    def tensor(data: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *metadata: Any) -> Any:
        return _tensor(_exactly(data, _Storage), offset, size, stride, budget)

    symbols: _Symbols = {
        "_codecs.encode": encode,
        "collections.OrderedDict": ordered,
        "numpy.ndarray": None,
        "numpy.dtype": dtype,
        "torch.storage._load_from_bytes": storage,
        "torch._utils._rebuild_tensor_v2": tensor,
    }
    for module in ("builtins", "__builtin__"):
        symbols[f"{module}.complex"] = complex_of
        symbols[f"{module}.bytes"] = plain(bytes, (bytes,))
        symbols[f"{module}.bytearray"] = plain(bytearray, (bytes,))
        symbols[f"{module}.set"] = plain(set, (list,))
        symbols[f"{module}.frozenset"] = plain(frozenset, (list,))
    for module in ("numpy.core", "numpy._core"):
        symbols[f"{module}.multiarray._reconstruct"] = reconstruct
        symbols[f"{module}.multiarray.scalar"] = scalar
        symbols[f"{module}.numeric._frombuffer"] = frombuffer
    return symbols


def _dtype(code: str, state: Any) -> np.dtype:
    """The dtype of a code such as 'f4' in the byte order its state names; a state that says more is refused."""
    order, subdtype, names, fields, itemsize = _exactly(state, tuple)[1:6]
    metadata = state[8:]
    if order not in ("<", ">", "|", "=") or any(part is not None for part in (subdtype, names, fields, *metadata)):
        raise _RefusalError("a numpy dtype with fields, sub-arrays or metadata")
    dtype = np.dtype(code)
    if itemsize not in (-1, dtype.itemsize):
        raise UserError("a dtype whose size contradicts its code")
    return dtype.newbyteorder(order) if order in "<>" else dtype


def _shape(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > 64 or any(type(num) is not int or num < 0 for num in shape):
        raise UserError("not a shape")
    return shape


def _array(raw: Any, dtype: Any, shape: Any, order: str, budget: _Budget) -> np.ndarray:
    """A writable array of its own memory, of exactly the bytes given: the shape is checked before anything is allocated."""
    if not isinstance(dtype, np.dtype):
        raise TypeError("an array without a dtype")
    if type(raw) not in (bytes, bytearray):
        raise _RefusalError("a numpy array of Python objects")
    num = math.prod(_shape(shape))
    if num * dtype.itemsize != len(raw):
        raise _RefusalError(f"an array of shape {shape!s:.80} of {dtype} from {len(raw):,} bytes")
    budget.charge(max(len(raw), 4 * num))  # empty strings take no bytes in the file, but some in memory
    if not raw:
        return np.zeros(shape, dtype, order="F" if order == "F" else "C")
    flat = np.frombuffer(raw, dtype)
    if dtype.kind == "U" and flat.view(dtype.str[0] + "u4").max() > 0x10FFFF:
        raise UserError("text beyond Unicode")
    if dtype.kind == "b":
        flat = flat.view(np.uint8) != 0  # a bool must not hold 2
    native = flat.dtype.newbyteorder("=")  # torch takes no other
    return flat.reshape(shape, order="F" if order == "F" else "C").astype(native, order="K", copy=True)


_TORCH_DTYPES = {
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64", "Byte": "uint8", "Char": "int8",
    "Short": "int16", "Int": "int32", "Long": "int64", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the legacy format of torch.save, which a pickled tensor carries
_TORCH_VERSION = 1001


def _torch_storage(raw: bytes, name: str, budget: _Budget) -> _Storage:
    """The storage in the bytes a pickled tensor carries: four small pickles, a length, and the elements.

    torch.load, even with weights_only=True, would allocate what the header claims before it looks for the bytes.
    """
    import torch

    header: list[tuple[str, str, int]] = []

    def persistent(identity: Any) -> _Storage:
        tag, kind, key, _, num, view = _exactly(identity, tuple)
        if tag != "storage" or not isinstance(kind, _Symbol) or view is not None:
            raise _RefusalError("a torch object other than a storage")
        header.append((kind.name.removeprefix("torch.").removesuffix("Storage"), _exactly(key, str), _exactly(num, int)))
        return _Storage("", b"")

    if raw.startswith(b"PK"):
        raise _RefusalError("a torch storage in a zip archive")
    stream = io.BytesIO(raw)

    kinds: _Symbols = {f"torch.{kind}Storage": None for kind in _TORCH_DTYPES}

    def part(symbols: _Symbols | None = None) -> Any:
        return _Reader(f"{name} (torch storage)", budget, symbols or {}, persistent if symbols else None).run(stream)

    if part() != _TORCH_MAGIC or part() != _TORCH_VERSION:
        raise _RefusalError("a torch storage of an unknown format")
    system = part()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise _RefusalError("a torch storage of a big-endian machine")
    root, keys = part(kinds), part()
    if len(header) != 1 or not isinstance(root, _Storage) or type(keys) is not list or keys != [header[0][1]]:
        raise _RefusalError("a torch object other than one storage")
    kind, _, num = header[0]
    dtype = _TORCH_DTYPES[kind]
    stored = int.from_bytes(stream.read(8), "little")
    elements = stream.read()
    if num != stored or num * getattr(torch, dtype).itemsize != len(elements):
        raise _RefusalError(f"a torch storage of {num:,} {dtype} from {len(elements):,} bytes")
    budget.charge(len(elements))
    return _Storage(dtype, elements)


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any, budget: _Budget) -> Any:  # a Tensor; torch comes late
    """A contiguous tensor of its own memory. Overlapping layouts (expand) are refused: a byte could claim to be a terabyte."""
    import torch

    dtype = getattr(torch, storage.dtype)
    size, stride = _shape(size), _shape(stride)
    num, last = math.prod(size), _exactly(offset, int) + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if num == 0:
        return torch.zeros(size, dtype=dtype)
    if num * dtype.itemsize > len(storage.raw) or offset < 0 or last * dtype.itemsize >= len(storage.raw):
        raise _RefusalError(f"a tensor of shape {size!s:.80} of {dtype} from {len(storage.raw):,} bytes")
    budget.charge(num * dtype.itemsize)
    raw = bytearray(storage.raw)  # torch wants writable memory
    flat = torch.frombuffer(raw, dtype=torch.uint8).ne(0) if dtype == torch.bool else torch.frombuffer(raw, dtype=dtype)
    return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)
