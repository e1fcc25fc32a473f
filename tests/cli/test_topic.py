"""`edgeserve topic` shows what a node holds and changes nothing that it only looks at."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from edgeserve.data_source import DataSource
from edgeserve.transport import connect, disconnect

from .conftest import COMMAND


def send(node: str, *values: object, topic: str = "letters") -> None:
    with DataSource(list(values), node, source_id="test", topic=topic) as source:
        for _ in values:
            next(source)


def lines(result) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_what_is_published_is_echoed(edgeserve, node):
    assert edgeserve("topic", "pub", "letters", "a", "b", "--source-id", "me", "--node", node).stdout == "sent 2 to letters as me\n"
    found = lines(edgeserve("topic", "echo", "letters", "--json", "--node", node))
    assert [m["value"] for m in found] == ["a", "b"]
    assert [m["position"] for m in found] == [0, 1]
    assert {m["source_id"] for m in found} == {"me"}


def test_the_node_comes_from_the_environment(edgeserve, node):
    env = {"EDGESERVE_NODE": node}
    edgeserve("topic", "pub", "letters", "a", "--source-id", "me", env=env)
    assert [t["topic"] for t in json.loads(edgeserve("topic", "list", "--json", env=env).stdout)] == ["letters"]


def test_without_a_node_the_state_directory_is_used(edgeserve):
    edgeserve("topic", "pub", "letters", "a", "--source-id", "me")
    assert [t["topic"] for t in json.loads(edgeserve("topic", "list", "--json").stdout)] == ["letters"]


def test_json_values_files_and_standard_input(edgeserve, node, tmp_path):
    (tmp_path / "blob").write_bytes(b"\x00\xff")
    common = ("--source-id", "me", "--node", node)
    edgeserve("topic", "pub", "letters", '{"a": [1, 2.5, null]}', "7", "--json-value", *common)
    edgeserve("topic", "pub", "letters", "--file", "blob", *common)
    edgeserve("topic", "pub", "letters", *common, stdin="first\nsecond\n")
    found = lines(edgeserve("topic", "echo", "letters", "--json", "--node", node))
    assert [m["value"] for m in found] == [{"a": [1, 2.5, None]}, 7, {"base64": "AP8="}, "first", "second"]


def test_a_value_that_is_not_json_sends_nothing(edgeserve, node):
    result = edgeserve("topic", "pub", "letters", "1", "{a", "--json-value", "--source-id", "me", "--node", node)
    assert result.returncode == 1
    assert result.stderr.startswith("error: not JSON: '{a'")
    assert edgeserve("topic", "list", "--node", node).stderr.startswith("error: there is no store")


def test_a_number_that_json_does_not_have_is_refused(edgeserve, node):
    result = edgeserve("topic", "pub", "letters", '{"a": NaN}', "--json-value", "--source-id", "me", "--node", node)
    assert result.returncode == 1
    assert result.stderr.startswith("error: not JSON: '{\"a\": NaN}' (JSON has no NaN)")


def test_a_name_does_not_break_the_line_that_it_stands_on(edgeserve, node):
    send(node, 1, topic="two\nlines\x1b[2J")
    text = edgeserve("topic", "list", "--node", node).stdout
    assert text.splitlines()[1].split()[0] == r"two\nlines\x1b[2J"
    assert r"topic     two\nlines" in edgeserve("topic", "info", "two\nlines\x1b[2J", "--node", node).stdout


def test_ctrl_c_while_the_command_is_still_being_imported_is_an_end_without_a_traceback():
    program = """
import sys

class CtrlC:
    def find_spec(self, name, *_):
        if name == "numpy":
            raise KeyboardInterrupt

sys.meta_path.insert(0, CtrlC())
from edgeserve.cli import main
main(["topic", "list"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_null_cannot_be_sent(edgeserve, node):
    result = edgeserve("topic", "pub", "letters", "null", "--json-value", "--source-id", "me", "--node", node)
    assert result.returncode == 1
    assert "null" in result.stderr


def test_arrays_and_odd_numbers_have_a_json_form(edgeserve, node):
    send(node, np.array([[1, 2]], dtype=np.int16), float("nan"), np.float64(0.5))
    assert [m["value"] for m in lines(edgeserve("topic", "echo", "letters", "--json", "--node", node))] == [[[1, 2]], "nan", 0.5]


def test_count_and_info(edgeserve, node):
    send(node, 1, 2, 3)
    assert len(lines(edgeserve("topic", "echo", "letters", "--count", "2", "--json", "--node", node))) == 2
    found = json.loads(edgeserve("topic", "info", "letters", "--json", "--node", node).stdout)
    assert (found["messages"], found["first"], found["next"], found["groups"]) == (3, 0, 3, {})


def test_echo_leaves_no_group_behind(edgeserve, node):
    send(node, 1)
    edgeserve("topic", "echo", "letters", "--node", node)
    assert json.loads(edgeserve("topic", "info", "letters", "--json", "--node", node).stdout)["groups"] == {}


def test_info_shows_how_far_a_group_is(edgeserve, node):
    send(node, 1, 2, 3)
    transport = connect(node)
    try:
        member = transport.subscribe(["letters"], "readers", member="one")
        frames = member.receive(2, timeout_ms=5000)
        member.settle({"letters": [frames[0][1]]})
        member.flush()
        found = json.loads(edgeserve("topic", "info", "letters", "--json", "--node", node).stdout)["groups"]["readers"]
        assert (found["members"], found["backlog"], found["claimed"]) == (["one"], 2, 1)
        text = edgeserve("topic", "info", "letters", "--node", node).stdout
        assert "readers  shared" in text
        member.close()
    finally:
        disconnect(transport)


def test_follow_shows_what_comes_later(edgeserve, node):
    send(node, "before")
    command = [COMMAND, "topic", "echo", "letters", "--start", "latest", "--count", "1", "--json", "--node", node]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        # When it has begun to look cannot be seen from here, so messages are sent until it has seen one.
        seen = threading.Event()
        number = 0
        while not seen.wait(0.2) and process.poll() is None:
            send(node, f"after {number}")
            number += 1
            assert number < 200
        assert process.stdout is not None
        assert json.loads(process.stdout.read())["value"].startswith("after ")
        assert process.wait(30) == 0


def test_follow_ends_on_interrupt(node):
    send(node, "one")
    command = [COMMAND, "topic", "echo", "letters", "--follow", "--json", "--node", node]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["value"] == "one"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_a_reader_that_goes_away_is_no_error(node):
    send(node, *["x" * 1000] * 500)
    command = [COMMAND, "topic", "echo", "letters", "--node", node]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(30) == 0


def test_a_foreign_frame_is_shown_as_one(edgeserve, node):
    transport = connect(node)
    try:
        publisher = transport.publisher("letters")
        publisher.publish([b"GET / HTTP/1.1"])
        publisher.close()
    finally:
        disconnect(transport)
    send(node, "good")
    found = lines(edgeserve("topic", "echo", "letters", "--json", "--node", node))
    assert found[0]["error"].startswith("ForeignMessage: ")
    assert found[1]["value"] == "good"


def test_what_a_message_holds_does_not_command_the_terminal(edgeserve, node):
    send(node, "\x1b[2Jgone\r\x07")
    text = edgeserve("topic", "echo", "letters", "--node", node).stdout
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text
    assert "gone" in text


@pytest.mark.parametrize("command", [("info", "nothing"), ("echo", "nothing"), ("dead-letters", "nothing")])
def test_an_unknown_topic_is_three_lines(edgeserve, node, command):
    send(node, 1)
    result = edgeserve("topic", *command, "--node", node)
    assert result.returncode == 1
    error, where, to_do = result.stderr.splitlines()
    assert error.startswith("error: ") and "nothing" in error
    assert where == f"where: edgeserve topic {command[0]} --node {node}"
    assert to_do.startswith("to do: ")


def test_an_error_is_json_where_the_command_speaks_json(edgeserve):
    result = edgeserve("topic", "list", "--json", "--node", "carrier-pigeon://roof")
    assert result.returncode == 1
    assert set(json.loads(result.stderr)["error"]) == {"what", "where", "to_do"}
    usage = edgeserve("topic", "echo", "--json")
    assert usage.returncode == 2
    assert "TOPIC" in json.loads(usage.stderr)["error"]["what"]


def test_json_goes_through_a_terminal_that_knows_ascii_only(edgeserve, node):
    send(node, "zażółć \udcff"[:6])
    for command in (("echo", "letters"), ("info", "ł")):
        result = edgeserve("topic", *command, "--node", node, "--json", env={"PYTHONIOENCODING": "ascii"})
        text = result.stdout or result.stderr
        assert text.isascii() and json.loads(text)


def test_a_traceback_comes_with_verbose_only(edgeserve):
    quiet = edgeserve("topic", "list", "--node", "carrier-pigeon://roof")
    loud = edgeserve("topic", "list", "--node", "carrier-pigeon://roof", "--verbose")
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert loud.stderr.endswith(quiet.stderr)


def test_colours_on_a_terminal_only(edgeserve, node):
    send(node, 1)
    assert "\x1b" not in edgeserve("topic", "list", "--node", node).stdout
    ours, theirs = pty.openpty()
    try:
        env = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
        subprocess.run([COMMAND, "topic", "list", "--node", node], stdout=theirs, timeout=60, check=True, env=env)
        assert b"\x1b[1m" in os.read(ours, 65536)
    finally:
        os.close(ours)
        os.close(theirs)


def test_dead_letters_show_why(edgeserve, node):
    from edgeserve.stage.deadletter import DeadLetter, dead_letter_topic, encode_dead_letter

    letter = DeadLetter(
        reason="dead_letter",
        error="ValueError: \x1bbad",
        traceback="Traceback\n  line 7\nValueError: bad",
        input_ids=["00ff"],
        attempts=3,
        time_ns=1_700_000_000_000_000_000,
        frames=[b"x"],
        topic="letters",
        group="readers",
        source_ids=["me"],
    )
    send(node, 1)
    transport = connect(node)
    try:
        publisher = transport.publisher(dead_letter_topic("letters", "readers"))
        publisher.publish([encode_dead_letter(letter), b"rubbish"])
        publisher.close()
    finally:
        disconnect(transport)
    found = json.loads(edgeserve("topic", "dead-letters", "letters", "--json", "--node", node).stdout)
    assert [f["reason"] for f in found] == ["dead_letter", "foreign"]
    assert {key: found[0][key] for key in ("error", "input_ids", "attempts", "topic", "group", "dead_letter_topic")} == {
        "error": "ValueError: \x1bbad",
        "input_ids": ["00ff"],
        "attempts": 3,
        "topic": "letters",
        "group": "readers",
        "dead_letter_topic": "letters.readers.dead-letters",
    }
    text = edgeserve("topic", "dead-letters", "letters", "--node", node).stdout
    assert "\x1b" not in text
    for part in ("2 dead letters of letters", "2023-11-14 22:13:20", "dead_letter: ValueError: ", "00ff", "line 7", "attempts  3"):
        assert part in text
    newest = json.loads(edgeserve("topic", "dead-letters", "letters.readers.dead-letters", "--count", "1", "--json", "--node", node).stdout)
    assert [f["reason"] for f in newest] == ["foreign"]


def test_a_forgotten_group_holds_no_backlog_and_a_live_one_is_refused(edgeserve, node):
    send(node, "a", "b")
    transport = connect(node)
    member = transport.subscribe(["letters"], "readers")
    refused = edgeserve("topic", "forget", "letters", "readers", "--node", node)
    assert refused.returncode != 0
    assert "live members" in refused.stderr
    member.close()
    disconnect(transport)
    assert edgeserve("topic", "forget", "letters", "readers", "--node", node).stdout == "forgot group readers of letters\n"
    assert json.loads(edgeserve("topic", "info", "letters", "--json", "--node", node).stdout)["groups"] == {}
    assert "no group" in edgeserve("topic", "forget", "letters", "readers", "--node", node).stderr


def test_a_topic_is_deleted_when_the_user_says_so(edgeserve, node):
    send(node, 1, 2)
    command = [COMMAND, "topic", "delete", "letters", "--node", node]
    for answer, status in (("n", 1), ("y", 0)):
        ours, theirs = pty.openpty()
        with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            os.write(ours, f"{answer}\n".encode())
            stdout, stderr = process.communicate(timeout=60)
        os.close(ours)
        os.close(theirs)
        assert (process.returncode, stdout) == (status, "" if status else "deleted letters\n")
        assert "letters: 2 messages, 0 groups" in stderr
    assert edgeserve("topic", "delete", "letters", "--yes", "--node", node).stderr.startswith("error: there is no topic 'letters'")
    assert json.loads(edgeserve("topic", "list", "--json", "--node", node).stdout) == []


def test_dead_letters_outlive_their_topic(edgeserve, node):
    for topic in ("letters", "letters.readers.dead-letters"):
        send(node, 1, topic=topic)
    text = edgeserve("topic", "delete", "letters", "--yes", "--node", node).stdout
    assert text.startswith("deleted letters\nkept letters.readers.dead-letters, ")


@pytest.mark.parametrize("look", [("list",), ("info", "t"), ("echo", "t"), ("dead-letters", "t"), ("forget", "t", "g"), ("delete", "t")])
def test_looking_makes_no_store(edgeserve, tmp_path, look):
    result = edgeserve("topic", *look, "--node", f"local://{tmp_path}/typo")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: there is no store in {tmp_path}/typo")
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("command", [("list",), ("echo", "t", "--follow"), ("pub", "t", "1", "--source-id", "a")])
def test_another_process_s_memory_is_not_looked_at(edgeserve, command):
    result = edgeserve("topic", *command, "--node", "memory://x")
    assert result.returncode == 1
    assert "memory://x is the memory of one process" in result.stderr
