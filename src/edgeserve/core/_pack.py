"""Containers and everything else that is not one plain buffer: msgpack, with extension types for what msgpack lacks.

The first part of the payload is the msgpack body. Large buffers (arrays, Arrow data) follow it out of band in the order in which the
body mentions them, each at a multiple of 64 bytes from the start of the payload. Only types named in this module come out: no class
is ever looked up by a name from the wire.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Iterable
from decimal import Decimal
from enum import Enum
from itertools import chain
from typing import Any, NoReturn, TypeVar
from uuid import UUID

import msgspec
import numpy as np
from msgspec.msgpack import Decoder, Encoder, Ext

from edgeserve.core import _arrays, _arrow
from edgeserve.core.errors import UnsupportedType

_T = TypeVar("_T")

MAX_DEPTH = 100
"""How deep containers may nest."""

_IN_BAND_BYTES = 2048
_ALIGNMENT = 64

_TUPLE, _DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _BIG_INT, _MAP, _SET, _FROZENSET, _UUID = range(1, 12)
_SCALAR, _ARRAY, _ARRAY_APART, _ARROW_APART = range(20, 24)

_PLAIN = frozenset((type(None), bool, int, float, str, bytes))
_PLAIN_BUT_INT = _PLAIN - {int}
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1

_encode = Encoder().encode
_check_structure = Decoder(msgspec.Raw).decode

ACCEPTED = (
    "None inside containers, bool, int, float, str, bytes, list, tuple, dict, set, datetime, date, time, timedelta, Decimal, UUID, Enum, "
    "dataclasses, msgspec Structs, NumPy arrays and scalars, and Arrow data (pyarrow, polars, pandas)"
)


def unsupported(value: object, why: str = "") -> UnsupportedType:
    """The error for a `value` that cannot be sent."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return UnsupportedType(
        f"a value of type {name} cannot be sent{': ' + why if why else ''}. "
        f"Without a gate these can: {ACCEPTED}. For others give gate= (gate_out= of a Compute) a function that returns bytes."
    )


def refuse(value: object, why: str = "") -> NoReturn:
    """Raises `UnsupportedType` for `value`."""
    raise unsupported(value, why)


def pack(value: Any) -> tuple[str, list[bytes | memoryview]]:
    """The schema tag and the buffers of `value`."""
    try:
        try:
            return ("m", [_encode(value)]) if _is_plain(value) else _Packer(_PLAIN).pack(value)
        except OverflowError:
            return _Packer(_PLAIN_BUT_INT).pack(value)
    except UnicodeEncodeError as exc:
        refuse(value, f"it holds a str that is not valid Unicode ({exc.reason})")


def unpack(schema: str, payload: memoryview) -> Any:
    """What `pack` packed. Raises any exception for what it did not: the caller names it."""
    if schema == "m":
        return _without_apart.decode(payload)
    size = int(schema[2:])
    if not 0 < size <= len(payload):
        raise ValueError(f"a body of {size} bytes in a payload of {len(payload)}")
    return _Unpacker(payload, size).decode(payload[:size])


def _is_plain(value: Any) -> bool:
    """Whether msgspec alone packs `value` so that it comes back the same."""
    kind = type(value)
    if kind is dict:
        return _PLAIN.issuperset(map(type, value.values())) and _PLAIN.issuperset(map(type, value))
    if kind is list:
        return _PLAIN.issuperset(map(type, value))
    return kind in _PLAIN or (isinstance(value, msgspec.Struct) and _is_plain_struct(value))


def _is_plain_struct(value: msgspec.Struct) -> bool:
    return _PLAIN.issuperset([type(getattr(value, name)) for name in value.__struct_fields__])


class _Packer:
    """Turns a value into one that msgspec packs; gathers the buffers that travel apart."""

    def __init__(self, plain: frozenset[type]) -> None:
        self._apart: list[bytes | memoryview] = []
        self._plain = plain

    def pack(self, value: Any) -> tuple[str, list[bytes | memoryview]]:
        body = _encode(self._prepare(value, 0))
        if not self._apart:
            return "m", [body]
        buffers: list[bytes | memoryview] = []
        for buffer in (body, *self._apart):
            buffers += (buffer, bytes(-len(buffer) % _ALIGNMENT))
        return f"m:{len(body)}", buffers

    def _prepare(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind in self._plain:
            return value
        if depth > MAX_DEPTH:
            refuse(value, f"it nests deeper than {MAX_DEPTH} levels, or holds itself")
        if kind is list:
            return value if self._plain.issuperset(map(type, value)) else [self._prepare(item, depth + 1) for item in value]
        if kind is dict:
            return self._dict(value, depth)
        if kind in _COLLECTIONS:
            return Ext(_COLLECTIONS[kind], self._items(value, depth))
        leaf = _LEAVES.get(kind)
        return self._object(value, depth) if leaf is None else leaf(value)

    def _items(self, values: Iterable[Any], depth: int) -> bytes:
        return _encode([self._prepare(item, depth + 1) for item in values])

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        if self._plain.issuperset(map(type, value)):
            return {key: self._prepare(item, depth + 1) for key, item in value.items()}
        return Ext(_MAP, self._items(chain.from_iterable(value.items()), depth))

    def _object(self, value: Any, depth: int) -> Any:
        """Everything that is not exactly one of the built-in types."""
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, np.generic):
            return Ext(_SCALAR, _encode(describe(_arrays.describe_scalar, value)))
        if isinstance(value, msgspec.Struct):
            return self._struct(value, depth)
        if isinstance(value, type):
            refuse(value)
        if dataclasses.is_dataclass(value):
            return {field.name: self._prepare(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
        if isinstance(value, Enum):
            return self._prepare(value.value, depth + 1)
        if _arrow.is_arrow(value):
            kind, buffer = describe(_arrow.write, value)
            self._apart.append(buffer)
            return Ext(_ARROW_APART, _encode([kind, len(buffer)]))
        # A subclass of a built-in type (NamedTuple, OrderedDict...) travels as that type. Not those of datetime: pandas.Timestamp has ns.
        for base, plain in _BASES.items():
            if isinstance(value, base):
                return self._prepare(plain(value), depth)
        refuse(value)

    def _struct(self, value: msgspec.Struct, depth: int) -> Any:
        """As msgspec writes it: tag, renamed fields and array-like ones included."""
        if self._plain is _PLAIN and _is_plain_struct(value):
            return value
        config = value.__struct_config__
        fields: dict[str, Any] = {} if config.tag is None else {str(config.tag_field): config.tag}
        for encoded, name in zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True):
            item = getattr(value, name)
            if item is not msgspec.UNSET:
                fields[encoded] = self._prepare(item, depth + 1)
        return list(fields.values()) if config.array_like else fields

    def _array(self, value: _arrays.Array) -> Ext:
        description, buffer = describe(_arrays.describe, value)
        if len(buffer) <= _IN_BAND_BYTES:
            return Ext(_ARRAY, _encode([description, buffer]))
        self._apart.append(buffer)
        return Ext(_ARRAY_APART, _encode([description, len(buffer)]))


def describe(how: Callable[[Any], _T], value: Any) -> _T:
    """`how(value)` for NumPy and Arrow data, refused with the reason where that cannot travel."""
    if isinstance(value, np.ma.MaskedArray):
        refuse(value, "its mask would be lost; send (value.data, value.mask)")
    try:
        return how(value)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as exc:
        raise unsupported(value, str(exc)) from exc


class _Unpacker:
    """Decodes one body, taking the buffers that travel apart in turn, so that none is used twice."""

    def __init__(self, payload: memoryview, start: int) -> None:
        self._payload = payload
        self._position = start
        self._decode = Decoder(ext_hook=self._extension).decode

    def decode(self, body: memoryview) -> Any:
        # A list that states four thousand million items must not be allocated before it is known that they are there.
        _check_structure(body)
        return self._decode(body)

    def _take(self, size: int) -> memoryview:
        start = (self._position + _ALIGNMENT - 1) & -_ALIGNMENT
        end = start + size
        if size < 0 or end > len(self._payload):
            raise ValueError(f"a buffer of {size} bytes is not in the payload")
        self._position = end
        return self._payload[start:end]

    def _extension(self, code: int, data: memoryview) -> Any:
        leaf = _LEAF_DECODERS.get(code)
        if leaf is not None:
            return leaf(bytes(data))
        items = self.decode(data)
        if code in _COLLECTION_DECODERS:
            return _COLLECTION_DECODERS[code](items)
        first, second = items
        if code == _SCALAR:
            return _arrays.restore_scalar(first, second)
        if code == _ARRAY:
            return _arrays.restore(first, memoryview(second))
        if code == _ARRAY_APART:
            return _arrays.restore(first, self._take(second))
        if code == _ARROW_APART:
            return _arrow.read(first, self._take(second))
        raise ValueError(f"unknown extension type {code}")


def _big_int(value: int) -> Any:
    if _INT_MIN <= value <= _INT_MAX:
        return value
    return Ext(_BIG_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _text(code: int, write: Callable[[Any], str]) -> Callable[[Any], Ext]:
    return lambda value: Ext(code, write(value).encode())


_COLLECTIONS: dict[type, int] = {tuple: _TUPLE, set: _SET, frozenset: _FROZENSET}
_COLLECTION_DECODERS: dict[int, Callable[[Any], Any]] = {_TUPLE: tuple, _SET: set, _FROZENSET: frozenset, _MAP: _pairs}
_LEAVES: dict[type, Callable[[Any], Any]] = {
    int: _big_int,
    bytearray: bytes,
    memoryview: bytes,
    dt.datetime: _text(_DATETIME, dt.datetime.isoformat),
    dt.date: _text(_DATE, dt.date.isoformat),
    dt.time: _text(_TIME, dt.time.isoformat),
    dt.timedelta: lambda value: Ext(_TIMEDELTA, _encode([value.days, value.seconds, value.microseconds])),
    Decimal: _text(_DECIMAL, str),
    UUID: lambda value: Ext(_UUID, value.bytes),
}
_LEAF_DECODERS: dict[int, Callable[[bytes], Any]] = {
    _DATETIME: lambda data: dt.datetime.fromisoformat(data.decode()),
    _DATE: lambda data: dt.date.fromisoformat(data.decode()),
    _TIME: lambda data: dt.time.fromisoformat(data.decode()),
    _TIMEDELTA: lambda data: dt.timedelta(*Decoder(tuple[int, int, int]).decode(data)),
    _DECIMAL: lambda data: Decimal(data.decode()),
    _BIG_INT: lambda data: int.from_bytes(data, "little", signed=True),
    _UUID: lambda data: UUID(bytes=data),
}
_BASES: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int,
    float: float,
    bytes: bytes,
    tuple: tuple,
    list: list,
    dict: dict,
}
_without_apart = _Unpacker(memoryview(b""), 0)

__all__ = ("ACCEPTED", "MAX_DEPTH", "describe", "pack", "refuse", "unpack", "unsupported")
