"""Reads the prototype's logs, one pickle after another in a file, without unpickling anything.

A pickle is a program for a small stack machine. Here the instructions that build plain data are carried out, on plain data, and every
other one is refused before its argument is read. Names are compared with a short list and never looked up; nothing is imported,
called or evaluated. What a record may ask for is bounded, so a hostile file costs no more than its limits.
"""

from __future__ import annotations

import base64
import math
import pickletools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, BinaryIO, TypeAlias, cast

from edgeserve.core.errors import EdgeServeError

_MIB = 1024 * 1024
_NAME_MAX = 80


@dataclass(frozen=True)
class Limits:
    """What one record may ask for."""

    value_bytes: int = 64 * _MIB
    record_bytes: int = 256 * _MIB
    instructions: int = 2_000_000
    memo: int = 1_000_000
    values: int = 2_000_000
    depth: int = 100
    integer_bits: int = 8192


class PickleLogError(EdgeServeError, ValueError):
    """A record cannot be converted. `offset` is the byte of the file at which that was seen, `record` counts from 1."""

    to_do = ""

    def __init__(self, what: str, offset: int, record: int) -> None:
        super().__init__(f"{what} (record {record}, byte {offset})")
        self.offset, self.record = offset, record


class UnsafePickle(PickleLogError):
    """The record asks for more than plain data; to read it as pickle would is to run what it names."""

    to_do = (
        "if you trust who wrote the file, turn the object into plain data where the prototype is installed, and write JSON from there; "
        "if you do not, delete the file"
    )


class DamagedPickle(PickleLogError):
    """The bytes are no pickle, or its end is missing."""

    to_do = "the records before it are intact and converted; the rest of the file cannot be read"


class OversizedPickle(PickleLogError):
    """The record asks for more memory, values or depth than a log's record can need."""

    to_do = "no log of the prototype is like this: check where the file comes from"


class _Known(Enum):
    """The names that the prototype's logs contain. They stand for themselves and are never looked up."""

    UUID = "uuid.UUID"
    SAFE_UUID = "uuid.SafeUUID"
    ENCODE = "_codecs.encode"
    BYTES = "__builtin__.bytes"


class _Pairs(list[tuple[Any, Any]]):
    """A dict. Nothing is hashed, so that no choice of keys makes it slow."""


class _Set(list[Any]):
    """A set, for the same reason."""


class _Uuid:
    """A UUID: made empty and filled in by the instruction after."""

    text = ""


class _File:
    """The file as the argument readers of pickletools see it, with a bound on how much they get."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._file, self._limits = file, limits
        self.at = 0
        self.record, self.began = 0, 0

    def read(self, size: int) -> bytes:
        self._allow(size)
        data = self._file.read(size)
        self.at += len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(self._limits.value_bytes + 1)
        self._allow(len(data))
        self.at += len(data)
        return data

    def _allow(self, size: int) -> None:
        if size > self._limits.value_bytes:
            raise OversizedPickle(f"a value of {size} bytes or more; at most {self._limits.value_bytes} are read", self.at, self.record)
        if self.at + size - self.began > self._limits.record_bytes:
            raise OversizedPickle(f"a record of more than {self._limits.record_bytes} bytes", self.at, self.record)


def read_records(file: BinaryIO, limits: Limits = Limits()) -> Iterator[Any]:
    """The records of a log, in order, as values that JSON can say.

    Bytes become `{"base64": ...}`, UUIDs and what JSON's numbers leave out (nan, inf) text, tuples and sets lists, and a dict with other
    keys than text `{"pairs": [[key, value], ...]}`.

    Raises:
        PickleLogError: `UnsafePickle`, `DamagedPickle` or `OversizedPickle`, at the record that it is about.

    Example:
        >>> import io, pickle
        >>> list(read_records(io.BytesIO(pickle.dumps({"a": b"x"}) + pickle.dumps((1, None)))))
        [{'a': {'base64': 'eA=='}}, [1, None]]
    """
    source = _File(file, limits)
    while True:
        source.record, source.began = source.record + 1, source.at
        first = source.read(1)
        if not first:
            return
        value = _Machine(source, limits).run(first)
        yield _Plain(source, limits).convert(value, 0)


class _Machine:
    """Carries out one record."""

    def __init__(self, source: _File, limits: Limits) -> None:
        self._source, self._limits = source, limits
        self._stack: list[Any] = []
        # The stacks below each open mark, as in the pickle module.
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._at, self._name = source.at, ""

    def run(self, code: bytes) -> Any:
        """What the record says; `code` is its first instruction, which has been read."""
        source = self._source
        for _ in range(self._limits.instructions):
            self._at = source.at - 1
            found = _OPCODES.get(code)
            if found is None:
                raise self._damaged("this is no pickle: no instruction begins here" if code else "the record's end is missing")
            self._name = found.name
            handler = _HANDLERS.get(found.name)
            if handler is None:
                raise self._unsafe(f"the instruction {found.name} is none of those that Python 3 writes for plain data")
            argument = None if found.arg is None else self._argument(found.arg)
            if found.name == "STOP":
                return self._last()
            handler(self, argument)
            code = source.read(1)
        raise OversizedPickle(f"a record of more than {self._limits.instructions} instructions", self._at, source.record)

    def _argument(self, kind: pickletools.ArgumentDescriptor) -> Any:
        try:
            return kind.reader(cast("BinaryIO", self._source))
        except PickleLogError:
            raise
        except ValueError as exc:
            raise self._damaged(f"the argument of {self._name} cannot be read: {exc}") from exc

    def _last(self) -> Any:
        if self._below or len(self._stack) != 1:
            raise self._damaged("the record ends without exactly one value")
        return self._stack[0]

    def _damaged(self, what: str) -> DamagedPickle:
        return DamagedPickle(what, self._at, self._source.record)

    def _unsafe(self, what: str) -> UnsafePickle:
        return UnsafePickle(what, self._at, self._source.record)

    # --- the stack ----------------------------------------------------------------------------------------------

    def _pop(self) -> Any:
        if not self._stack:
            raise self._damaged(f"{self._name} finds no value")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        if not self._stack or type(self._stack[-1]) is not kind:
            raise self._damaged(f"{self._name} finds nothing that it can add to")
        return self._stack[-1]

    def _pop_mark(self) -> list[Any]:
        if not self._below:
            raise self._damaged(f"{self._name} finds no mark")
        items, self._stack = self._stack, self._below.pop()
        return items

    def _pairs(self, items: list[Any]) -> Iterator[tuple[Any, Any]]:
        if len(items) % 2:
            raise self._damaged(f"{self._name} finds a key without a value")
        return zip(items[::2], items[1::2], strict=True)

    # --- the instructions; `argument` is theirs, None where they have none ---------------------------------------

    def nothing(self, argument: Any) -> None:
        """FRAME says how much to read at once; STOP is seen to before."""

    def proto(self, argument: Any) -> None:
        if argument > 5:
            raise self._unsafe(f"pickle protocol {argument}; protocols 0 to 5 are read")

    def push(self, argument: Any) -> None:
        if type(argument) is int and argument.bit_length() > self._limits.integer_bits:
            raise OversizedPickle(f"an integer of more than {self._limits.integer_bits} bits", self._at, self._source.record)
        self._stack.append(argument)

    def mark(self, argument: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def pop(self, argument: Any) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def pop_mark(self, argument: Any) -> None:
        self._pop_mark()

    def append(self, argument: Any) -> None:
        item = self._pop()
        self._top(list).append(item)

    def appends(self, argument: Any) -> None:
        items = self._pop_mark()
        self._top(list).extend(items)

    def add_items(self, argument: Any) -> None:
        items = self._pop_mark()
        self._top(_Set).extend(items)

    def set_item(self, argument: Any) -> None:
        value, key = self._pop(), self._pop()
        self._top(_Pairs).append((key, value))

    def set_items(self, argument: Any) -> None:
        items = self._pop_mark()
        self._top(_Pairs).extend(self._pairs(items))

    def make_list(self, argument: Any) -> None:
        items = self._pop_mark()
        self._stack.append(items)

    def make_tuple(self, argument: Any) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def make_set(self, argument: Any) -> None:
        items = self._pop_mark()
        self._stack.append(_Set(items))

    def make_dict(self, argument: Any) -> None:
        items = self._pop_mark()
        self._stack.append(_Pairs(self._pairs(items)))

    def tuple_of(self, size: int) -> None:
        items = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(items)))

    def memoize(self, argument: Any) -> None:
        self.put(len(self._memo))

    def put(self, argument: Any) -> None:
        if not 0 <= argument < self._limits.memo:
            raise OversizedPickle(f"number {argument} in the memo; at most {self._limits.memo} are kept", self._at, self._source.record)
        if not self._stack:
            raise self._damaged(f"{self._name} finds no value")
        self._memo[argument] = self._stack[-1]

    def get(self, argument: Any) -> None:
        if argument not in self._memo:
            raise self._damaged(f"{self._name} asks for what was not stored")
        self._stack.append(self._memo[argument])

    # --- the four names -----------------------------------------------------------------------------------------

    def name(self, argument: Any) -> None:
        self._named(*argument.split(" ", 1))

    def stack_name(self, argument: Any) -> None:
        name, module = self._pop(), self._pop()
        self._named(module, name)

    def _named(self, module: Any, name: Any) -> None:
        text = f"{module}.{name}" if type(module) is str and type(name) is str else "what is no name"
        try:
            self._stack.append(_Known(text))
        except ValueError:
            shown = text if len(text) <= _NAME_MAX else text[:_NAME_MAX] + "..."
            raise self._unsafe(f"{self._name} names {shown!r}, which is no plain data") from None

    def new_object(self, argument: Any) -> None:
        arguments, made = self._pop(), self._pop()
        if made is not _Known.UUID or arguments != ():
            raise self._unsafe(f"{self._name} makes an object that is no UUID")
        self._stack.append(_Uuid())

    def build(self, argument: Any) -> None:
        state = self._pop()
        target = self._stack[-1] if self._stack else None
        number = next((v for k, v in state if type(k) is str and k == "int"), None) if type(state) is _Pairs else None
        if type(target) is not _Uuid or type(number) is not int or not 0 <= number < 1 << 128:
            raise self._unsafe(f"{self._name} fills in an object that is no UUID")
        target.text = str(uuid.UUID(int=number))

    def reduce(self, argument: Any) -> None:
        """Protocols below 3 say bytes as a call that encodes text; Python 3.7 says how a UUID was made as another."""
        arguments, called = self._pop(), self._pop()
        kinds = [type(a) for a in arguments] if type(arguments) is tuple else None
        if called is _Known.SAFE_UUID and kinds == [int]:
            self._stack.append(called)
        elif called is _Known.BYTES and kinds == []:
            self._stack.append(b"")
        elif called is _Known.ENCODE and kinds == [str, str] and arguments[1] == "latin1":
            try:
                self._stack.append(arguments[0].encode("latin-1"))
            except UnicodeEncodeError as exc:
                raise self._damaged(f"these bytes cannot be: {exc.reason}") from exc
        else:
            raise self._unsafe(f"{self._name} calls what is no plain data")


class _Plain:
    """Writes one record out. References to one value are written as often as they occur, which is what has to be bounded."""

    def __init__(self, source: _File, limits: Limits) -> None:
        self._source, self._limits = source, limits
        self._values, self._bytes = limits.values, limits.record_bytes

    def convert(self, value: Any, depth: int) -> Any:
        """The value as JSON can say it."""
        size = len(value) if isinstance(value, str | bytes | bytearray) else 0
        self._values, self._bytes = self._values - 1, self._bytes - size
        if self._values < 0 or self._bytes < 0:
            raise self._oversized(f"a record of more than {self._limits.values} values or {self._limits.record_bytes} bytes, written out")
        if depth > self._limits.depth:
            raise self._oversized(f"values more than {self._limits.depth} deep in each other, or one that contains itself")
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if isinstance(value, bytes | bytearray):
            return {"base64": base64.b64encode(value).decode()}
        if isinstance(value, _Pairs):
            if all(type(key) is str for key, _ in value):
                return {self.convert(key, depth): self.convert(item, depth + 1) for key, item in value}
            return {"pairs": [[self.convert(key, depth + 1), self.convert(item, depth + 1)] for key, item in value]}
        if isinstance(value, list | tuple):
            return [self.convert(item, depth + 1) for item in value]
        if isinstance(value, _Uuid) and value.text:
            return value.text
        raise UnsafePickle("a name or an empty object where a value belongs", self._source.began, self._source.record)

    def _oversized(self, what: str) -> OversizedPickle:
        return OversizedPickle(what, self._source.began, self._source.record)


_Handler: TypeAlias = Callable[[_Machine, Any], None]


def _constant(make: Callable[[], Any]) -> _Handler:
    return lambda machine, _: machine.push(make())


def _tuple(size: int) -> _Handler:
    return lambda machine, _: machine.tuple_of(size)


_OPCODES = {op.code.encode("latin-1"): op for op in pickletools.opcodes}
_ARE_THEIR_ARGUMENT = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"
)
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(_ARE_THEIR_ARGUMENT.split(), _Machine.push),
    **dict.fromkeys(("FRAME", "STOP"), _Machine.nothing),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "PROTO": _Machine.proto,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "EMPTY_DICT": _constant(_Pairs),
    "EMPTY_SET": _constant(_Set),
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.add_items,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "LIST": _Machine.make_list,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "FROZENSET": _Machine.make_set,
    "DICT": _Machine.make_dict,
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "REDUCE": _Machine.reduce,
}

__all__ = ("DamagedPickle", "Limits", "OversizedPickle", "PickleLogError", "UnsafePickle", "read_records")
