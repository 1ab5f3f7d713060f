"""One value of a declared leaf type, from text, from plain data, or from Python."""

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fewstep.config.types import split, type_text
from fewstep.errors import UserError, show

# pydantic sees values that have their type already; it checks the constraints, and that floats are finite unless the
# field says Annotated[float, AllowInfNan()].
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_INT = re.compile(r"([+-]?[0-9][0-9_]*)(Ki|Mi|Gi|Ti)?")


def read_leaf(declared: Any, value: object) -> Any:
    """The value in its declared type; ValueError that says what was expected."""
    bare, _ = split(declared)
    try:
        result = _literal(bare, value) if get_origin(bare) is Literal else _READERS[bare](value)
    except (ValueError, ArithmeticError) as error:  # the latter: too large for a float or a Decimal
        detail = str(error) if type(error) is _UnreadableError else ""
        raise UserError(f"expected {type_text(declared)}, got {show(value)}{detail}") from None
    obey(declared, result)
    return result


def obey(declared: Any, value: object) -> None:
    """Raises ValueError if the value breaks a constraint of its declared type."""
    try:
        TypeAdapter[Any](declared, config=_STRICT).validate_python(value)
    except ValidationError as error:
        wishes = "; ".join(item["msg"].replace("Input should be", "must be") for item in error.errors())
        raise UserError(f"{wishes}, got {show(value)}") from None


def obey_rules(rules: tuple[Any, ...], value: object) -> None:
    """Raises ValueError if a tuple, mapping or dataclass breaks a constraint such as MinLen(1)."""
    if rules:
        obey(Annotated[(Any, *rules)], value)


class _UnreadableError(ValueError):
    """Holds what a message says after "expected ..., got ..."."""


def _bool(value: object) -> bool:
    if isinstance(value, str):
        return {"true": True, "false": False}[value.lower()] if value.lower() in ("true", "false") else _refuse()
    return value if isinstance(value, bool) else _refuse()


def _int(value: object) -> int:
    if isinstance(value, bool):
        return _refuse()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else _refuse()
    if not isinstance(value, str):
        return _refuse()
    match = _INT.fullmatch(value)
    if match:
        return int(match[1]) * _UNITS.get(match[2] or "", 1)
    if not value.isascii():
        return _refuse()
    number = Decimal(value)  # exact where float("2e23") is not
    # 1e999999999 would fill the memory with digits
    if not number.is_finite() or number.adjusted() > 40 or number != number.to_integral_value():
        return _refuse()
    return int(number)


def _float(value: object) -> float:
    if isinstance(value, str):
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", value, flags=re.IGNORECASE))  # YAML writes .inf
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _refuse()


def _str(value: object) -> str:
    if isinstance(value, str):
        return str(value)
    raise _UnreadableError("; put it in quotes")


def _path(value: object) -> Path:
    if value == "":
        raise _UnreadableError("; write . for the current folder")
    return Path(value) if isinstance(value, (str, Path)) else _refuse()


def _literal(bare: Any, value: object) -> Any:
    options = get_args(bare)
    for option in options:
        if type(option) is type(value) and option == value:
            return option
    for option in options:  # a word without quotes, or the yaml of others: "4" for 4
        if str(option) == value:
            return option
    near = get_close_matches(str(value), [str(option) for option in options], n=1)
    raise _UnreadableError(f"; did you mean {near[0]}?" if near else "")


def _refuse() -> Any:
    raise _UnreadableError


_READERS: Mapping[Any, Callable[[object], Any]] = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
