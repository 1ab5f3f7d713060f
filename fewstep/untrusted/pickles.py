"""Pickles read as data. The stream is interpreted here, one opcode at a time, and nothing in it is ever called.

Pickle is a program: `pickle.load` imports what the file names and calls it. This reader knows some forty opcodes, and of names
those that its caller admits, each of which stands for a function of this package; there is no `pickle.Unpickler` behind it, no
import, no getattr, no `__setstate__`, no `torch.load`. Everything else is refused by name.

Budgets limit decompression bombs: bytes of the file, opcodes, bytes that builders may copy (in proportion to the file, since an
honest pickle holds every byte it unpacks to), the depth and the unfolded size of the result, and keys that share a hash.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from fewstep.errors import UserError

MAX_OPCODES = 2_000_000  # a container costs some 100 bytes for its one opcode, so this also bounds memory: 200 MB

_MAX_DEPTH = 100  # containers in containers; keeps repr, json and copy of the result off the recursion limit
_MAX_UNFOLDED = 50_000_000  # elements met by one who walks the result; a billion-laughs list is small only while shared
_MAX_KEY_PARTS = 64  # hash() of a tuple walks it, shared parts again and again, in C and without a depth limit
_MAX_INT_BITS = 8_192
_MAX_EQUAL_HASHES = 32  # different keys; each new one is compared with all of them

_CONSTANTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"),
        *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH = {"EMPTY_LIST": list, "EMPTY_DICT": dict}
_IGNORED = frozenset(("PROTO", "FRAME"))
_SCALARS = frozenset((str, bytes, int, float, bool, type(None)))


class UnsafePickle(UserError):  # noqa: N818  # the name says what the file is
    """A pickle that is damaged, too large, or holds more than arrays, tensors and plain containers."""

    wants: str | None = None  # what it would have imported


Builder = Callable[..., Any]


@dataclass(frozen=True)
class Constant:
    """A name that stands for a value."""

    value: Any


@dataclass(frozen=True)
class Object:
    """A name whose objects are begun without arguments, by the opcode NEWOBJ."""

    begin: Callable[[], Any]


Entry = Builder | Constant | Object | None
Symbols = Mapping[str, Entry]  # a name -> what builds its value; None: admitted, but never called


class Budget:
    """The remaining budget, shared by a pickle and the storages inside it."""

    def __init__(self, opcodes: int, copied: int):
        self.opcodes, self.copied = opcodes, copied
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
        parts, num_parts = [key], 0
        while parts:
            part = parts.pop()
            num_parts += 1
            if type(part) is tuple:
                parts.extend(part)
            elif type(part) not in _SCALARS and not isinstance(part, np.generic):
                raise RefusalError(f"a {type(part).__name__} as a key")
            if num_parts + len(parts) > _MAX_KEY_PARTS:
                raise RefusalError(f"a key of more than {_MAX_KEY_PARTS} parts")
        others = self._keys.setdefault(hash(key), [])
        if key not in others:
            others.append(key)
            if len(others) > _MAX_EQUAL_HASHES:
                raise RefusalError("many keys with the same hash")
        return key


class RefusalError(Exception):
    """The reason why a stream is refused; the reader adds the file's name and the place."""

    wants: str | None = None


class Symbol:
    """A known name of the stream. It stands for `build`; the thing the name means elsewhere is not touched."""

    def __init__(self, name: str, build: Builder | Object | None):
        self.name, self.build = name, build


class Pending:
    """An array or dtype between the opcode that starts it and the BUILD that fills it; `slots` are its places in the memo."""

    def __init__(self, build: Callable[[Any], Any]):
        self.build = build
        self.slots: list[int] = []


class Reader:
    """A stack machine for the opcodes that plain data needs."""

    def __init__(self, name: str, budget: Budget, symbols: Symbols, persistent: Callable[[Any], Any] | None = None):
        self.name, self.budget, self.symbols, self.persistent = name, budget, symbols, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below the open marks
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:  # as load
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
            except RefusalError as refusal:
                error = UnsafePickle(
                    f"{self.name}: refused at byte {place:,}: {refusal}. Only numbers, text, plain containers, numpy arrays "
                    "and torch tensors are read from pickles; have its maker write npy, safetensors or json instead."
                )
                error.wants = refusal.wants
                raise error from None
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
                raise RefusalError(f"an integer of {arg.bit_length():,} bits")
            stack.append(arg)
        elif name in ("BINPUT", "MEMOIZE", "LONG_BINPUT", "PUT"):
            slot = len(memo) if name == "MEMOIZE" else arg
            memo[slot] = stack[-1]
            if isinstance(stack[-1], Pending):
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
            set_items(self.budget, self.stack[-1], items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            set_items(self.budget, stack[-1], [key, value])
        elif name == "APPENDS":
            items = self._pop_mark()
            exactly(self.stack[-1], list).extend(items)
        elif name == "APPEND":
            item = stack.pop()
            exactly(stack[-1], list).append(item)
        elif name == "GLOBAL":
            module, _, attribute = arg.partition(" ")
            stack.append(self._symbol(module, attribute))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._symbol(exactly(module, str), exactly(attribute, str)))
        elif name == "NEWOBJ" and isinstance(stack[-2], Symbol) and isinstance(stack[-2].build, Object):
            args, symbol = stack.pop(), stack.pop()
            if args != ():
                raise RefusalError(f"an object of {symbol.name} with arguments")
            stack.append(symbol.build.begin())
        elif name == "REDUCE":
            args, symbol = stack.pop(), stack.pop()
            if not isinstance(symbol, Symbol) or not callable(symbol.build):
                raise RefusalError(f"it calls {symbol.name if isinstance(symbol, Symbol) else type(symbol).__name__}")
            stack.append(symbol.build(*exactly(args, tuple)))
        elif name == "BUILD":
            state, pending = stack.pop(), stack.pop()
            if type(pending) is OrderedDict and type(state) is dict:  # a module's state_dict: versions, which are no weights
                stack.append(pending)
                return
            if not isinstance(pending, Pending):
                raise RefusalError(f"it sets the state of a {type(pending).__name__}")
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
            set_items(self.budget, fresh, items)
            self.stack.append(fresh)
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        elif name == "POP" and stack:
            stack.pop()
        elif name in ("POP", "POP_MARK"):
            self._pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in _IGNORED:
            raise RefusalError(f"the opcode {name}, which plain data never needs")

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _symbol(self, module: str, attribute: str) -> Any:  # a Symbol, or the value of a constant
        full = f"{module}.{attribute}"
        if full not in self.symbols:
            refusal = RefusalError(f"it asks for {full[:200]!r}")
            refusal.wants = full[:200]
            raise refusal
        builder = self.symbols[full]
        return builder.value if isinstance(builder, Constant) else Symbol(full, builder)


def exactly(value: Any, kind: type) -> Any:  # value may be anything the stream held
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected, not a {type(value).__name__}")
    return value


def short(value: Any) -> str:  # value may be anything the stream held
    """Text for a message. Only text is shown: the repr of shared tuples can be longer than the memory."""
    return repr(value[:40]) if type(value) is str else f"of type {type(value).__name__}"


def set_items(budget: Budget, target: Any, flat: list[Any]) -> None:  # target is on the stack, of any type
    if type(target) not in (dict, OrderedDict):
        raise RefusalError(f"it sets items of a {type(target).__name__}")
    if len(flat) % 2:
        raise UserError("a key without a value")
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        target[budget.key(key)] = value


def check_result(root: Any, name: str) -> None:  # as load
    """Refuses what is no data (a bare name, a half-built array), cycles, depth, and results that unfold without end."""
    measured: dict[int, tuple[int, int]] = {}  # id of a finished container: its depth, its unfolded size
    open_: set[int] = set()
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        value, is_finished = todo.pop()
        kind = type(value)
        if kind in _SCALARS:
            continue
        if kind in (list, tuple, dict, OrderedDict):
            children = list(value) if kind in (list, tuple) else [*value.keys(), *value.values()]
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
        elif isinstance(value, (Symbol, Pending)):
            what = value.name if isinstance(value, Symbol) else "a half-built array or tensor"
            raise UnsafePickle(f"{name}: refused: it holds {what} as a value, which is not data.")
