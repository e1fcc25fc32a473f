"""NumPy arrays as a short description and their own memory.

A description is `<order>:<shape>:<dtype>`, for example `C:480,640,3:|u1`. The dtype is NumPy's own string, or JSON for structured ones:
`{"n": names, "f": formats, "o": offsets, "i": item size, "t": titles}`, where a format is again a dtype or `[dtype, shape]`. No dtype
that holds Python objects can be written in it.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any, TypeAlias

import msgspec
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_SIMPLE = re.compile(r"[<>|=][biufcmMSUV]\d{1,10}(\[[0-9]{0,9}[A-Za-z\u03bc]{1,7}(/[0-9]{1,9})?\])?")
_MAX_FIELD_DEPTH = 16
_CACHED_LENGTH = 256


class NotDescribable(ValueError):
    """The array holds Python objects, or items of no size."""


def describe(array: Array) -> tuple[str, bytes | memoryview]:
    """The description of an array and its memory: the array's own where it is contiguous in C or Fortran order, else a copy."""
    dtype = _dtype_text(array.dtype)
    order = "C"
    if not array.flags.c_contiguous:
        if array.flags.f_contiguous:
            order, array = "F", array.T
        else:
            array = array.copy(order="C")
    shape = array.shape if order == "C" else array.shape[::-1]
    text = f"{order}:{','.join(map(str, shape))}:{dtype}"
    if array.size == 0:
        return text, b""
    # Through uint8, because the buffer protocol knows neither datetime64 nor most structured types.
    raw: Any = array.reshape(-1).view(np.uint8)
    return text, memoryview(raw)


def restore(description: str, memory: memoryview) -> Array:
    """The array that `describe` described, read-only; a view where its items are aligned in `memory`, else a copy.

    Raises whatever NumPy raises for a wrong description: the caller names it.
    """
    order, shape, dtype, size = _parse_cached(description) if len(description) <= _CACHED_LENGTH else _parse(description)
    if size != len(memory):
        raise ValueError(f"an array {description[:80]!r} takes {size} bytes, but {len(memory)} came")
    array: Array = np.ndarray(shape, dtype, buffer=memory, order=order)
    if not array.flags.aligned:
        array = array.copy(order="K")
        array.flags.writeable = False
    return array


def describe_scalar(value: np.generic) -> list[Any]:
    """A NumPy scalar as a dtype and its bytes; strings as such, because their dtype drops trailing zeros."""
    if isinstance(value, np.str_):
        return ["U", str(value)]
    if isinstance(value, np.bytes_):
        return ["S", bytes(value)]
    return [_dtype_text(value.dtype), value.tobytes()]


def restore_scalar(dtype: str, raw: str | bytes) -> Any:
    """The scalar that `describe_scalar` described."""
    if isinstance(raw, str):
        return np.str_(raw)
    if dtype == "S":
        return np.bytes_(raw)
    return restore(f"C::{dtype}", memoryview(raw)).copy()[()]


def _dtype_text(dtype: np.dtype[Any]) -> str:
    try:
        return _dtype_text_cached(dtype)
    except TypeError:  # a dtype with metadata may not be hashable
        return _describe_dtype(dtype)


@lru_cache(maxsize=256)
def _dtype_text_cached(dtype: np.dtype[Any]) -> str:
    return _describe_dtype(dtype)


def _describe_dtype(dtype: np.dtype[Any]) -> str:
    if dtype.itemsize == 0:
        raise NotDescribable(f"dtype {dtype} has items of 0 bytes")
    spec = _dtype_spec(dtype)
    return spec if isinstance(spec, str) else msgspec.json.encode(spec).decode()


def _dtype_spec(dtype: np.dtype[Any]) -> str | dict[str, Any]:
    if dtype.hasobject:
        raise NotDescribable(f"dtype {dtype} holds Python objects")
    if dtype.fields is not None and dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        formats = [[_dtype_spec(f[0].base), list(f[0].shape)] if f[0].shape else _dtype_spec(f[0]) for f in fields]
        spec = {"n": list(dtype.names), "f": formats, "o": [f[1] for f in fields], "i": dtype.itemsize}
        titles = [f[2] if len(f) > 2 else None for f in fields]
        if not all(title is None or isinstance(title, str) for title in titles):
            raise NotDescribable(f"dtype {dtype} has titles that are not str")
        return spec | {"t": titles} if any(titles) else spec
    text = dtype.str
    if not _SIMPLE.fullmatch(text) or np.dtype(text) != dtype:
        raise NotDescribable(f"dtype {dtype} has no portable description")
    return text


def _parse(description: str) -> tuple[Any, tuple[int, ...], np.dtype[Any], int]:
    order, shape_text, dtype_text = description.split(":", 2)
    if order not in ("C", "F"):
        raise ValueError(f"an array has order {order[:8]!r}; C and F are known")
    shape = tuple(map(int, shape_text.split(","))) if shape_text else ()
    if any(n < 0 for n in shape):
        raise ValueError(f"an array has the shape {shape}")
    dtype = _parse_dtype(msgspec.json.decode(dtype_text) if dtype_text.startswith("{") else dtype_text, 0)
    if dtype.itemsize == 0 or dtype.hasobject:
        raise ValueError(f"an array has the dtype {dtype}")
    return order, shape, dtype, math.prod(shape) * dtype.itemsize


_parse_cached = lru_cache(maxsize=256)(_parse)


def _parse_dtype(spec: Any, depth: int) -> np.dtype[Any]:
    if isinstance(spec, str) and _SIMPLE.fullmatch(spec):
        return np.dtype(spec)
    if not isinstance(spec, dict) or depth > _MAX_FIELD_DEPTH:
        raise ValueError(f"an array has the dtype {str(spec)[:80]!r}")
    formats: list[Any] = []
    for item in spec["f"]:
        if isinstance(item, list):
            formats.append((_parse_dtype(item[0], depth + 1), tuple(map(int, item[1]))))
        else:
            formats.append(_parse_dtype(item, depth + 1))
    titles = spec.get("t") or [None] * len(formats)
    return np.dtype({"names": spec["n"], "formats": formats, "offsets": spec["o"], "itemsize": spec["i"], "titles": titles})


__all__ = ("Array", "NotDescribable", "describe", "describe_scalar", "restore", "restore_scalar")
