"""The reader of pickle logs gives what was pickled, and for anything else one of its own errors, without running or importing anything."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import pickle
import pickletools
import struct
import uuid
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeserve.cli.picklelog import DamagedPickle, Limits, OversizedPickle, PickleLogError, UnsafePickle, read_records

LIMITS = Limits(value_bytes=1000, record_bytes=5000, instructions=2000, memo=500, values=2000, depth=50)


def read(data: bytes, limits: Limits | None = None) -> list:
    return list(read_records(io.BytesIO(data), limits or Limits()))


def as_json(value):
    """What a value becomes, written down a second time and apart from the reader."""
    match value:
        case bytes() | bytearray():
            return {"base64": base64.b64encode(value).decode()}
        case uuid.UUID():
            return str(value)
        case float() if math.isnan(value) or math.isinf(value):
            return str(value)
        case dict() if all(isinstance(key, str) for key in value):
            return {key: as_json(item) for key, item in value.items()}
        case dict():
            return {"pairs": [[as_json(key), as_json(item)] for key, item in value.items()]}
        case list() | tuple() | set() | frozenset():
            return [as_json(item) for item in value]
    return value


texts = st.text(st.characters(exclude_categories=()), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=30)
keys = scalars.filter(lambda key: key == key)


def nested(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.lists(inner, max_size=5).map(tuple)
            | st.dictionaries(texts, inner, max_size=5)
            | st.dictionaries(keys | st.tuples(keys, keys), inner, max_size=5)
        ),
        max_leaves=20,
    )


@given(st.lists(st.tuples(nested(scalars), st.integers(0, pickle.HIGHEST_PROTOCOL)), max_size=4))
def test_data_of_every_protocol_is_read_one_after_the_other(records):
    data = b"".join(pickle.dumps(value, protocol) for value, protocol in records)
    found = read(data)
    assert json.loads(json.dumps(found, allow_nan=False)) == [as_json(value) for value, _ in records]


@given(nested(scalars | st.uuids()), st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_uuids_are_text(value, protocol):
    assert read(pickle.dumps(value, protocol)) == [as_json(value)]


@given(nested(scalars | st.sets(keys) | st.frozensets(keys) | st.binary().map(bytearray)))
def test_sets_and_bytearrays_of_new_protocols_are_read(value):
    assert read(pickle.dumps(value, 5)) == [as_json(value)]


@given(nested(scalars), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_the_pure_python_pickler_and_the_optimizer_write_nothing_else(value, protocol):
    file = io.BytesIO()
    pickle._Pickler(file, protocol).dump(value)
    assert read(file.getvalue()) == read(pickletools.optimize(file.getvalue())) == [as_json(value)]


def test_shared_values_are_written_as_often_as_they_occur():
    shared = [1, b"x"]
    assert read(pickle.dumps({"a": shared, "b": shared})) == [{"a": as_json(shared), "b": as_json(shared)}]


def test_a_uuid_of_python_3_7_is_read():
    """There a UUID's state held the way in which it was made, too."""
    number = uuid.uuid4()
    data = b"\x80\x03cuuid\nUUID\nq\x00)\x81q\x01}q\x02(X\x03\x00\x00\x00intq\x03\x8a\x11" + number.int.to_bytes(17, "little")
    data += b"X\x07\x00\x00\x00is_safeq\x04cuuid\nSafeUUID\nq\x05K\x00\x85q\x06Rq\x07ub."
    assert str(pickle.loads(data)) == str(number)
    assert read(data) == [str(number)]


# --- hostile files --------------------------------------------------------------------------------------------


_INSTRUCTIONS = [op.code.encode("latin-1") for op in pickletools.opcodes]
programs = st.lists(st.sampled_from(_INSTRUCTIONS) | st.binary(max_size=9) | st.just(b"0\n") | st.just(b"uuid\nUUID\n")).map(b"".join)


@settings(max_examples=500)
@given(st.binary(max_size=200) | programs)
@example(b"")
@example(b"S'\\q'\n.")
@example(b"I1e400\n.")
@example(b"F1e400\n.")
def test_any_bytes_are_read_or_refused_by_name(data):
    try:
        found = read(data, LIMITS)
    except PickleLogError as error:
        assert 0 <= error.offset <= len(data) and error.record >= 1 and error.to_do
    else:
        json.dumps(found, allow_nan=False)


@given(nested(scalars | st.uuids()), st.data())
def test_damaged_records_are_read_or_refused_by_name(value, data):
    whole = bytearray(pickle.dumps(value, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        json.dumps(read(bytes(whole), LIMITS), allow_nan=False)
    except PickleLogError:
        pass


@given(nested(scalars), st.integers(0, pickle.HIGHEST_PROTOCOL), st.data())
def test_a_truncated_record_is_refused_after_those_before_it(value, protocol, data):
    whole = pickle.dumps(value, protocol)
    cut = data.draw(st.integers(1, len(whole) - 1))
    records = read_records(io.BytesIO(pickle.dumps("before") + whole[:cut]))
    assert next(records) == "before"
    with pytest.raises(DamagedPickle, match="record 2"):
        next(records)


class Calls:
    """Pickles as a call: `Calls(os.system, "...")`."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"msg_out_payload": [v]}], ids=["bare", "inside"])
def test_a_call_is_refused_and_not_made(protocol, wrap, tmp_path):
    data = pickle.dumps(wrap(Calls(os.system, f"touch {tmp_path}/ran")), protocol)
    with pytest.raises(UnsafePickle, match=r"names 'posix.system', which is no plain data \(record 1, byte \d+\)") as caught:
        read(data)
    name = "STACK_GLOBAL" if protocol >= 4 else "GLOBAL"
    assert (name, caught.value.offset) in [(op.name, at) for op, _, at in pickletools.genops(data)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [Calls(eval, "1"), Calls(__import__, "this"), np.zeros(3), Limits(), Limits, range(3), 1j],
    ids=lambda value: type(value).__name__,
)
def test_objects_are_refused_by_name(value):
    with pytest.raises(UnsafePickle, match="names"):
        read(pickle.dumps(value))


@pytest.mark.parametrize(
    "name", ["INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER", "BINSTRING", "DUP"]
)
def test_the_other_instructions_are_refused_by_name_before_their_argument_is_read(name):
    code = next(op.code for op in pickletools.opcodes if op.name == name)
    with pytest.raises(UnsafePickle, match=rf"the instruction {name} .*byte 1\)"):
        read(b"N" + code.encode("latin-1"))


@pytest.mark.parametrize(
    "data",
    [
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x06\x00\x00\x00rot_13tR.",
        b"c__builtin__\nbytes\n(K\x09tR.",
        b"cuuid\nUUID\n(X\x01\x00\x00\x00atR.",
        b"cuuid\nUUID\n.",
        pickle.dumps(uuid.SafeUUID.safe),
        b"cuuid\nUUID\n)\x81.",
        b"cuuid\nUUID\n)\x81NbK\x01.",
        b"cuuid\nUUID\n)\x81}X\x03\x00\x00\x00int\x8a\x12" + b"\x01" * 18 + b"sb.",
        b"c_codecs\nencode\n)\x81.",
        b"]}b.",
        b"\x80\x06N.",
    ],
)
def test_the_known_names_do_nothing_else_than_they_are_known_for(data):
    with pytest.raises(UnsafePickle):
        read(data)


def test_a_memo_bomb_is_refused():
    """Thirty lists, each with ten times the one before: a hundred bytes of pickle, 10^30 values."""
    bomb = ["lol"]
    for _ in range(30):
        bomb = [bomb] * 10
    with pytest.raises(OversizedPickle, match="values"):
        read(pickle.dumps(bomb), replace(Limits(), values=100_000))


def test_a_bomb_of_one_long_value_or_key_is_refused():
    for bomb in ([b"x" * 900] * 10, [{"x" * 900: 1}] * 10):
        with pytest.raises(OversizedPickle, match="written out"):
            read(pickle.dumps(bomb), LIMITS)


@pytest.mark.parametrize("code", [b"X", b"B", b"\x8a", b"\x8b", b"\x8d", b"\x8e", b"\x96"])
def test_a_length_without_its_bytes_is_refused_before_they_are_asked_for(code):
    size = {b"\x8a": b"\xff", b"X": struct.pack("<I", 10**9), b"B": struct.pack("<I", 10**9), b"\x8b": struct.pack("<i", 10**9)}
    with pytest.raises(PickleLogError) as caught:
        read(code + size.get(code, struct.pack("<Q", 2**63 - 1)) + b"abc")
    assert isinstance(caught.value, DamagedPickle if code == b"\x8a" else OversizedPickle)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"(" * 1990 + b"N.", "exactly one value"),
        (b"]" * 3000, "instructions"),
        (b"I" + b"9" * 2000 + b"\n.", "value of"),
        (b"X\x20\x03\x00\x00" + b"a" * 800 + b"0", "record of"),
        (b"N" + b"p500\n.", "memo"),
        (b"Np-1\n.", "memo"),
    ],
    ids=["marks", "stack", "line", "record", "memo", "negative"],
)
def test_the_bounds_of_a_record(data, what):
    with pytest.raises((OversizedPickle, DamagedPickle), match=what):
        read(data * 10, LIMITS)


def test_nesting_is_bounded_and_a_value_that_contains_itself_is_seen():
    itself: list = []
    itself.append(itself)
    through: tuple = ([],)
    through[0].append(through)
    deep: list = []
    for _ in range(60):
        deep = [deep]
    for value in (itself, through, deep):
        with pytest.raises(OversizedPickle, match="deep in each other"):
            read(pickle.dumps(value), LIMITS)


def test_a_million_levels_cost_no_stack():
    for begin, end in ((b"]", b"a"), (b"(", b"t"), (b"(", b"l"), (b"(K\x01", b"d")):
        with pytest.raises(PickleLogError):
            read(begin * 600_000 + b"N" + end * 600_000 + b".")


def test_a_long_integer_is_refused():
    with pytest.raises(OversizedPickle, match="integer"):
        read(pickle.dumps(1 << 9000))


def test_nothing_is_imported_for_a_name():
    import sys

    with pytest.raises(UnsafePickle):
        read(b"cantigravity\nfly\n)R.")
    assert "antigravity" not in sys.modules
