"""`edgeserve log convert` writes the prototype's logs as JSON lines, and runs nothing that is in them."""

from __future__ import annotations

import io
import json
import os
import pickle
import uuid

import pytest


class Hostile:
    def __reduce__(self):
        return os.system, ("touch ran",)


def write(path, *records) -> None:
    """As the prototype does: one pickle after another, of the default protocol."""
    with path.open("ab") as file:
        for record in records:
            pickle.dump(record, file)


@pytest.fixture
def number() -> uuid.UUID:
    return uuid.uuid4()


@pytest.fixture
def compute_log(tmp_path, number):
    record = {
        "msg_in_uuid": {"data1": number, "data2": number},
        "msg_in_payload": {"data1": b"\x00\xff", "data2": "zwölf"},
        "msg_out_uuid": None,
        "msg_out_payload": b"",
        "msg_publish_time_ms": {"data1": 1_700_000_000_000},
        "start_compute_time_ms": 1_700_000_000_000.25,
        "is_join_performed": True,
    }
    write(tmp_path / "w.compute", record, record | {"is_join_performed": False})
    return tmp_path / "w.compute"


def test_each_record_becomes_a_line(edgeserve, compute_log, number):
    done = edgeserve("log", "convert", "w.compute")
    assert done.returncode == 0 and done.stderr == ""
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == {
        "msg_in_uuid": {"data1": str(number), "data2": str(number)},
        "msg_in_payload": {"data1": {"base64": "AP8="}, "data2": "zwölf"},
        "msg_out_uuid": None,
        "msg_out_payload": {"base64": ""},
        "msg_publish_time_ms": {"data1": 1_700_000_000_000},
        "start_compute_time_ms": 1_700_000_000_000.25,
        "is_join_performed": True,
    }
    assert second["is_join_performed"] is False


def test_several_files_go_into_one_new_file(edgeserve, compute_log, tmp_path):
    write(tmp_path / "w.output", b"result")
    done = edgeserve("log", "convert", "w.compute", "w.output", "--out", "all.jsonl")
    assert (done.returncode, done.stdout) == (0, "converted 3 records to all.jsonl\n")
    assert (tmp_path / "all.jsonl").read_text().splitlines()[2] == '{"base64": "cmVzdWx0"}'
    done = edgeserve("log", "convert", "w.output", "--out", "one.jsonl", "--json")
    assert json.loads(done.stdout) == {"out": "one.jsonl", "records": 1, "files": {"w.output": 1}}


def test_a_file_that_is_there_is_not_written_over(edgeserve, compute_log):
    before = compute_log.read_bytes()
    done = edgeserve("log", "convert", "w.compute", "--out", "w.compute")
    assert done.returncode == 1 and "w.compute is there already" in done.stderr
    assert compute_log.read_bytes() == before


def test_an_empty_log_has_no_records(edgeserve, tmp_path):
    (tmp_path / "empty.compute").touch()
    done = edgeserve("log", "convert", "empty.compute")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_hostile_file_is_refused_and_nothing_of_it_runs(edgeserve, compute_log, tmp_path):
    write(compute_log, Hostile())
    done = edgeserve("log", "convert", "w.compute", "--out", "out.jsonl")
    what, where, to_do = done.stderr.splitlines()
    assert done.returncode == 1
    assert what.startswith("error: UnsafePickle: STACK_GLOBAL names 'posix.system'")
    assert where.startswith("where: w.compute, byte ") and where.endswith("after 2 converted records")
    assert to_do.startswith("to do: if you trust who wrote the file")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (pickle.dumps(Hostile(), 0), "UnsafePickle"),
        (b"X" + (10**9).to_bytes(4, "little") + b"abc", "OversizedPickle"),
        (pickle.dumps({"a": 1})[:-1], "DamagedPickle"),
        (b'{"a": 1}\n', "DamagedPickle"),
    ],
    ids=["call", "length", "truncated", "json"],
)
def test_the_error_is_named_for_programs_too(edgeserve, tmp_path, data, name):
    (tmp_path / "bad.log").write_bytes(data)
    done = edgeserve("log", "convert", "bad.log", "--json")
    assert done.returncode == 1
    assert json.loads(done.stderr)["error"]["what"].startswith(f"{name}: ")
    assert not (tmp_path / "ran").exists()


def test_a_memo_bomb_is_refused_at_the_real_limits(edgeserve, tmp_path):
    bomb = ["lol"]
    for _ in range(30):
        bomb = [bomb] * 10
    file = io.BytesIO()
    pickle.dump(bomb, file)
    (tmp_path / "bomb.log").write_bytes(file.getvalue())
    done = edgeserve("log", "convert", "bomb.log")
    assert done.returncode == 1 and "OversizedPickle" in done.stderr and done.stdout == ""


def test_what_a_log_holds_does_not_command_the_terminal(edgeserve, tmp_path):
    (tmp_path / "bad.log").write_bytes(b"c\x1b[2Jm\nn\n.")
    assert "\x1b" not in edgeserve("log", "convert", "bad.log").stderr
