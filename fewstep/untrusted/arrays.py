"""The builders of plain data and of numpy arrays of numbers, as Python 3 and numpy 1 and 2 write them in pickles.

Each takes what the stream gives and trusts none of it.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Any

import numpy as np

from fewstep.errors import UserError
from fewstep.untrusted.pickles import Budget, Pending, RefusalError, Symbol, exactly, short

_SIMPLE_DTYPE = re.compile(r"b1|[iuf]\d{1,2}")


def data_symbols(budget: Budget) -> dict[str, Any]:
    """The names that plain data may use."""

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise RefusalError(f"the text encoding {short(encoding)}")
        budget.charge(len(exactly(text, str)))
        return text.encode("latin1")

    def dtype(code: Any, *flags: Any) -> Pending:
        if type(code) is str and code.startswith("O"):
            raise RefusalError("a numpy array of Python objects")
        if type(code) is not str or not _SIMPLE_DTYPE.fullmatch(code):
            raise RefusalError(f"the numpy dtype {short(code)}")
        return Pending(lambda state: _dtype(code, state))

    def reconstruct(kind: Any, shape: Any, code: Any) -> Pending:
        if not isinstance(kind, Symbol) or kind.name != "numpy.ndarray":
            raise RefusalError("a numpy array of a foreign class")

        def build(state: Any) -> np.ndarray:
            _, shape, element, is_fortran, raw = exactly(state, tuple)
            return _array(raw, element, shape, "F" if is_fortran is True else "C", budget)

        return Pending(build)

    def frombuffer(raw: Any, element: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
        if order not in ("C", "F", "K"):
            raise UserError("unknown memory order")
        array = _array(raw, element, shape, order, budget)
        if order == "K":  # numpy 2.3 and later: C order of the axes as they lie in memory
            return array.transpose(shape_of(axes))
        return array

    def scalar(element: Any, raw: Any) -> Any:  # the numpy scalar of whichever type
        return _array(raw, element, (), "C", budget)[()]

    symbols: dict[str, Any] = {
        "_codecs.encode": encode,
        "__builtin__.bytes": lambda: b"",  # of protocol 2, which has no other bytes than encoded text
        "collections.OrderedDict": lambda: OrderedDict[Any, Any](),  # not with items, which may have equal hashes
        "numpy.ndarray": None,
        "numpy.dtype": dtype,
    }
    for module in ("numpy.core", "numpy._core"):
        symbols[f"{module}.multiarray._reconstruct"] = reconstruct
        symbols[f"{module}.multiarray.scalar"] = scalar
        symbols[f"{module}.numeric._frombuffer"] = frombuffer
    return symbols


def _dtype(code: str, state: Any) -> np.dtype:
    """The dtype of a code such as 'f4' in the byte order its state names; a state that says more is refused."""
    order, subdtype, names, fields, itemsize = exactly(state, tuple)[1:6]
    metadata = state[8:]
    if order not in ("<", ">", "|", "=") or any(part is not None for part in (subdtype, names, fields, *metadata)):
        raise RefusalError("a numpy dtype with fields, sub-arrays or metadata")
    dtype = np.dtype(code)
    if itemsize not in (-1, dtype.itemsize):
        raise UserError("a dtype whose size contradicts its code")
    return dtype.newbyteorder(order) if order in "<>" else dtype


def shape_of(shape: Any) -> tuple[int, ...]:
    if type(shape) is not tuple or len(shape) > 64 or any(type(num) is not int or num < 0 for num in shape):
        raise UserError("not a shape")
    return shape


def _array(raw: Any, dtype: Any, shape: Any, order: str, budget: Budget) -> np.ndarray:
    """A writable array of its own memory, of exactly the bytes given: the shape is checked before anything is allocated."""
    if not isinstance(dtype, np.dtype):
        raise TypeError("an array without a dtype")
    if type(raw) not in (bytes, bytearray):
        raise RefusalError("a numpy array of Python objects")
    num = math.prod(shape_of(shape))
    if num * dtype.itemsize != len(raw):
        raise RefusalError(f"an array of shape {shape!s:.80} of {dtype} from {len(raw):,} bytes")
    budget.charge(len(raw))
    is_bool = dtype.kind == "b"  # a bool must not hold 2
    array = np.ndarray(shape, np.uint8 if is_bool else dtype, raw, order="F" if order == "F" else "C")
    native = array.dtype.newbyteorder("=")  # torch takes no other
    return np.asarray(array != 0) if is_bool else array.astype(native, order="K", copy=True)
