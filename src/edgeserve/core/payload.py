"""Values as payloads and back, for every type that needs no gate.

The schema tag in the header says how a payload was written:

- `b`: bytes, `s`: str in UTF-8;
- `n:<order>:<shape>:<dtype>`: a NumPy array's memory;
- `a:<kind>`: an Arrow IPC stream;
- `u`: what lies elsewhere, an `External`;
- `m` and `m:<length of the body>`: everything else, msgpack with extension types.

A tag names a layout and never a class: dataclasses and Structs travel as their fields, and are built from the consumer's annotation.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias, Union, get_args, get_origin

import msgspec
import numpy as np

from edgeserve.core import _arrays, _arrow, _pack
from edgeserve.core.codec import Buffer
from edgeserve.core.errors import ConfigurationError, CorruptMessage, MissingExtra, NewerFormat, PayloadMismatch
from edgeserve.core.external import External, OrExternal, decode_external, is_url

PayloadDecoder: TypeAlias = Callable[[str, bytes | memoryview], Any]
"""Takes a header's schema tag and the payload."""

_Convert: TypeAlias = Callable[[Any], Any]
_PACKED = frozenset((type(None), bool, int, float, list, tuple, dict))
_ANYTHING = (inspect.Parameter.empty, Any, object)


def encode_value(value: Any) -> tuple[str, Sequence[Buffer]]:
    """The schema tag and the buffers of a value; contiguous arrays and bytes are not copied.

    Raises:
        UnsupportedType: the type cannot travel without a gate; the message lists those that can.
        MissingExtra: Arrow data, and pyarrow is not installed.

    Example:
        >>> encode_value(b"abc")
        ('b', (b'abc',))
    """
    kind = type(value)
    if kind is bytes:
        return "b", (value,)
    if kind is str:
        try:
            return "s", (value.encode(),)
        except UnicodeEncodeError as exc:
            _pack.refuse(value, f"it is not valid Unicode ({exc.reason})")
    if kind in _PACKED:
        return _pack.pack(value)
    if isinstance(value, np.ndarray):
        description, memory = _pack.describe(_arrays.describe, value)
        return "n:" + description, (memory,)
    if kind is bytearray or kind is memoryview:
        view = memoryview(value)
        return "b", (view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes(),)
    if _arrow.is_arrow(value) and not isinstance(value, type):
        arrow_kind, stream = _pack.describe(_arrow.write, value)
        return "a:" + arrow_kind, (stream,)
    if kind is External:
        return "u", (value.encode(),)
    return _pack.pack(value)


def encode_sized(value: Any) -> tuple[str, bytes | Sequence[Buffer], int]:
    """What a frame needs of a value: its schema tag, its payload, and the payload's bytes. Raises as `encode_value` does."""
    if type(value) is bytes:
        return "b", value, len(value)
    schema, buffers = encode_value(value)
    if len(buffers) == 1 and type(buffers[0]) is bytes:
        return schema, buffers[0], len(buffers[0])
    return schema, buffers, sum([memoryview(b).nbytes for b in buffers])


def decode_value(schema: str, payload: bytes | memoryview) -> Any:
    """The value of a payload, without an annotation: dataclasses and Structs as dicts, Arrow data as pyarrow has it.

    Arrays are read-only views into `payload` where their items are aligned there.

    Raises:
        NewerFormat: the schema tag is not known here.
        CorruptMessage: the payload is not what its tag says.
        MissingExtra: Arrow data, and pyarrow is not installed.
    """
    if schema == "b":
        return payload if type(payload) is bytes else bytes(payload)
    tag = schema[:2]
    try:
        if schema == "s":
            return str(payload, "utf-8")
        payload = memoryview(payload)
        if tag in ("m", "m:"):
            return _pack.unpack(schema, payload)
        if tag == "n:":
            return _arrays.restore(schema[2:], payload)
        if tag == "a:":
            return _arrow.read(schema[2:], payload)
        if schema == "u":
            return decode_external(payload)
    except MissingExtra:
        raise
    except Exception as exc:  # what a crafted payload makes msgspec, NumPy or Arrow raise has no common root
        raise CorruptMessage(f"a payload of {len(payload)} bytes is not what its schema {schema[:80]!r} says: {exc}") from exc
    raise NewerFormat(f"a payload with the unknown schema {schema[:80]!r}: upgrade edgeserve-streams on this node")


def decoder_for(annotation: Any = inspect.Parameter.empty, *, source: str = "") -> PayloadDecoder:
    """A function that decodes payloads as a consumer's parameter is annotated.

    Args:
        annotation: the parameter's annotation, resolved. Without one, see `decode_value`. `memoryview` gives bytes as a view, not a copy.
        source: named in errors.

    Returns:
        A function of schema tag and payload. Beyond the errors of `decode_value` it raises `PayloadMismatch` where the value does not
        fit: int is taken for float, a sequence for another, fields for a dataclass or Struct (unknown ones ignored, missing ones
        take their default); nothing else is converted.

    Raises:
        ConfigurationError: no value can ever fit the annotation.
    """
    if any(annotation is anything for anything in _ANYTHING):
        return decode_value
    if type(annotation) is OrExternal:
        return _or_external(decoder_for(annotation.annotation, source=source))
    fit = _fitting(annotation, source)
    if annotation is memoryview or annotation is bytearray:

        def decode_bytes(schema: str, payload: bytes | memoryview) -> Any:
            if schema != "b":
                fit(decode_value(schema, payload))
            return annotation(payload)

        return decode_bytes
    if annotation is bytes or annotation is str:
        tag = "b" if annotation is bytes else "s"

        def decode_text(schema: str, payload: bytes | memoryview) -> Any:
            value = decode_value(schema, payload)
            return value if schema == tag else fit(value)

        return decode_text

    return lambda schema, payload: fit(decode_value(schema, payload))


def _or_external(plain: PayloadDecoder) -> PayloadDecoder:
    def decode(schema: str, payload: bytes | memoryview) -> Any:
        if schema == "u" or schema == "s":
            value = decode_value(schema, payload)
            if type(value) is External or is_url(value):
                return value
        return plain(schema, payload)

    return decode


def _fitting(annotation: Any, source: str) -> _Convert:
    """A function that returns a decoded value as `annotation` wants it, or raises `PayloadMismatch`."""
    convert = _converter(annotation, source)

    def fit(value: Any) -> Any:
        try:
            return convert(value)
        except Exception as exc:  # also what a user's __post_init__ raises
            raise PayloadMismatch(
                f"the payload of source {source!r} is a {type(value).__name__} that does not fit the annotation {_name(annotation)}: {exc}"
            ) from exc

    return fit


def _converter(annotation: Any, source: str) -> _Convert:
    if annotation is bytes or annotation is bytearray or annotation is memoryview:
        return lambda value: value if type(value) is bytes else _mismatch(annotation, value)
    try:
        msgspec.msgpack.Decoder(annotation)
    except Exception as exc:
        if get_origin(annotation) in (Union, types.UnionType):
            return _first_of([_converter(arm, source) for arm in get_args(annotation)])
        raise ConfigurationError(
            f"the parameter {source!r} is annotated {_name(annotation)}, which no payload can be decoded as: {exc}. "
            "Annotate it with a type that travels, with Any, or not at all."
        ) from exc

    def convert(value: Any) -> Any:
        try:
            return msgspec.convert(value, annotation, dec_hook=_convert_other)
        except msgspec.ValidationError:
            # np.float64 where the annotation says float, at any depth: the same number for whoever wrote the annotation.
            plain = _without_numpy_scalars(value)
            if plain is value:
                raise
            return msgspec.convert(plain, annotation, dec_hook=_convert_other)

    return convert


def _first_of(converters: list[_Convert]) -> _Convert:
    """For unions that msgspec has no rule for, as of two array types: the first that fits."""

    def convert(value: Any) -> Any:
        errors = []
        for attempt in converters:
            try:
                return attempt(value)
            except Exception as exc:  # as in `fit`, which raises the sum of them
                errors.append(str(exc))
        raise ValueError("; ".join(errors))

    return convert


def _convert_other(annotation: Any, value: Any) -> Any:
    """msgspec asks this for types that are not its own: arrays, Arrow data, NumPy scalars."""
    cls = get_origin(annotation) or annotation
    if isinstance(cls, type):
        if isinstance(value, np.ndarray) and issubclass(cls, np.ndarray):
            return _check_dtype(annotation, value)
        if not isinstance(value, cls) and _arrow.is_ours(value):
            value = _arrow.convert(value, cls)
        if isinstance(value, cls):
            return value
    _mismatch(annotation, value)


def _check_dtype(annotation: Any, value: _arrays.Array) -> _arrays.Array:
    """Refuses an array whose dtype is not the one of `NDArray[np.float64]`."""
    args = get_args(annotation)
    scalar = get_args(args[1])[0] if len(args) == 2 and get_args(args[1]) else None
    if isinstance(scalar, type) and issubclass(scalar, np.generic) and not issubclass(value.dtype.type, scalar):
        raise ValueError(f"expected an array of {scalar.__name__}, got one of {value.dtype}")
    return value


def _without_numpy_scalars(value: Any) -> Any:
    """`value` with NumPy scalars as Python's own; the same object where it holds none."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        items = [_without_numpy_scalars(item) for item in value]
        return value if all(map(lambda a, b: a is b, items, value)) else type(value)(items)
    if type(value) is dict:
        pairs = {key: _without_numpy_scalars(item) for key, item in value.items()}
        return value if all(pairs[key] is item for key, item in value.items()) else pairs
    return value


def _mismatch(annotation: Any, value: Any) -> NoReturn:
    raise ValueError(f"expected {_name(annotation)}, got {type(value).__name__}")


def _name(annotation: Any) -> str:
    return annotation.__qualname__ if type(annotation) is type else str(annotation)


__all__ = ("PayloadDecoder", "decode_value", "decoder_for", "encode_sized", "encode_value")
