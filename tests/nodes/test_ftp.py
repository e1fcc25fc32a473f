"""`ftp=True`: messages that name files."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from tests.ftp_server import Ftp, FTPHandler
from tests.nodes.conftest import running
from tests.waiting import until

from edgeserve.compute import Compute
from edgeserve.core.errors import ConfigurationError, ReceiveTimeout
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.stage.deadletter import DeadLetter


@pytest.fixture
def node(tmp_path: Path) -> str:
    return f"local://{tmp_path}/store"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ftp" / "files").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "ftp" / "files" / f"{n}.txt").write_text(f"hello {n}")
    return tmp_path / "ftp"


@pytest.fixture
def server(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ftp]:
    served = Ftp(root)
    monkeypatch.setenv("EDGESERVE_FTP_URL", served.url)
    yield served
    served.close()


def urls(server: Ftp) -> list[str]:
    return [f"{server.url}/files/{n}.txt" for n in range(3)]


def text_of(file_path: str) -> str:
    return Path(file_path).read_text() + "!"


def test_files_go_from_node_to_node_by_their_urls(node: str, server: Ftp, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    seen: list[str] = []
    with (
        DataSource(urls(server), node, source_id="file_path", topic="in") as source,
        Compute(text_of, node, ftp=True, local_ftp_path=str(copies), topic_in="in", topic_out="mid") as compute,
    ):
        for n, url in enumerate(urls(server)):
            assert next(source) == url
            made = next(compute)
            assert made.startswith(f"{server.url}/files/ftp_output/")
            # This machine's server serves another directory than the copies are in.
            result = copies / made.removeprefix(f"{server.url}/")
            assert result.read_text() == f"hello {n}!"
            assert (copies / "files" / f"{n}.txt").read_text() == f"hello {n}"
    with (
        DataSource(urls(server), node, source_id="x", topic="end") as source,
        Materialize(lambda path: seen.append(Path(path).read_text()), node, ftp=True, local_ftp_path=str(copies), topic="end") as sink,
    ):
        for url in urls(server):
            assert next(source) == url
            assert next(sink) == url
    assert seen == ["hello 0", "hello 1", "hello 2"]


def test_a_copy_that_the_server_serves_itself_survives_its_deletion(node: str, server: Ftp, root: Path) -> None:
    with (
        DataSource(urls(server), node, source_id="file_path", topic="in", gate=str.encode) as source,
        Compute(text_of, node, ftp=True, ftp_delete=True, local_ftp_path=f"{root}/", topic_in="in", gate_in=bytes.decode) as compute,
    ):
        for n in range(3):
            next(source)
            with urlopen(next(compute)) as made:
                assert made.read() == f"hello {n}!".encode()
    assert sorted(path.name for path in (root / "files").glob("*.txt")) == ["0.txt", "1.txt", "2.txt"]
    assert not list(root.glob(".edgeserve-parts/*"))


def test_what_is_in_files_comes_as_bytes_and_is_deleted_when_it_is_settled(node: str, server: Ftp, root: Path) -> None:
    with (
        DataSource(urls(server), node, source_id="data", topic="in") as source,
        Compute(lambda data: data * 2, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in") as compute,
    ):
        for n in range(3):
            next(source)
            assert next(compute) == f"hello {n}".encode() * 2
    assert not list((root / "files").iterdir())


def die(data: bytes) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return len(data)


def killed(node: str, state: str) -> None:
    os.environ["XDG_STATE_HOME"] = state
    with Compute(die, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in", group="g") as compute:
        compute.run()


def test_a_file_whose_message_was_not_settled_is_still_there(node: str, server: Ftp, root: Path) -> None:
    with DataSource(urls(server), node, source_id="data", topic="in") as source:
        source.run()
    process = mp.get_context("spawn").Process(target=killed, args=(node, os.environ["XDG_STATE_HOME"]))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((root / "files").iterdir())) == 3
    found: list[bytes] = []

    def keep(data: bytes) -> None:
        found.append(data)

    with Compute(keep, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in", group="g") as compute:
        compute.run(until="end")
    assert found == [b"hello 0", b"hello 1", b"hello 2"]
    assert not list((root / "files").iterdir())


def test_files_are_deleted_while_a_node_waits(node: str, server: Ftp, root: Path) -> None:
    with Compute(len, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in") as compute:
        thread = threading.Thread(target=lambda: compute.run(until="end"))
        thread.start()
        with DataSource(urls(server), node, source_id="obj", topic="in") as source:
            for _ in range(3):
                next(source)
            until(lambda: not list((root / "files").iterdir()))
            source.run()
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("ftp://other/x", "EDGESERVE_FTP_HOSTS"),
        ("{url}/files/../../etc/passwd", "not plain"),
        ("{url}/files/none.txt", "550"),
        ("{url}/link/x", "a link leads there"),
        ("plain text", "names no file"),
        ("{url}/files/0.txt", "text or bytes"),
    ],
)
def test_what_cannot_be_had_is_put_aside_by_name(
    node: str, server: Ftp, root: Path, tmp_path: Path, dead_letters: Callable[[str], list[DeadLetter]], value: str, says: str
) -> None:
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "x").write_text("secret")
    task = (lambda path: 5) if says == "text or bytes" else text_of
    with (
        DataSource([value.format(url=server.url)], node, source_id=next(iter(task.__code__.co_varnames)), topic="in") as source,
        Compute(task, node, ftp=True, local_ftp_path=str(root), topic_in="in", group="g", retries=0) as compute,
    ):
        source.run()
        compute.run(until="end")
    (letter,) = dead_letters("in.g.dead-letters")
    assert says in letter.error
    assert not (tmp_path / "secret").exists()


def test_partitions_cannot_say_when_a_file_is_done_with() -> None:
    with pytest.raises(ConfigurationError, match="ftp_delete"):
        Compute(lambda a, b: a, "memory://x", ftp=True, ftp_delete=True, by=True, partitions=2)


def test_what_cannot_be_written_to_is_named_when_the_node_opens(node: str, server: Ftp) -> None:
    with pytest.raises(ConfigurationError, match="local_ftp_path='/dev/null/x'"):
        Compute(text_of, node, ftp=True, local_ftp_path="/dev/null/x").__enter__()


@pytest.mark.parametrize(
    "keywords", [{"ftp": "yes"}, {"ftp_delete": 1}, {"ftp_memory": None}, {"local_ftp_path": None}, {"local_ftp_path": ""}]
)
def test_a_keyword_that_is_none_is_refused_by_name(keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(keywords))):
        Compute(text_of, "memory://x", **keywords)


def test_what_others_have_put_among_half_fetched_files_is_left(node: str, server: Ftp, root: Path) -> None:
    parts = root / ".edgeserve-parts"
    parts.mkdir()
    for name in ("notes", "1-2.3", ".nfs01", "a-b"):
        (parts / name).touch()
        os.utime(parts / name, (0, 0))
    (root / "copy").write_text("copied")
    os.link(root / "copy", parts / "1-2.4.kept")
    (parts / "1-2.5.kept").write_text("deleted on the server, and kept nowhere else")
    os.utime(root / "copy", (0, 0)), os.utime(parts / "1-2.5.kept", (0, 0))
    with Compute(text_of, node, ftp=True, local_ftp_path=str(root)):
        pass
    assert sorted(path.name for path in parts.iterdir()) == [".nfs01", "1-2.5.kept", "a-b", "notes"]


def test_a_message_cannot_name_what_is_half_fetched(
    node: str, server: Ftp, root: Path, dead_letters: Callable[[str], list[DeadLetter]]
) -> None:
    (root / ".edgeserve-parts").mkdir()
    (root / ".edgeserve-parts" / "x").touch()
    with (
        DataSource([f"{server.url}/.edgeserve-parts/x"], node, source_id="file_path", topic="in") as source,
        Compute(text_of, node, ftp=True, local_ftp_path=str(root), topic_in="in", group="g", retries=0) as compute,
    ):
        source.run()
        compute.run(until="end")
    (letter,) = dead_letters("in.g.dead-letters")
    assert "not whole yet" in letter.error


def test_files_of_one_name_on_two_servers_are_two(node: str, server: Ftp, tmp_path: Path, root: Path) -> None:
    (tmp_path / "other" / "files").mkdir(parents=True)
    (tmp_path / "other" / "files" / "0.txt").write_text("other")
    other = Ftp(tmp_path / "other")
    seen: list[str] = []
    with (
        DataSource([f"{server.url}/files/0.txt"], node, source_id="a", topic="in") as a,
        DataSource([f"{other.url}/files/0.txt"], node, source_id="b", topic="in") as b,
        Compute(
            lambda a, b: seen.append(Path(a).read_text() + Path(b).read_text()), node, ftp=True, local_ftp_path=str(root), topic_in="in"
        ) as compute,
    ):
        a.run(), b.run()
        compute.run(until="end")
    other.close()
    assert seen == ["hello 0other"]


def test_what_two_groups_make_of_a_file_is_two_files(node: str, server: Ftp, root: Path) -> None:
    made = []
    with DataSource(urls(server)[:1], node, source_id="file_path", topic="in") as source:
        source.run()
    tasks: dict[str, Any] = {"one": lambda file_path: "one", "two": lambda file_path: "two"}
    for name, task in tasks.items():
        with Compute(task, node, ftp=True, local_ftp_path=str(root), topic_in="in", topic_out=name) as compute:
            made.append(next(compute))
    assert [urlopen(url).read() for url in made] == [b"one", b"two"]


def later(names: str) -> Any:
    return {"a": lambda a: object(), "ab": lambda a, b: object()}[names]


@pytest.mark.parametrize("names", ["a", "ab"])
def test_the_file_of_a_dead_letter_stays(
    node: str, server: Ftp, root: Path, names: str, dead_letters: Callable[[str], list[DeadLetter]]
) -> None:
    """Though the task itself has run."""
    for n, name in enumerate(names):
        with DataSource([urls(server)[n]], node, source_id=name, topic="in") as source:
            source.run()
    options: dict[str, Any] = {"ftp": True, "ftp_memory": True, "ftp_delete": True, "topic_in": "in", "group": "g"}
    with Compute(later(names), node, **options) as compute:
        compute.run(until="end")
    assert len(dead_letters("in.g.dead-letters")) == 1
    assert len(list((root / "files").iterdir())) == 3


def test_a_file_that_more_sets_may_need_is_not_deleted_yet(node: str, server: Ftp, root: Path) -> None:
    seen: list[bytes] = []
    with (
        DataSource([urls(server)[0], urls(server)[2]], node, source_id="a", topic="in") as a,
        DataSource([urls(server)[1]] * 1 + [f"{server.url}/files/more.txt"], node, source_id="b", topic="in") as b,
        Compute(
            lambda a, b: seen.append(a + b), node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in", timeout_ms=3_000
        ) as compute,
    ):
        (root / "files" / "more.txt").write_text("more")
        for step in (a, b, b):
            next(step)
        while len(seen) < 2:
            next(compute)
        with pytest.raises(ReceiveTimeout):
            next(compute)
        assert sorted(path.name for path in (root / "files").iterdir()) == ["0.txt", "2.txt", "more.txt"]
        next(a)
        while len(seen) < 3:
            next(compute)
        with pytest.raises(ReceiveTimeout):
            next(compute)
        assert sorted(path.name for path in (root / "files").iterdir()) == ["2.txt", "more.txt"]
    assert seen == [b"hello 0hello 1", b"hello 0more", b"hello 2more"]


def test_files_are_deleted_while_there_is_work(node: str, server: Ftp, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeserve.stage.files._EVERY_S", 0.0)
    for n in range(60):
        (root / "files" / f"{n}.txt").write_text(f"hello {n}")
    left: list[int] = []

    def look(data: bytes) -> None:
        left.append(len(list((root / "files").iterdir())))

    with DataSource([f"{server.url}/files/{n}.txt" for n in range(60)], node, source_id="data", topic="in") as source:
        source.run()
    with Compute(look, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in") as compute:
        compute.run(until="end")
    assert left[0] == 60 and left[-1] < 60
    assert not list((root / "files").iterdir())


def test_a_server_that_is_away_keeps_nobody_from_work(
    node: str, server: Ftp, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edgeserve.stage.files._EVERY_S", 0.0)
    monkeypatch.setattr("edgeserve.stage.files._AGAIN_S", (0.05, 0.1))
    with (
        DataSource([urls(server)[0], urls(server)[1], b"plain"], node, source_id="obj", topic="in") as source,
        Compute(len, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in", timeout_ms=100) as compute,
    ):
        next(source), next(source)
        assert next(compute) == next(compute) == 7
        server.close()
        with pytest.raises(ReceiveTimeout):
            next(compute)
        next(source)
        assert next(compute) == 5
        assert [record.message.count("tried again") for record in caplog.records] == [1]
        again = Ftp(root, server.port)

        def deleted() -> bool:
            with contextlib.suppress(ReceiveTimeout):
                next(compute)
            return [path.name for path in (root / "files").iterdir()] == ["2.txt"]

        until(deleted)
    again.close()


def test_what_a_server_does_not_let_go_is_left(
    node: str, server: Ftp, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(FTPHandler, "ftp_DELE", lambda handler, path: handler.respond("550 no"))
    with (
        DataSource(urls(server), node, source_id="obj", topic="in") as source,
        Compute(len, node, ftp=True, ftp_memory=True, ftp_delete=True, topic_in="in") as compute,
    ):
        source.run()
        compute.run(until="end")
    assert [record.message.count("is left") for record in caplog.records] == [1]
    assert len(list((root / "files").iterdir())) == 3


@pytest.mark.parametrize("join", ["exact", "latest"])
def test_replicas_delete_what_no_other_set_can_need(
    node: str,
    server: Ftp,
    root: Path,
    join: str,
    dead_letters: Callable[[str], list[DeadLetter]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def both(a: bytes, b: bytes) -> bytes:
        return a + b

    for n in range(3):
        (root / "files" / f"{n}.txt2").write_text("b")
    options: dict[str, Any] = {"ftp": True, "ftp_memory": True, "ftp_delete": True, "topic_in": "in", "group": "g", "join": join}
    nodes = [Compute(both, node, f"w{n}", output_id="w", **options) for n in range(2)]
    with running(*nodes):
        for name, mark in (("a", ""), ("b", "2")):
            numbers = itertools.count()
            with DataSource(
                [f"{url}{mark}" for url in urls(server)],
                node,
                source_id=name,
                topic="in",
                event_time=lambda _, numbers=numbers: next(numbers),
            ) as source:
                source.run()
    assert not dead_letters("in.g.dead-letters")
    if join == "exact":
        assert not list((root / "files").iterdir())
    else:
        assert any("sets that replicas share" in record.message for record in caplog.records)
