"""`fetch=[...]`: messages whose value is a URL."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.relays import Scripted, answering, end

from edgeserve import Compute, DataSource, External, Materialize
from edgeserve.core.errors import ConfigurationError
from edgeserve.core.settings import state_directory
from edgeserve.stage.deadletter import DeadLetter

FILES = {f"/files/{n}.txt": f"hello {n}".encode() for n in range(5)}


@pytest.fixture
def node(tmp_path: Path) -> str:
    return f"local://{tmp_path}/store"


class Web(Scripted):
    """Serves `FILES`, and notes what was asked for. `busy`: so often it says first that it cannot now."""

    def __init__(self) -> None:
        self.busy = 0
        super().__init__(self._answer)

    def _answer(self, sock: socket.socket, head: bytes) -> None:
        content = FILES.get(self.asked[-1])
        if self.busy:
            self.busy -= 1
            answering("503 Busy")(sock, head)
        elif content is None:
            answering("404 Not Found")(sock, head)
        else:
            answering("200 OK", content)(sock, head)

    @property
    def asked(self) -> list[str]:
        return [head.split()[1].decode().partition("?")[0] for head in self.heads]


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


def send(node: str, source_id: str, *items: Any, **options: Any) -> None:
    with DataSource(items, node, source_id=source_id, topic="in", **options) as source:
        source.run()


def test_a_task_gets_the_bytes_that_a_url_names(node: str, web: Web) -> None:
    checksum = hashlib.sha256(b"hello 1").hexdigest()
    second = External(f"{web.url}/files/1.txt", size=7, checksum=f"sha256:{checksum}")
    with (
        DataSource([f"{web.url}/files/0.txt", second, b"as it is", "not a URL"], node, source_id="data", topic="in") as source,
        Compute(lambda data: [data], node, fetch=[f"{web.url}/files/"], topic_in="in", topic_out="out") as compute,
    ):
        assert next(source) == f"{web.url}/files/0.txt" and next(compute) == [b"hello 0"]
        assert next(source) == second and next(compute) == [b"hello 1"]
        next(source), next(source)
        assert (next(compute), next(compute)) == ([b"as it is"], ["not a URL"])
    send(node, "data", f"{web.url}/files/2.txt")
    seen: list[Any] = []
    with Materialize(seen.append, node, fetch=[web.url], topic="in") as sink:
        sink.run(until="end")
    assert seen == [b"hello 0", b"hello 1", b"as it is", "not a URL", b"hello 2"]


def test_without_a_list_a_url_is_text_and_a_reference_itself(node: str, web: Web) -> None:
    items = [f"{web.url}/files/0.txt", External(f"{web.url}/files/1.txt", size=7)]
    send(node, "data", *items)
    seen: list[Any] = []
    with Materialize(seen.append, node, topic="in") as sink:
        sink.run(until="end")
    assert seen == items and not web.heads


def of_path(path: Path) -> str:
    assert path.is_file() and path.suffix == ".txt"
    return f"{path}:{path.read_text()}"


def of_view(view: memoryview) -> bytes:
    return bytes(view)


def of_text(text: str) -> str:
    return text


def of_reference(reference: External) -> str:
    return reference.url


async def of_path_later(path: Path) -> str:
    return of_path(path)


def of_path_twice(path: Path) -> Iterator[str]:
    yield of_path(path)
    yield of_path(path)


def test_an_annotation_says_what_the_task_gets(node: str, web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/files/3.txt"
    (tmp_path / "own.txt").write_text("own")

    def made(task: Callable[..., Any], item: Any) -> Any:
        name = next(iter(task.__code__.co_varnames))
        allowed = [web.url, f"file://{tmp_path}/"]
        options: dict[str, Any] = {"topic_in": f"in-{task.__name__}", "topic_out": f"out-{task.__name__}", "fetch": allowed}
        with DataSource([item], node, source_id=name, topic=options["topic_in"]) as source, Compute(task, node, **options) as compute:
            next(source)
            return next(compute)

    for task in (of_path, of_path_later):
        path, _, text = made(task, url).partition(":")
        assert text == "hello 3" and not Path(path).exists() and path.startswith(str(state_directory() / "fetched"))
    path, _, text = made(of_path_twice, url)[1].partition(":")
    assert text == "hello 3" and not Path(path).exists()
    assert not list((state_directory() / "fetched").iterdir())
    assert made(of_view, External(url)) == b"hello 3"
    (tmp_path / "store-2").mkdir()
    with (
        DataSource([f"file://{tmp_path}/own.txt"], f"{node}-2", source_id="path", topic="in") as source,
        Compute(of_path, f"{node}-2", topic_in="in", fetch=[f"file://{tmp_path}"]) as compute,
    ):
        next(source)
        assert next(compute) == f"{tmp_path}/own.txt:own"
    before = len(web.heads)
    with pytest.raises(ConfigurationError, match="takes what is fetched"):
        Compute(of_text, node, fetch=[web.url])
    assert len(web.heads) == before


def test_other_inputs_of_a_join_are_what_they_were(node: str, web: Web) -> None:
    def joined(frame: bytes, name: str, place: External, speed: float) -> list[Any]:
        return [frame, name, place.url, speed]

    url = f"{web.url}/files/1.txt"
    for source_id, item in (("name", url), ("place", External(url)), ("speed", 3), ("frame", url)):
        send(node, source_id, item)
    with Compute(joined, node, fetch=[web.url], topic_in="in", timeout_ms=20_000) as compute:
        while (result := next(compute)) is None:
            pass
    assert result == [b"hello 1", url, url, 3.0] and len(web.heads) == 1


def test_only_what_a_set_runs_on_is_fetched_and_once(node: str, web: Web) -> None:
    """Superseded and gated messages never are; a message that is part of two sets, or of one that is tried again, is once."""
    attempts: list[str] = []

    def joined(a: bytes, b: str) -> str:
        attempts.append(b)
        if len(attempts) == 1:
            raise ValueError("once more")
        return a.decode() + b

    send(node, "a", *(f"{web.url}/files/{n}.txt" for n in range(5)))
    send(node, "b", "x", "y", "no")
    results = []
    options: dict[str, Any] = {"topic_in": "in", "topic_out": "out", "retry_backoff_ms": 1}
    with Compute(joined, node, fetch=[web.url], gate_in=lambda value: None if value == "no" else value, **options) as compute:
        compute.run(until="end")
    with Materialize(results.append, node, topic="out") as sink:
        sink.run(until="end")
    assert results == ["hello 4x", "hello 4y"] and attempts == ["x", "x", "y"]
    assert web.asked == ["/files/4.txt"]


def test_passing_trouble_is_tried_again_and_what_is_gone_is_not(
    node: str, web: Web, dead_letters: Callable[[str], list[DeadLetter]], caplog: pytest.LogCaptureFixture
) -> None:
    web.busy = 2
    urls = [f"{web.url}/files/0.txt", f"{web.url}/none?token=sesame", "http://169.254.169.254/latest?token=sesame", "ftp://me:sesame@x/y"]
    send(node, "data", *urls, External(f"{web.url}/files/1.txt", size=3))
    seen: list[bytes] = []

    def keep(data: bytes) -> None:
        seen.append(data)

    options: dict[str, Any] = {"topic_in": "in", "group": "g", "retry_backoff_ms": 1}
    with caplog.at_level(logging.DEBUG), Compute(keep, node, fetch=[web.url], **options) as compute:
        compute.run(until="end")
        counters = compute.counters
    assert seen == [b"hello 0"]
    assert web.asked == ["/files/0.txt"] * 3 + ["/none", "/files/1.txt"]
    assert (counters["payload_gone"], counters["not_allowed"], counters["corrupt"]) == (1, 2, 1)
    letters = dead_letters("in.g.dead-letters")
    assert [letter.error.partition(":")[0] for letter in letters] == ["PayloadGone", "NotAllowed", "NotAllowed", "CorruptMessage"]
    assert not [letter for letter in letters if "sesame" in letter.error + letter.traceback]
    assert "sesame" not in caplog.text


def test_who_stops_meanwhile_leaves_no_copy(node: str, web: Web, dead_letters: Callable[[str], list[DeadLetter]]) -> None:
    """A copy goes with the call, also where the download broke off."""
    server = Scripted(lambda sock, _: (sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123"), end(sock)) and None)
    try:
        send(node, "path", f"{server.url}/x.txt")
        with Compute(of_path, node, fetch=[server.url], topic_in="in", group="g", retries=0) as compute:
            compute.run(until="end")
            assert not list((state_directory() / "fetched").glob("*/*"))
    finally:
        server.close()
    (letter,) = dead_letters("in.g.dead-letters")
    assert "FetchError" in letter.error and "3 bytes" in letter.error


@pytest.mark.parametrize(
    "keywords",
    [
        {"fetch": "https://x/"},
        {"fetch": ["x"]},
        {"fetch": [5]},
        {"fetch_max_bytes": 0},
        {"fetch_timeout_ms": 0},
        {"fetch": ["file:///x"], "ftp": True},
    ],
)
def test_a_keyword_that_is_none_is_refused_by_name(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(keywords))):
        Compute(len, "memory://x", **keywords)


def test_a_copy_that_there_is_no_room_for_is_named_and_goes(
    node: str, small_disk: Path, dead_letters: Callable[[str], list[DeadLetter]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(small_disk))
    server = Scripted(answering("200 OK", bytes(30_000_000)))
    try:
        send(node, "path", f"{server.url}/x.txt")
        with Compute(of_path, node, fetch=[server.url], topic_in="in", group="g", retries=0) as compute:
            compute.run(until="end")
    finally:
        server.close()
    (letter,) = dead_letters("in.g.dead-letters")
    assert "FetchError" in letter.error and "cannot be kept: No space left" in letter.error
    assert not list((small_disk / "fetched").iterdir())
