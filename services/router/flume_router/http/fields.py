"""One request field at a time: the value if it is right, or a BadRequest worded as OpenAI words it.

A reader takes a JSON value and the field's path (`messages[0].role`). Absence and null are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from flume_router.errors import BadRequest

T = TypeVar("T")
D = TypeVar("D")
Reader = Callable[[Any, str], T]
Object = Mapping[str, Any]

_SHOWN_CHARACTERS = 64


def take(body: Object, name: str, reader: Reader[T], default: D) -> T | D:
    """The field's value; `default` where it is absent or null."""
    value = body.get(name)
    return default if value is None else reader(value, name)


def require(body: Object, name: str, reader: Reader[T]) -> T:
    """The field's value; a BadRequest where it is absent."""
    if name not in body:
        raise BadRequest(
            f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
        )
    return reader(body[name], name)


def integer(low: int | None = None, high: int | None = None) -> Reader[int]:
    """A whole number within bounds; a decimal like 1.0 is none."""

    def read(value: Any, param: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong_type("an integer", value, param)
        _check_bounds(value, low, high, "integer", param)
        return value

    return read


def decimal(low: float, high: float) -> Reader[float]:
    """Any number within bounds."""

    def read(value: Any, param: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong_type("a decimal", value, param)
        _check_bounds(value, low, high, "decimal", param)
        return float(value)

    return read


def _check_bounds(value: float, low: float | None, high: float | None, kind: str, param: str) -> None:
    if low is not None and value < low:
        raise _out_of_bounds(
            value, f"below minimum value. Expected a value >= {low}", f"{kind}_below_min_value", param
        )
    if high is not None and value > high:
        raise _out_of_bounds(
            value, f"above maximum value. Expected a value <= {high}", f"{kind}_above_max_value", param
        )


def _out_of_bounds(value: float, expected: str, code: str, param: str) -> BadRequest:
    kind = code.partition("_")[0]
    return BadRequest(
        f"Invalid '{param}': {kind} {expected}, but got {shown(value)} instead.", param=param, code=code
    )


def boolean(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type("a boolean", value, param)
    return value


def string(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type("a string", value, param)
    return value


def obj(value: Any, param: str) -> Object:
    if not isinstance(value, dict):
        raise _wrong_type("an object", value, param)
    return value


def array(value: Any, param: str, *, at_least: int = 0, at_most: int | None = None) -> list[Any]:
    """A list whose length is within bounds."""
    if not isinstance(value, list):
        raise _wrong_type("an array", value, param)
    if not value and at_least:
        raise BadRequest(
            f"Invalid '{param}': empty array. Expected an array with minimum length {at_least}, "
            "but got an empty array instead.",
            param=param,
            code="empty_array",
        )
    if at_most is not None and len(value) > at_most:
        raise BadRequest(
            f"Invalid '{param}': array too long. Expected an array with maximum length {at_most}, "
            f"but got an array with length {len(value)} instead.",
            param=param,
            code="array_above_max_length",
        )
    return value


def refuse_unknown(body: Object, known: Collection[str], path: str = "") -> None:
    """Fields that OpenAI does not know either; all of them are named."""
    unknown = [path + name for name in body if name not in known]
    if unknown:
        word = "argument" if len(unknown) == 1 else "arguments"
        raise BadRequest(
            f"Unrecognized request {word} supplied: {', '.join(map(shown, unknown))}",
            param=shown(unknown[0]),
            code="unknown_parameter",
        )


def refuse_unsupported(body: Object, harmless: Mapping[str, Callable[[Any], bool]], path: str = "") -> None:
    """Fields that OpenAI knows and we lack, unless their value asks for nothing."""
    for name, is_harmless in harmless.items():
        value = body.get(name)
        if value is not None and not is_harmless(value):
            raise BadRequest(
                f"Unsupported parameter: '{path}{name}' with this value is not supported by this server.",
                param=f"{path}{name}",
                code="unsupported_parameter",
            )


def invalid_value(message: str, param: str) -> BadRequest:
    """For what has no wording of its own above."""
    return BadRequest(message, param=param, code="invalid_value")


def combination(message: str, param: str) -> BadRequest:
    """Two fields that exclude or require each other."""
    return BadRequest(message, param=param, code="invalid_parameter_combination")


def shown(value: object) -> str:
    """A client's value inside a message: never long, whatever it is."""
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _wrong_type(expected: str, value: Any, param: str) -> BadRequest:
    return BadRequest(
        f"Invalid type for '{param}': expected {expected}, but got {_type_name(value)} instead.",
        param=param,
        code="invalid_type",
    )


def _type_name(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")
