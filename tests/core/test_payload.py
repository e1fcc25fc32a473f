"""Values without gates: every type that the documentation promises comes back as itself."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import sys
import tracemalloc
import uuid
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeserve.core import decode_value, decoder_for, encode_value
from edgeserve.core.errors import (
    ConfigurationError,
    CorruptMessage,
    MessageError,
    MissingExtra,
    NewerFormat,
    PayloadMismatch,
    UnsupportedType,
)


def sent(value: Any) -> tuple[str, memoryview]:
    schema, buffers = encode_value(value)
    return schema, memoryview(b"".join(buffers))


def back(value: Any, annotation: Any = Any) -> Any:
    return decoder_for(annotation, source="tap-1")(*sent(value))


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types at every depth, NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))
    if isinstance(a, Decimal):
        return str(a) == str(b)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


numbers = st.integers() | st.floats() | st.decimals() | st.booleans()
# Whole seconds, as every zone has: datetime.fromisoformat of Python 3.11 takes an offset of under a second for UTC.
offsets = st.integers(-86_399, 86_399).map(lambda seconds: dt.timezone(dt.timedelta(seconds=seconds)))
times = st.datetimes(timezones=st.none() | st.just(dt.UTC) | offsets) | st.dates() | st.times() | st.timedeltas()
scalars = st.none() | numbers | st.text(st.characters(codec="utf-8")) | st.binary() | times | st.uuids()
dtypes = hnp.scalar_dtypes() | hnp.array_dtypes(max_size=3)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
numpy_scalars = hnp.scalar_dtypes().flatmap(hnp.from_dtype)
hashable = scalars.filter(lambda v: not (isinstance(v, Decimal) and v.is_snan()))
keys = st.recursive(hashable, lambda k: st.tuples(k, k), max_leaves=3)
values = st.recursive(
    scalars | arrays | numpy_scalars,
    lambda v: st.lists(v, max_size=4) | st.lists(v, max_size=4).map(tuple) | st.dictionaries(keys, v, max_size=4),
    max_leaves=12,
)


@given(values)
def test_values_come_back_as_themselves(value: Any) -> None:
    assert same(back(value), value)


@given(arrays, st.sampled_from(["C", "F", "reversed", "transposed"]))
def test_arrays_of_any_dtype_and_memory_order_come_back(array: np.ndarray, layout: str) -> None:
    if layout in "CF":
        array = array.copy(order=layout)
    elif layout == "transposed":
        array = array.T
    elif array.ndim:
        array = array[::-1]
    arrived = back(array)
    assert same(arrived, array)
    assert not arrived.flags.writeable


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_contiguous_array_is_not_copied_either_way(order: Any) -> None:
    array = np.zeros((300, 400), order=order)
    schema, buffers = encode_value(array)
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), array)
    payload = np.frombuffer(b"".join(buffers), np.float64)
    assert np.shares_memory(decode_value(schema, memoryview(payload).cast("B")), payload)


def test_arrays_inside_containers_are_not_copied_either_way() -> None:
    frames = {"left": np.zeros((100, 100)), "right": (np.ones(5000, np.uint8), 3)}
    schema, buffers = encode_value(frames)
    assert any(np.shares_memory(np.frombuffer(buffer, np.uint8), frames["left"]) for buffer in buffers)
    payload = np.frombuffer(b"".join(buffers), np.uint8)
    arrived = decode_value(schema, memoryview(payload))
    assert same(arrived, frames)
    assert np.shares_memory(arrived["left"], payload)
    assert np.shares_memory(arrived["right"][0], payload)


def test_an_array_at_an_odd_address_comes_back_aligned() -> None:
    schema, payload = sent(np.arange(5.0))
    arrived = decode_value(schema, memoryview(b"\0" + payload.tobytes())[1:])
    assert arrived.flags.aligned
    assert not arrived.flags.writeable
    assert arrived.tolist() == [0, 1, 2, 3, 4]


def test_bytes_stay_bytes_and_a_view_is_given_on_request() -> None:
    large = bytes(100_000)
    assert type(back(large)) is bytes
    assert type(back(large, bytes)) is bytes
    schema, payload = sent(b"abc")
    assert decoder_for(memoryview)(schema, payload).obj is payload.obj
    assert same(back(b"abc", bytearray), bytearray(b"abc"))
    for buffer in (bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a-b-c-")[::2]):
        assert back(buffer) == bytes(buffer)


class Flow(NamedTuple):
    src: str
    packets: int


class Severity(enum.IntEnum):
    LOW = 1


def test_subclasses_of_built_in_types_travel_as_those() -> None:
    assert same(back([Flow("a", 1), OrderedDict(a=1), Severity.LOW, bytearray(b"x")]), [("a", 1), {"a": 1}, 1, b"x"])
    assert same(back(Severity.LOW, Severity), Severity.LOW)
    assert same(back(Flow("a", 1), Flow), Flow("a", 1))


@dataclasses.dataclass
class Reading:
    sensor: str
    value: float
    at: dt.datetime | None = None
    image: npt.NDArray[np.uint8] | None = None
    tags: tuple[str, ...] = ()
    price: Decimal = Decimal(0)


class Alert(msgspec.Struct):
    host: str
    score: float = 0.5
    reading: Reading | None = None


class Old(msgspec.Struct):
    host: str


class Tagged(msgspec.Struct, tag=True, rename="camel"):
    first_seen: dt.datetime
    big: int


class Other(msgspec.Struct, tag=True):
    name: str


class Positional(msgspec.Struct, array_like=True):
    a: int
    at: dt.date


READING = Reading("t1", 1.5, dt.datetime(2026, 1, 2, tzinfo=dt.UTC), np.arange(4, dtype=np.uint8), ("a", "b"), Decimal("9.99"))


def test_dataclasses_and_structs_are_built_from_the_annotation_and_dicts_without() -> None:
    arrived = back(Alert("h", 0.9, READING), Alert)
    assert same(arrived.reading.image, READING.image)
    assert dataclasses.replace(arrived.reading, image=None) == dataclasses.replace(READING, image=None)
    assert (arrived.host, arrived.score) == ("h", 0.9)
    assert same(back(READING), dataclasses.asdict(READING))
    assert same(back(Old("h")), {"host": "h"})
    assert same(back([Old("h")], list[Old]), [Old("h")])


def test_msgspec_options_of_a_struct_hold() -> None:
    tagged = Tagged(dt.datetime(2026, 1, 2, tzinfo=dt.UTC), 2**70)
    assert back(tagged)["type"] == "Tagged"
    assert back(tagged)["firstSeen"] == tagged.first_seen
    assert back(tagged, Tagged | Other) == tagged
    assert back(Other("x"), Tagged | Other) == Other("x")
    positional = Positional(1, dt.date(2026, 1, 2))
    assert back(positional, Positional) == positional


def test_fields_may_be_added_and_removed_between_producer_and_consumer() -> None:
    assert back(Alert("h", 0.9), Old) == Old("h")
    assert back(Old("h"), Alert) == Alert("h")
    assert back({"host": "h", "unknown": [1]}, Alert) == Alert("h")
    with pytest.raises(PayloadMismatch, match=r"tap-1.*Reading.*missing required field `value`"):
        back({"sensor": "s"}, Reading)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("x", int),
        (True, int),
        (1.5, int),
        (b"x", str),
        ("x", bytes),
        ("x", memoryview),
        ([1], bytearray),
        (1, str | bytes),
        ([1, "x"], list[int]),
        (1, Reading),
        ({"host": 5}, Alert),
        ([1.0], np.ndarray),
        (np.zeros(2), npt.NDArray[np.int32]),
        (np.zeros(2), list[float]),
        (None, int),
        (3, uuid.UUID),
    ],
)
def test_what_does_not_fit_the_annotation_is_a_mismatch_that_names_the_source(value: Any, annotation: Any) -> None:
    with pytest.raises(PayloadMismatch, match="tap-1") as caught:
        back(value, annotation)
    assert caught.value.reason == "schema"


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        ((1, 2), list[float], [1.0, 2.0]),
        (np.float64(1.5), float, 1.5),
        ([np.int64(1), (np.float32(2),)], tuple[int, tuple[float]], (1, (2.0,))),
        ({"sensor": np.str_("s"), "value": np.float32(0.5)}, Reading, Reading("s", 0.5)),
        (None, int | None, None),
        ("x", str | bytes, "x"),
        (b"x", str | bytes, b"x"),
        (np.float64(2), np.float64, np.float64(2)),
        (b"x", bytes | None, b"x"),
    ],
)
def test_what_means_the_same_is_taken(value: Any, annotation: Any, expected: Any) -> None:
    assert same(back(value, annotation), expected) or back(value, annotation) == expected


def test_array_annotations() -> None:
    array = np.arange(3.0)
    for annotation in (
        np.ndarray,
        npt.NDArray[np.float64],
        npt.NDArray[Any],
        np.ndarray | None,
        np.ndarray | list[int],
        npt.NDArray[np.floating],
    ):
        assert same(back(array, annotation), array)
    assert same(back([1], np.ndarray | list[int]), [1])


def test_an_annotation_that_no_payload_fits_is_refused_at_once() -> None:
    class Broken(msgspec.Struct):
        x: int | Old | Other

    with pytest.raises(ConfigurationError, match=r"tap-1.*Annotate it"):
        decoder_for(Broken, source="tap-1")
    with pytest.raises(ConfigurationError, match="tap-1"):
        decoder_for("Nonsense", source="tap-1")


class Custom:
    pass


def itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Custom(), "Custom"),
        ({"a": [Custom()]}, "Custom"),
        (Custom, "type"),
        (lambda: 1, "function"),
        (1j, "complex"),
        (np.array([object()]), "Python objects"),
        ([np.zeros(2, [("a", "O")])], "Python objects"),
        (np.ma.array([1], mask=[True]), "mask"),
        (np.zeros(2, "V0"), "0 bytes"),
        ("\ud800", "Unicode"),
        ([2**70, "\ud800"], "Unicode"),
        (itself(), "holds itself"),
    ],
)
def test_what_cannot_travel_is_named_with_what_can_and_the_way_out(value: Any, named: str) -> None:
    with pytest.raises(UnsupportedType, match=rf"(?s){named}.*NumPy arrays.*gate="):
        encode_value(value)


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "wrap", [lambda v: [v], lambda v: (v,), lambda v: {"a": v}, lambda v: {(1,): v}], ids=["list", "tuple", "dict", "map"]
)
def test_deep_values_come_back_up_to_the_limit(wrap: Callable[[Any], Any]) -> None:
    value = nested(100, wrap)
    assert same(back(value), value)
    with pytest.raises(UnsupportedType, match="nests deeper than 100"):
        encode_value(nested(10_000, wrap))


def test_unknown_schema_tags_ask_for_an_upgrade() -> None:
    for tag in ("", "z", "bb", "q:1", "M"):
        with pytest.raises(NewerFormat, match="upgrade"):
            decode_value(tag, memoryview(b""))


def extension(code: int, body: bytes) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, body))


def tuple_bomb(depth: int) -> bytes:
    body = b"\xc0"
    for _ in range(depth):
        body = extension(1, b"\x91" + body)
    return body


HOSTILE = {
    "object dtype": ("n:C:1:|O8", bytes(8)),
    "object field": ('n:C:1:{"n":["a"],"f":["|O8"],"o":[0],"i":8}', bytes(8)),
    "two dtypes": ("n:C:1:f4,f4", bytes(8)),
    "wrong length": ("n:C:3:<f8", bytes(23)),
    "huge shape": ("n:C:1000000000000:|u1", bytes(8)),
    "overflowing shape": ("n:C:4294967296,4294967296,4294967296:<f8", b""),
    "negative shape": ("n:C:-1,-8:|u1", bytes(8)),
    "empty but huge": ("n:C:0,9223372036854775807,9:<f8", b""),
    "many dimensions": ("n:C:" + ",".join("1" * 100) + ":|u1", bytes(1)),
    "endless digits": ("n:C:" + "9" * 5000 + ":|u1", bytes(1)),
    "no shape": ("n:C", b""),
    "items of no size": ("n:C:1000000:|V0", b""),
    "order": ("n:K:1:|u1", bytes(1)),
    "deep dtype": ("n:C:1:" + '{"n":["a"],"o":[0],"i":1,"f":[' * 50 + '"|u1"' + "]}" * 50, bytes(1)),
    "deeper dtype": ("n:C:1:" + '{"f":' * 100_000, bytes(1)),
    "huge field": ('n:C:1:{"n":["a"],"f":[["|u1",[1000000000000]]],"o":[0],"i":1}', bytes(1)),
    "invalid text": ("s", b"\xff\xfe"),
    "list bomb": ("m", b"\x91" * 1_000_000),
    "dict bomb": ("m", b"\x81" * 1_000_000),
    "long list": ("m", b"\xdd\xff\xff\xff\xff"),
    "long lists": ("m", b"\xdd\x0f\xff\xff\xff" * 900),
    "long dict": ("m", b"\xdf\x0f\xff\xff\xff"),
    "tuple bomb": ("m", tuple_bomb(3000)),
    "truncated": ("m", b"\x92\x01"),
    "appended": ("m", b"\x01\x01"),
    "empty": ("m", b""),
    "invalid text inside": ("m", b"\xa2\xff\xff"),
    "unhashable key": ("m", extension(8, b"\x92\x90\x01")),
    "odd pairs": ("m", extension(8, b"\x91\x01")),
    "unknown extension": ("m", extension(99, b"\x92\x01\x02")),
    "bad datetime": ("m", extension(2, b"yesterday")),
    "bad decimal": ("m", extension(6, b"1.2.3")),
    "bad uuid": ("m", extension(11, b"123")),
    "bad timedelta": ("m", extension(5, msgspec.msgpack.encode([2**62, 0, 0]))),
    "buffer that is not there": ("m", extension(22, msgspec.msgpack.encode(["C:1000:|u1", 1000]))),
    "negative buffer": ("m:9", extension(22, msgspec.msgpack.encode(["C:0:|u1", -5])) + bytes(100)),
    "body longer than the payload": ("m:100", b"\x01"),
    "body of no number": ("m:x", b"\x01"),
    "body of negative length": ("m:-1", b"\x01\x02"),
    "Arrow that is none": ("a:t", b"not an arrow stream"),
    "empty Arrow": ("a:t", b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_payloads_are_corrupt_and_allocate_little(name: str) -> None:
    if "Arrow" in name:
        pytest.importorskip("pyarrow")
    schema, payload = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(CorruptMessage):
            decode_value(schema, memoryview(payload))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(payload) + 20 * len(schema) + 5_000_000


@given(st.text(max_size=30) | st.sampled_from(["s", "m", "m:1", "n:C:1:|u1"]), st.binary(max_size=200))
def test_whatever_the_bytes_only_message_errors_are_raised(schema: str, payload: bytes) -> None:
    if schema.startswith("a:"):
        return
    try:
        decode_value(schema, memoryview(payload))
    except MessageError as exc:
        assert exc.reason in ("corrupt", "newer")


class Stream:
    """Only the Arrow PyCapsule interface, as polars and pandas have it."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._data.__arrow_c_stream__(requested_schema)


class Columnar:
    """A library of its own that builds itself from Arrow data."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    @classmethod
    def from_arrow(cls, data: Any) -> Columnar:
        return cls(data.to_pylist())


def test_arrow_data_comes_back_as_pyarrow_has_it() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": [1, None, 3], "s": ["x", "yy", None]})
    batch = table.to_batches()[0]
    chunked = pa.chunked_array([[1], [2, 3]])
    array = pa.array([{"a": 1}, None])
    for value in (table, batch, chunked, array, table.slice(1, 1), table.schema.empty_table(), pa.array([], pa.int8())):
        arrived = back(value)
        assert type(arrived) is type(value)
        assert arrived.equals(value)
    assert back(Stream(table)).equals(table)
    assert back(Stream(chunked)).equals(chunked)
    assert back(table.to_reader()).equals(table)


def test_arrow_data_inside_containers_and_as_the_annotation_wants_it() -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": [1, 2]})
    arrived = back({"table": table, "image": np.zeros(1000), "columns": [Stream(table["a"])]})
    assert arrived["table"].equals(table)
    assert arrived["columns"][0].equals(table["a"])
    assert same(arrived["image"], np.zeros(1000))
    assert back(table, pa.RecordBatch).equals(table.to_batches()[0])
    assert back(table.to_batches()[0], pa.Table).equals(table)
    assert back(table, pa.RecordBatchReader).read_all().equals(table)
    assert back(table, Columnar).rows == [{"a": 1}, {"a": 2}]
    with pytest.raises(PayloadMismatch, match="tap-1"):
        back(table, np.ndarray)
    with pytest.raises(PayloadMismatch, match="tap-1"):
        back([1], pa.Table)


def test_compressed_arrow_data_is_refused_because_a_small_one_can_fill_the_memory() -> None:
    pa = pytest.importorskip("pyarrow")
    for columns in ({"a": np.zeros(100_000)}, {"d": pa.array(["a" * 1000] * 100).dictionary_encode()}):
        table, sink = pa.table(columns), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_table(table)
        with pytest.raises(CorruptMessage, match="compressed"):
            decode_value("a:t", memoryview(sink.getvalue()).cast("B"))


def test_data_frames_of_pandas_and_polars_come_back() -> None:
    pytest.importorskip("pyarrow")
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1, 2]}, index=[10, 20])
    assert back(frame, pandas.DataFrame).equals(frame)
    polars = pytest.importorskip("polars")
    assert back(polars.DataFrame({"a": [1]}), polars.DataFrame).equals(polars.DataFrame({"a": [1]}))
    with pytest.raises(UnsupportedType, match="Python objects"):
        encode_value(polars.Series([object()]))


def test_a_missing_pyarrow_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for attempt in (lambda: encode_value(Stream(None)), lambda: encode_value([Stream(None)]), lambda: decode_value("a:t", memoryview(b""))):
        with pytest.raises(MissingExtra, match=r"pip install 'edgeserve-streams\[arrow\]'"):
            attempt()
