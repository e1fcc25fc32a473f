"""`ftp=True`: messages that name files."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from tests.ftp_server import Ftp
from tests.waiting import until

from edgeserve.compute import Compute
from edgeserve.core.errors import ConfigurationError
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
