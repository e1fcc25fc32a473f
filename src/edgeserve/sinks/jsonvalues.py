"""Values as lines of JSON, and which part of a value it is that JSON cannot carry."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from edgeserve.core.errors import UnsupportedType

_REFUSALS = (TypeError, ValueError, OverflowError, RecursionError, NotImplementedError, msgspec.MsgspecError)
_MOST_STEPS = 100
_NUMPY_KINDS = "biufSU"
"""Booleans, integers, floats, bytes, text: what `tolist` makes Python's own of, but for long doubles."""


def encode_line(value: Any) -> bytes:
    """One line, with its newline.

    Raises:
        UnsupportedType: JSON has nothing for a part of it; the message says where that is.
    """
    try:
        line = _encode(value)
    except _REFUSALS as exc:
        where, part = _culprit(value)
        kind = type(part).__qualname__
        raise UnsupportedType(
            f"{reprlib.repr(part)} ({kind}){' at ' + where if where else ''} cannot be written as JSON ({exc}): convert it with gate="
        ) from exc
    # Within text a newline is escaped, so one that is there stands between values: of JSON that came as `msgspec.Raw`.
    return (line.replace(b"\n", b" ") if b"\n" in line else line) + b"\n"


def _plain(value: Any) -> Any:
    """msgspec asks this for types that are not its own."""
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = value.dtype
        if dtype.kind == "M":
            return np.datetime_as_string(np.asarray(value)).tolist()
        if dtype.kind in _NUMPY_KINDS and dtype.char != "g":
            return value.tolist()
        raise TypeError(f"of dtype {dtype}")
    raise TypeError("there is no such type")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


def _encodes(value: Any) -> bool:
    try:
        _encode(value)
    except _REFUSALS:
        return False
    return True


def _culprit(value: Any) -> tuple[str, Any]:
    """The innermost part that cannot be encoded, and the way to it."""
    where = ""
    for _ in range(_MOST_STEPS):
        for step, part in _parts(value):
            if not _encodes(part):
                where, value = where + step, part
                break
        else:
            break
    return where, value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{number}]", part) for number, part in enumerate(value))
    elif isinstance(value, msgspec.Struct):
        yield from ((f".{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))


__all__ = ("encode_line",)
