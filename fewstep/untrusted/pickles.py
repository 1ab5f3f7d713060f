"""Pickles read as data: a pickle is a program, and of its language only what builds plain data is here.

`pickle.load` imports what the file names and calls it. This reader is the stack machine of the standard library in Python,
whose table of opcodes is cut to some forty: those that push a constant, and those that put constants into lists, tuples and
dictionaries. What touches a name is written here: of names only those are known that the caller admits, each of which stands
for a function of this package; nothing is imported, no attribute of a name is taken, no `__setstate__` called. Everything else
is refused by name.

Budgets limit decompression bombs: bytes of the file, opcodes, bytes that builders may copy (in proportion to the file, since an
honest pickle holds every byte it unpacks to), the depth and the unfolded size of the result, and keys that share a hash.
"""

from __future__ import annotations

import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from fewstep.errors import UserError

MAX_OPCODES = 2_000_000  # a container costs some 100 bytes for its one opcode, so this also bounds memory: 200 MB

_MAX_DEPTH = 100  # containers in containers; keeps repr, json and copy of the result off the recursion limit
_MAX_UNFOLDED = 50_000_000  # elements met by one who walks the result; a billion-laughs list is small only while shared
_MAX_KEY_PARTS = 64  # hash() of a tuple walks it, shared parts again and again, in C and without a depth limit
_MAX_EQUAL_HASHES = 32  # different keys; each new one is compared with all of them

_SCALARS = frozenset((str, bytes, int, float, bool, type(None)))


class UnsafePickle(UserError):  # noqa: N818  # the name says what the file is
    """A pickle that is damaged, too large, or holds more than arrays, tensors and plain containers."""


Builder = Callable[..., Any]
# A name -> what builds its value; None: admitted, but never called; anything else that cannot be called is the value itself.
Symbols = Mapping[str, Any]


class Budget:
    """The remaining budget of a file of `size` bytes, shared by a pickle and the storages inside it."""

    def __init__(self, size: int, opcodes: int = MAX_OPCODES):
        self.opcodes = opcodes
        self.copied = 4 * size + 4096  # text -> bytes -> storage -> tensor is the longest honest chain
        self._keys: dict[int, list[Any]] = {}  # different keys by their hash

    def charge(self, num_bytes: int) -> None:
        self.copied -= num_bytes
        if self.copied < 0:
            raise RefusalError("it unpacks to far more bytes than it holds")

    def key(self, key: Any) -> Any:  # of any hashable plain type
        """The key itself, once it is known that hashing and comparing it is cheap.

        The hashes of numbers, and of tuples of them, can be chosen: a dictionary of keys with one hash takes quadratic time.
        """
        if type(key) in (str, bytes):  # their hashes are salted
            return key
        if _extent(key, 0, {})[1] > _MAX_KEY_PARTS:
            raise RefusalError(f"a key of more than {_MAX_KEY_PARTS} parts")
        others = self._keys.setdefault(hash(key), [])
        if key not in others:
            others.append(key)
            if len(others) > _MAX_EQUAL_HASHES:
                raise RefusalError("many keys with the same hash")
        return key


class RefusalError(Exception):
    """The reason why a stream is refused; the reader adds the file's name and the place."""


class Symbol:
    """A known name of the stream. It stands for `build`; the thing the name means elsewhere is not touched."""

    def __init__(self, name: str, build: Builder | None):
        self.name, self.build = name, build


class Pending:
    """An array or dtype between the opcode that starts it and the BUILD that fills it; then it stands for its value."""

    def __init__(self, build: Callable[[Any], Any]):
        self.build = build
        self.value: Any = self


class _Memo(dict[int, Any]):
    def __getitem__(self, slot: int) -> Any:
        value = super().__getitem__(slot)
        return value.value if isinstance(value, Pending) else value


_MACHINE: Any = pickle._Unpickler  # the one in Python, which typeshed leaves out


class Reader(_MACHINE):
    """The stack machine, with the opcodes of `_HANDLERS`."""

    def __init__(
        self,
        stream: BinaryIO,
        name: str,
        budget: Budget,
        symbols: Symbols,
        persistent: Callable[[Any], Any] | None = None,
    ):
        super().__init__(stream)
        self.stream, self.name, self.budget, self.symbols, self.persistent = stream, name, budget, symbols, persistent
        self.memo = _Memo()
        self.place = stream.tell()

    def run(self) -> Any:  # as load
        """The object on top of the stack at STOP, which is data; the stream is left behind the STOP."""
        try:
            value = self.load()
            if self.stack or self.metastack:
                raise UserError("the stack does not hold one object")
            _extent(value, 0, {})
            return value
        except RefusalError as refusal:
            raise UnsafePickle(
                f"{self.name}: refused at byte {self.place:,}: {refusal}. Only numbers, text, plain containers, numpy arrays "
                "and torch tensors are read. If you trust the file, load it where it was made and save those alone, as npy, "
                "safetensors or json"
            ) from None
        except UnsafePickle:
            raise
        except Exception as error:  # the machine lets out whatever its parsers of numbers and text raise
            why = "it ends too early" if isinstance(error, EOFError) else str(error)[:120] or type(error).__name__
            raise UnsafePickle(
                f"{self.name}: not a pickle, or a damaged one, near byte {self.place:,} ({why}). Write the file again."
            ) from None

    @property
    def dispatch(self) -> Reader:
        """The table in which the machine looks up each opcode."""
        return self

    def __getitem__(self, code: int) -> Callable[[Reader], None]:
        self.place = self.stream.tell() - 1
        self.budget.opcodes -= 1
        if self.budget.opcodes < 0:
            raise UnsafePickle(
                f"{self.name}: more than {MAX_OPCODES:,} objects. Have its maker write npy, safetensors or json instead."
            )
        if code not in _HANDLERS:
            names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
            raise RefusalError(f"the opcode {names[code]}, which plain data never needs")
        return _HANDLERS[code]

    def find_class(self, module: str, name: str) -> Any:  # a Symbol, or a value
        full = f"{module}.{name}"
        if full not in self.symbols:
            raise RefusalError(f"it asks for {full[:200]!r}")
        entry = self.symbols[full]
        return Symbol(full, entry) if entry is None or callable(entry) else entry

    def persistent_load(self, pid: Any) -> Any:
        if self.persistent is None:
            raise RefusalError("the opcode BINPERSID, which plain data never needs")
        return self.persistent(pid)

    def decimal(self) -> None:  # and no other base: the digits of that one are limited by Python
        text = self.readline()[:-1].removesuffix(b"L")
        self.append(text == b"01" if text in (b"00", b"01") else int(text))

    def buffer(self) -> None:  # without making room for what is claimed
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def call(self) -> None:
        args, symbol = self.stack.pop(), self.stack.pop()
        if not isinstance(symbol, Symbol) or symbol.build is None:
            raise RefusalError(f"it calls {symbol.name if isinstance(symbol, Symbol) else type(symbol).__name__}")
        self.append(symbol.build(*exactly(args, tuple)))

    def fill(self) -> None:
        state, pending = self.stack.pop(), self.stack[-1]
        if type(pending) is OrderedDict and type(state) is dict:  # a module's state_dict: versions, which are no weights
            return
        if not isinstance(pending, Pending):
            raise RefusalError(f"it sets the state of a {type(pending).__name__}")
        pending.value = self.stack[-1] = pending.build(state)

    def put_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise RefusalError(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.budget.key(key)] = value

    def put_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put_items([key, value])

    def table(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.put_items(items)

    def extend(self, items: list[Any]) -> None:
        exactly(self.stack[-1], list).extend(items)


_OF_THE_MACHINE = (
    *("PROTO", "STOP", "MARK", "POP", "POP_MARK", "DUP", "GLOBAL", "STACK_GLOBAL", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST"),
    *("EMPTY_DICT", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
)
_HANDLERS: dict[int, Callable[[Reader], None]] = {
    **{code: _MACHINE.dispatch[code] for code in (getattr(pickle, name)[0] for name in _OF_THE_MACHINE)},
    pickle.FRAME[0]: lambda reader: reader.read(8),
    **dict.fromkeys((pickle.INT[0], pickle.LONG[0]), Reader.decimal),
    pickle.BYTEARRAY8[0]: Reader.buffer,
    **dict.fromkeys((pickle.REDUCE[0], pickle.NEWOBJ[0]), Reader.call),
    pickle.BUILD[0]: Reader.fill,
    pickle.APPEND[0]: lambda reader: reader.extend([reader.stack.pop()]),
    pickle.APPENDS[0]: lambda reader: reader.extend(reader.pop_mark()),
    pickle.SETITEM[0]: Reader.put_item,
    pickle.SETITEMS[0]: lambda reader: reader.put_items(reader.pop_mark()),
    pickle.DICT[0]: Reader.table,
}


def exactly(value: Any, kind: type) -> Any:  # value may be anything the stream held
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def short(value: Any) -> str:  # value may be anything the stream held
    """Text for a message. Only text is shown: the repr of shared tuples can be longer than the memory."""
    return repr(value[:40]) if type(value) is str else f"of type {type(value).__name__}"


def _extent(value: Any, above: int, memo: dict[int, tuple[int, int]]) -> tuple[int, int]:  # value: as load
    """How many containers deep a value is, and how many elements one meets who walks it, in `above` others.

    memo: extents of containers by their id. Refuses what is no data (a bare name, a half-built array), what is too deep, as a
    cycle is, and what unfolds to too much.
    """
    if isinstance(value, (Symbol, Pending)):
        what = value.name if isinstance(value, Symbol) else "a half-built array or tensor"
        raise RefusalError(f"it holds {what} as a value, which is not data")
    if type(value) not in (list, tuple, dict, OrderedDict):
        return 0, 1
    if id(value) not in memo:
        if above == _MAX_DEPTH:
            raise RefusalError(f"containers more than {_MAX_DEPTH} deep, or one that contains itself")
        children = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        extents = [_extent(child, above + 1, memo) for child in children if type(child) not in _SCALARS]
        num = 1 + len(children) + sum(size for _, size in extents)
        memo[id(value)] = 1 + max((depth for depth, _ in extents), default=0), num
    depth, num = memo[id(value)]
    if depth + above > _MAX_DEPTH or num > _MAX_UNFOLDED:
        raise RefusalError(f"containers {depth + above} deep with {num:,} elements once unfolded")
    return depth, num
