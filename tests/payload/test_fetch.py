"""Fetching payloads from other hosts: once for all processes, whole or not at all, whatever the other end does."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.disks import fill_up
from tests.payload.origins import BIG, FETCH, MB, SERVE, TOKEN, Store, child, payload, remote_at, said, tell
from tests.payload.test_server import certificate, path_of
from tests.relays import Relay, Scripted, answering, end
from tests.waiting import until
from xxhash import xxh3_64_intdigest

from edgeserve.cli.brokers.manage import free_port
from edgeserve.core.errors import ClosedError, ConfigurationError, CorruptMessage, FetchError, PayloadGone, UsedAfterFork
from edgeserve.payload import Reference, pull, shelf
from edgeserve.payload.fetch import Fetcher
from edgeserve.payload.leases import Table
from edgeserve.payload.server import PayloadServer

SHORT_S = 0.6


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "base")


@pytest.fixture
def server(store: Store) -> Iterator[PayloadServer]:
    with PayloadServer(store.base, token=TOKEN) as server:
        yield server


@pytest.fixture
def relay(server: PayloadServer) -> Iterator[Relay]:
    relay = Relay(server.port)
    yield relay
    relay.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "fetched"


@pytest.fixture
def fetcher(directory: Path) -> Iterator[Fetcher]:
    with Fetcher(directory, deadline_s=60) as fetcher:
        yield fetcher


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(*answers: Callable[[socket.socket, bytes], None]) -> Scripted:
        made.append(Scripted(*answers))
        return made[-1]

    yield make
    for each in made:
        each.close()


def stated(whole: bytes, **other: object) -> Reference:
    """What refers to a payload that lies nowhere."""
    reference = Reference("store", "0" * 16 + "." + "0" * 16 + ".payloads", 0, 1, len(whole), xxh3_64_intdigest(whole))
    return msgspec.structs.replace(reference, **other)


def left_in(directory: Path) -> set[str]:
    """What kinds of files lie there, apart from that which says who uses it."""
    return {path.suffix for path in directory.iterdir() if path.name != "users"}


# --- what comes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, MB, 6 * MB])
def test_a_payload_comes_once_and_is_read_only(store: Store, relay: Relay, directory: Path, fetcher: Fetcher, size: int) -> None:
    remotes = [remote_at(relay.url, store.put(payload(n, size))) for n in range(3)]
    views = [fetcher.fetch(remote) for remote in remotes]
    for n, view in enumerate(views):
        assert view.readonly and view.nbytes == size and bytes(view) == payload(n, size)
        assert not np.frombuffer(view, np.uint8).flags.writeable
    assert [bytes(fetcher.fetch(remote)) for remote in remotes] == [bytes(view) for view in views]
    del views
    gc.collect()
    assert bytes(fetcher.fetch(remotes[0])) == payload(0, size)
    assert (len(relay.heads), fetcher.fetched) == (3, 3)
    assert left_in(directory) == {".fetched"} and {path.stat().st_mode & 0o777 for path in directory.glob("*.fetched")} == {0o600}


def test_a_connection_is_used_again_also_when_it_was_ended_meanwhile(store: Store, relay: Relay, fetcher: Fetcher) -> None:
    whole = [payload(n, MB) for n in range(3)]
    references = [store.put(each) for each in whole]
    assert bytes(fetcher.fetch(remote_at(relay.url, references[0]))) == whole[0]
    assert bytes(fetcher.fetch(remote_at(relay.url, references[1]))) == whole[1]
    assert len(relay._socks) == 2  # one to either side
    for sock in relay._socks:
        end(sock)
    assert bytes(fetcher.fetch(remote_at(relay.url, references[2]))) == whole[2]
    assert len(relay.heads) == 3


def test_nothing_is_fetched_for_an_empty_payload(fetcher: Fetcher) -> None:
    assert fetcher.fetch(remote_at("http://127.0.0.1:1", stated(b""))) == b""


def test_several_come_at_a_time(store: Store, relay: Relay, fetcher: Fetcher) -> None:
    wanted = [payload(n, MB) for n in range(6)]
    remotes = [remote_at(relay.url, store.put(each)) for each in wanted]
    relay.hold(1000)
    futures = fetcher.prefetch(remotes)
    assert relay.held.wait(60)
    until(lambda: sum(future.done() for future in futures) == 5)  # one stands still, the others do not
    relay.go.set()
    assert [bytes(future.result()) for future in futures] == wanted
    assert [bytes(fetcher.fetch(remote)) for remote in remotes] == wanted
    assert len(relay.heads) == 6


def test_over_tls(store: Store, tmp_path: Path, fetcher: Fetcher) -> None:
    cert, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    with PayloadServer(store.base, token=TOKEN, tls=tls) as server:
        remote = remote_at(f"https://127.0.0.1:{server.port}", store.put(payload(1, 6 * MB)))
        with pytest.raises(FetchError, match="not trusted"):
            fetcher.fetch(remote)
        other_name = msgspec.structs.replace(remote, origin=f"https://localhost:{server.port}")
        with Fetcher(tmp_path / "trusting", cafile=str(cert)) as trusting:
            assert bytes(trusting.fetch(remote)) == payload(1, 6 * MB)
            assert bytes(trusting.fetch(remote_at(remote.origin, store.put(payload(2, MB))))) == payload(2, MB)
            with pytest.raises(FetchError, match="not trusted"):
                trusting.fetch(other_name)


def test_two_processes_that_want_the_same_get_it_by_one_request(store: Store, relay: Relay, directory: Path) -> None:
    reference = store.put(payload(1, 6 * MB))
    remote = remote_at(relay.url, reference).encode().hex()
    relay.hold(MB)
    children = [child(FETCH, directory, remote) for _ in range(2)]
    try:
        for each in children:
            assert said(each) == "ready"
            tell(each)
        assert relay.held.wait(60)
        with Fetcher(directory, deadline_s=60) as here:
            future = here.prefetch([remote_at(relay.url, reference)])[0]
            until(future.running)
            relay.go.set()
            assert bytes(future.result()) == payload(1, 6 * MB) and here.fetched == 0
        answers = sorted(said(each) for each in children)
        assert answers == [f"{reference.checksum} {fetched} True" for fetched in (0, 1)]
        assert len(relay.heads) == 1
        assert left_in(directory) == {".fetched"}
    finally:
        for each in children:
            each.kill()
            each.communicate()


# --- what breaks ------------------------------------------------------------------------------------------------


def test_what_broke_is_resumed_where_it_broke(store: Store, relay: Relay, fetcher: Fetcher) -> None:
    relay.cuts = [10, 2 * MB, 50, 3 * MB]
    remote = remote_at(relay.url, store.put(payload(1, 6 * MB)))
    assert bytes(fetcher.fetch(remote)) == payload(1, 6 * MB)
    starts = [int(head.partition(b"bytes=")[2].partition(b"-")[0] or 0) for head in relay.heads]
    assert len(starts) == 5 and starts[:2] == [0, 0]
    assert MB < starts[2] == starts[3] < 2 * MB and 4 * MB < starts[4] < 5 * MB


@pytest.mark.parametrize("again", [True, False])
def test_an_origin_that_is_killed_in_the_midst(store: Store, directory: Path, again: bool) -> None:
    reference = store.put(payload(1, BIG))
    first = child(SERVE, store.base, 0, TOKEN)
    second = None
    port = int(said(first))
    relay = Relay(port)
    relay.hold(MB)
    try:
        with Fetcher(directory, deadline_s=60 if again else 1.0) as fetcher:
            future = fetcher.prefetch([remote_at(relay.url, reference)])[0]
            assert relay.held.wait(60)
            first.send_signal(signal.SIGKILL)
            first.wait()
            if again:
                second = child(SERVE, store.base, port, TOKEN)
                assert said(second) == str(port)
            relay.go.set()
            if again:
                assert bytes(future.result()) == payload(1, BIG)
                assert b"Range: bytes=" in relay.heads[-1]
            else:
                with pytest.raises(FetchError, match="in time"):
                    future.result()
                assert left_in(directory) == set()
    finally:
        relay.close()
        for each in (first, second):
            if each is not None:
                each.kill()
                each.communicate()


def test_an_origin_that_is_gone_is_not_waited_for_with_each_payload_and_comes_back(store: Store, directory: Path) -> None:
    port = free_port()
    references = [remote_at(f"http://127.0.0.1:{port}", store.put(payload(n, MB))) for n in range(2)]
    with Fetcher(directory, deadline_s=SHORT_S, gone_after_s=SHORT_S) as fetcher:
        assert "in time" in error_of(fetcher, references[0])
        until(lambda: "is asked again in" in error_of(fetcher, references[1]))
        with PayloadServer(store.base, token=TOKEN, port=port):
            until(lambda: not error_of(fetcher, references[0]))
            assert bytes(fetcher.fetch(references[1])) == payload(1, MB)


def error_of(fetcher: Fetcher, reference: Reference) -> str:
    """Why it cannot be fetched now; "": it can."""
    try:
        fetcher.fetch(reference)
    except FetchError as exc:
        return str(exc)
    return ""


def test_a_connection_that_stands_still_is_left_for_another(store: Store, relay: Relay, directory: Path) -> None:
    relay.hold(MB)
    with Fetcher(directory, deadline_s=2.0) as fetcher:
        assert bytes(fetcher.fetch(remote_at(relay.url, store.put(payload(1, 6 * MB))))) == payload(1, 6 * MB)
    assert len(relay.heads) == 2 and b"Range: bytes=" in relay.heads[1]


def test_a_part_of_another_payload_is_noticed(store: Store, server: PayloadServer, relay: Relay, fetcher: Fetcher) -> None:
    reference = store.put(payload(1, MB))
    relay.cuts = [MB // 2]
    remote = remote_at(relay.url, msgspec.structs.replace(reference, checksum=5))
    with pytest.raises(CorruptMessage, match="checksum"):
        fetcher.fetch(remote)
    assert [b"Range" in head for head in relay.heads] == [False, True, False]  # one full retry


def test_a_payload_that_is_gone_is_named(store: Store, server: PayloadServer, directory: Path, fetcher: Fetcher) -> None:
    reference = store.put(payload(1, MB))
    url = f"http://127.0.0.1:{server.port}"
    segment = "0123456789abcdef.0123456789abcdef.payloads"
    for other in (msgspec.structs.replace(reference, generation=9), msgspec.structs.replace(reference, segment=segment)):
        with pytest.raises(PayloadGone):
            fetcher.fetch(remote_at(url, other))
    assert left_in(directory) == set()


def test_a_slot_that_is_used_again_while_it_comes(
    tmp_path: Path, directory: Path, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Table, "enter", lambda self, key: None)  # else it cannot be
    store = Store(tmp_path / "other", BIG)
    reference = store.put(payload(1, BIG))
    with PayloadServer(store.base, token=TOKEN) as server:
        relay = Relay(server.port)
        try:
            relay.hold(MB)
            future = fetcher.prefetch([remote_at(relay.url, reference)])[0]
            assert relay.held.wait(60)
            store.done = [(0, 1)]
            assert store.put_or_none(payload(2, BIG)) is not None
            relay.go.set()
            with pytest.raises(PayloadGone):
                future.result()
        finally:
            relay.close()
    assert left_in(directory) == set()


def test_a_slot_whose_payload_comes_is_not_used_again(tmp_path: Path, fetcher: Fetcher) -> None:
    store = Store(tmp_path / "other", BIG)
    reference = store.put(payload(1, BIG))
    with PayloadServer(store.base, token=TOKEN) as server:
        relay = Relay(server.port)
        try:
            relay.hold(MB)
            future = fetcher.prefetch([remote_at(relay.url, reference)])[0]
            assert relay.held.wait(60)
            store.done = [(0, 1)]
            assert store.put_or_none(payload(2, BIG)) is None
            relay.go.set()
            assert bytes(future.result()) == payload(1, BIG)
            until(lambda: store.put_or_none(payload(3, BIG)) is not None)
        finally:
            relay.close()


# --- what others say --------------------------------------------------------------------------------------------

WHOLE = payload(1, MB)
OTHER = payload(2, MB)


def test_what_does_not_match_its_checksum_is_asked_for_once_more(
    scripted: Callable[..., Scripted], directory: Path, fetcher: Fetcher
) -> None:
    wrong = scripted(answering("200 OK", OTHER))
    with pytest.raises(CorruptMessage, match="checksum"):
        fetcher.fetch(remote_at(wrong.url, stated(WHOLE)))
    assert len(wrong.heads) == 2 and left_in(directory) == set()
    once = scripted(answering("200 OK", OTHER), answering("200 OK", WHOLE))
    assert bytes(fetcher.fetch(remote_at(once.url, stated(WHOLE)))) == WHOLE


@pytest.mark.parametrize("length", [10**15, 10**30, MB + 1, MB - 1, 0])
def test_another_length_is_refused_before_anything_is_read(
    scripted: Callable[..., Scripted], directory: Path, fetcher: Fetcher, length: int
) -> None:
    other = scripted(answering("200 OK", b"", length))
    with pytest.raises(CorruptMessage, match="length"):
        fetcher.fetch(remote_at(other.url, stated(WHOLE)))
    assert len(other.heads) == 2 and left_in(directory) == set()


def test_what_is_cut_off_each_time_is_given_up(scripted: Callable[..., Scripted], directory: Path) -> None:
    short = scripted(answering("200 OK", WHOLE[:1000], MB))  # it knows no ranges
    with Fetcher(directory, deadline_s=SHORT_S) as fetcher, pytest.raises(FetchError, match="in time"):
        fetcher.fetch(remote_at(short.url, stated(WHOLE)))
    assert len(short.heads) > 2 and b"Range: bytes=1000-" in short.heads[1]
    assert left_in(directory) == set()


@pytest.mark.parametrize(
    "fields",
    [
        ("Content-Range: bytes 0-999/1000",),
        (f"Content-Range: bytes 999-{MB - 1}/{MB}",),
        (f"Content-Range: bytes 1000-{MB - 1}/{MB + 1}",),
        (),
    ],
)
def test_another_part_than_was_asked_for_is_refused(scripted: Callable[..., Scripted], fetcher: Fetcher, fields: tuple[str, ...]) -> None:
    first = answering("200 OK", WHOLE[:1000], MB)
    other = scripted(
        first, answering("206 Partial Content", WHOLE[1000:], None, *fields), first, answering("206 Partial Content", b"", None)
    )
    with pytest.raises(CorruptMessage, match="another part"):
        fetcher.fetch(remote_at(other.url, stated(WHOLE)))


def test_who_knows_no_ranges_gives_it_anew(scripted: Callable[..., Scripted], fetcher: Fetcher) -> None:
    simple = scripted(answering("200 OK", WHOLE[:1000], MB), answering("200 OK", WHOLE))
    assert bytes(fetcher.fetch(remote_at(simple.url, stated(WHOLE)))) == WHOLE


def test_more_than_the_length_is_not_read(scripted: Callable[..., Scripted], fetcher: Fetcher) -> None:
    def more(sock: socket.socket, head: bytes) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + WHOLE[:200])

    endless = scripted(more)
    for n in (1, 2):
        assert bytes(fetcher.fetch(remote_at(endless.url, stated(WHOLE[:100], slot=n)))) == WHOLE[:100]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_redirects_are_not_followed(scripted: Callable[..., Scripted], fetcher: Fetcher, status: str) -> None:
    target = scripted(answering("200 OK", WHOLE))
    origin = scripted(answering(status, b"", None, f"Location: {target.url}/"))
    with pytest.raises(FetchError, match="redirect"):
        fetcher.fetch(remote_at(origin.url, stated(WHOLE)))
    assert (len(origin.heads), len(target.heads)) == (1, 0)


def _said(*parts: bytes) -> Callable[[socket.socket, bytes], None]:
    def answer(sock: socket.socket, head: bytes) -> None:
        for part in parts:
            sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        _said(b"220 ftp.example ready\r\n\r\n"),
        _said(b"HTTP/1.1 200 OK\r\nno field\r\n\r\n"),
        _said(b"HTTP/1.1 100 Continue\r\n\r\n"),
        _said(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1000000\r\n\r\n"),
        _said(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello"),
        _said(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1000000\r\n\r\n"),
        _said(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 20_000),
        _said(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 5_000),
        answering("401 Unauthorized"),
        answering("400 Bad Request"),
    ],
)
def test_an_answer_that_is_none_is_refused_at_once(
    scripted: Callable[..., Scripted], directory: Path, fetcher: Fetcher, answer: Callable[[socket.socket, bytes], None]
) -> None:
    odd = scripted(answer)
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(remote_at(odd.url, stated(WHOLE)))
    assert len(odd.heads) == 1 and left_in(directory) == set()
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_what_trickles_in_is_given_up_at_the_deadline(scripted: Callable[..., Scripted], directory: Path, begins: bytes) -> None:
    sent = threading.Event()

    def trickle(sock: socket.socket, head: bytes) -> None:
        sock.sendall(begins)
        for n in itertools.count():
            if trickling.closed.wait(0.02):
                return
            sock.sendall(b"x")
            if n == 5:
                sent.set()

    trickling = scripted(trickle)
    with Fetcher(directory, deadline_s=SHORT_S) as fetcher, pytest.raises(FetchError, match="in time"):
        fetcher.fetch(remote_at(trickling.url, stated(WHOLE)))
    assert sent.is_set() and left_in(directory) == set()


def test_who_is_busy_is_asked_again(scripted: Callable[..., Scripted], fetcher: Fetcher) -> None:
    busy = scripted(answering("503 Service Unavailable"), answering("500 Oh"), answering("200 OK", WHOLE))
    assert bytes(fetcher.fetch(remote_at(busy.url, stated(WHOLE)))) == WHOLE


def test_another_token_is_refused(store: Store, relay: Relay, fetcher: Fetcher) -> None:
    remote = remote_at(relay.url, store.put(payload(1, MB)), token="another-token")
    assert "another-token" not in repr(remote)
    with pytest.raises(FetchError, match="token") as caught:
        fetcher.fetch(remote)
    assert len(relay.heads) == 1 and "another-token" not in str(caught.value)


@pytest.mark.parametrize(
    "origin",
    [
        "ftp://127.0.0.1:1",
        "file:///etc/passwd",
        "http://127.0.0.1",
        "http://127.0.0.1:0",
        "http://127.0.0.1:99999",
        "http://a:1/path",
        "http://user@a:1",
        "http://a b:1",
        "http://a:1\r\nX: y",
        "HTTP://a:1",
        "http://:1",
        "http://\u0661:1",
        "",
    ],
)
def test_what_is_no_origin_is_refused(fetcher: Fetcher, origin: str) -> None:
    with pytest.raises(FetchError, match="origin"):
        fetcher.fetch(remote_at(origin, stated(WHOLE)))


@pytest.mark.parametrize("token", ["", "short", "a-token\r\nX: y", "a token with spaces", "\u0661" * 10])
def test_what_can_be_no_token_is_not_sent(scripted: Callable[..., Scripted], fetcher: Fetcher, token: str) -> None:
    origin = scripted(answering("200 OK", WHOLE))
    with pytest.raises(FetchError, match="token") as caught:
        fetcher.fetch(remote_at(origin.url, stated(WHOLE), token=token))
    assert origin.heads == [] and (not token or token not in str(caught.value))


@pytest.mark.parametrize("field", ["store", "segment"])
def test_a_reference_cannot_leave_the_stores(store: Store, relay: Relay, directory: Path, fetcher: Fetcher, field: str) -> None:
    reference = store.put(payload(1, MB))
    (store.base / reference.segment).write_bytes((store.directory / reference.segment).read_bytes())
    for name in ("..", "."):
        with pytest.raises(FetchError, match="400"):
            fetcher.fetch(remote_at(relay.url, msgspec.structs.replace(reference, **{field: name})))
    with pytest.raises(CorruptMessage):
        remote_at(relay.url, msgspec.structs.replace(reference, **{field: "../../x"}))
    with pytest.raises(CorruptMessage):
        Reference.decode(b"\x93\xa1a")


def test_another_origin_cannot_put_its_own_in_a_payloads_place(scripted: Callable[..., Scripted], fetcher: Fetcher) -> None:
    one, two = scripted(answering("200 OK", WHOLE)), scripted(answering("200 OK", WHOLE))
    for each in (one, two):
        assert bytes(fetcher.fetch(remote_at(each.url, stated(WHOLE)))) == WHOLE
    assert (len(one.heads), len(two.heads)) == (1, 1)


# --- what lies here ---------------------------------------------------------------------------------------------


def test_the_oldest_go_when_there_is_too_much(store: Store, relay: Relay, directory: Path) -> None:
    budget = 3_500_000
    with Fetcher(directory, deadline_s=60, budget_bytes=budget) as fetcher:
        remotes = [remote_at(relay.url, store.put(payload(n, MB))) for n in range(6)]
        views = []
        for remote in remotes:
            views.append(fetcher.fetch(remote))
            assert sum(path.stat().st_size for path in directory.iterdir()) <= budget
        assert [bytes(view) for view in views] == [payload(n, MB) for n in range(6)]
        del views
        gc.collect()
        assert bytes(fetcher.fetch(remotes[5])) == payload(5, MB) and len(relay.heads) == 6
        assert bytes(fetcher.fetch(remotes[0])) == payload(0, MB) and len(relay.heads) == 7
        with pytest.raises(FetchError, match="larger"):
            fetcher.fetch(remote_at(relay.url, store.put(payload(7, 4 * MB))))
        assert len(relay.heads) == 7


def test_memory_of_what_had_to_go_is_used_again_unless_somebody_looks(store: Store, relay: Relay, directory: Path) -> None:
    held = child(FETCH, directory, remote_at(relay.url, first := store.put(payload(0, MB))).encode().hex())
    try:
        assert said(held) == "ready"
        tell(held)
        assert said(held).startswith(str(first.checksum))
        with Fetcher(directory, deadline_s=60, budget_bytes=4 * MB) as fetcher:
            views, files, used_again = [], {path.stat().st_ino for path in directory.glob("*.fetched")}, set[int]()
            kept = (directory / f"{remote_at(relay.url, first).name}.fetched").stat().st_ino
            for n in range(1, 13):
                remote = remote_at(relay.url, store.put(payload(n, MB - 1000 * n)))
                view = fetcher.fetch(remote)
                assert bytes(view) == payload(n, MB - 1000 * n)
                if n % 4 == 0:
                    views.append((n, view))
                del view
                number = (directory / f"{remote.name}.fetched").stat().st_ino
                used_again |= {number} & files
                files.add(number)
                assert sum(path.stat().st_size for path in directory.iterdir()) <= 4 * MB
            assert used_again and kept not in used_again
            assert all(bytes(view) == payload(n, MB - 1000 * n) for n, view in views)
            tell(held)
            assert said(held) == str(first.checksum)
    finally:
        held.kill()
        held.communicate()


@pytest.mark.parametrize("suffix", [".lock", ".fetched"])
def test_a_file_that_was_replaced_before_it_was_locked_is_not_taken(
    store: Store, relay: Relay, directory: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    remote = remote_at(relay.url, store.put(payload(1, MB)))
    with Fetcher(directory, deadline_s=60) as fetcher, Fetcher(directory, deadline_s=60) as other:
        assert suffix == ".lock" or other.fetch(remote)
        gc.collect()
        opened, replaced = shelf._open, list[str]()

        def replacing(path: str, flags: int) -> int:
            fd = opened(path, flags)
            if path.endswith(suffix) and not replaced:
                os.rename(path, path + ".away")
                replaced.append(path)
            return fd

        monkeypatch.setattr(shelf, "_open", replacing)
        assert bytes(fetcher.fetch(remote)) == payload(1, MB)
        assert replaced and fetcher.fetched == 1 and left_in(directory) == {".fetched", ".away"}


LOOK = """
import random, sys
from pathlib import Path
from xxhash import xxh3_64_intdigest
from edgeserve.payload.fetch import Fetcher
from edgeserve.payload.reference import Reference
remotes = [Reference.decode(bytes.fromhex(each)) for each in sys.argv[3:]]
chance, held = random.Random(int(sys.argv[2])), []
with Fetcher(Path(sys.argv[1]), deadline_s=60, budget_bytes=1_500_000) as fetcher:
    for _ in range(150):
        remote = chance.choice(remotes)
        held = [*held[-2:], (remote, fetcher.fetch(remote))]
        wrong = [each for each, view in held if xxh3_64_intdigest(view) != each.checksum]
        if wrong:
            sys.exit(f"wrong: {wrong}")
print("right", flush=True)
"""


def test_processes_that_push_each_others_payloads_out_always_see_the_right_ones(
    store: Store, server: PayloadServer, directory: Path
) -> None:
    url = f"http://127.0.0.1:{server.port}"
    remotes = [remote_at(url, store.put(payload(n, 200_000 + 10_000 * n))).encode().hex() for n in range(12)]
    with Fetcher(directory):
        children = [child(LOOK, directory, n, *remotes) for n in range(3)]
        try:
            assert [said(each) for each in children] == ["right"] * 3
        finally:
            for each in children:
                each.kill()
                each.communicate()


def test_nobody_can_write_to_what_was_fetched(store: Store, relay: Relay, directory: Path, fetcher: Fetcher) -> None:
    remote = remote_at(relay.url, store.put(payload(1, MB)))
    view = fetcher.fetch(remote)
    with Fetcher(directory) as other:
        another = other.fetch(remote)
        maps = [line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines() if remote.name in line]
        assert maps == ["r--s"] * 2 and bytes(view) == bytes(another)


def test_one_that_was_used_stays_longer(store: Store, relay: Relay, directory: Path) -> None:
    with Fetcher(directory, deadline_s=60, budget_bytes=4 * MB) as fetcher:
        remotes = [remote_at(relay.url, store.put(payload(n, MB))) for n in range(4)]
        for remote in (*remotes[:3], remotes[0], remotes[3], remotes[0]):
            assert fetcher.fetch(remote)[0] == payload(int(remote is not remotes[0]) and remotes.index(remote), MB)[0]
        assert fetcher.fetch(remote_at(relay.url, store.put(payload(9, MB))))[0] == payload(9, MB)[0]
        assert (directory / f"{remotes[0].name}.fetched").exists() and not (directory / f"{remotes[1].name}.fetched").exists()


def test_without_room_it_is_an_error_and_nothing_is_left(store: Store, relay: Relay, small_disk: Path) -> None:
    with Fetcher(small_disk / "fetched", deadline_s=60) as fetcher:
        remotes = [remote_at(relay.url, store.put(payload(n, 6 * MB))) for n in range(5)]
        for n, remote in enumerate(remotes):  # not all have room: the oldest go
            assert bytes(fetcher.fetch(remote)) == payload(n, 6 * MB)
        assert not (small_disk / "fetched" / f"{remotes[0].name}.fetched").exists()
        for path in (small_disk / "fetched").glob("*.fetched"):
            path.unlink()
        gc.collect()
        ballast = fill_up(small_disk)
        with pytest.raises(FetchError, match="No space"):
            fetcher.fetch(remotes[1])
        assert left_in(small_disk / "fetched") == set() and len(relay.heads) == 5
        ballast.unlink()
        assert bytes(fetcher.fetch(remotes[1])) == payload(1, 6 * MB)


def test_an_origin_that_was_asked_before_answers_while_memory_is_made_ready(
    store: Store, relay: Relay, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bytes(fetcher.fetch(remote_at(relay.url, store.put(payload(0, MB))))) == payload(0, MB)
    mapped = shelf.Shelf.map

    def when_asked(self: shelf.Shelf, part: shelf.Part) -> memoryview:
        until(lambda: len(relay.heads) == 2)
        return mapped(self, part)

    monkeypatch.setattr(shelf.Shelf, "map", when_asked)
    assert bytes(fetcher.fetch(remote_at(relay.url, store.put(payload(1, MB))))) == payload(1, MB)
    assert len(relay.heads) == 2 and len(relay._socks) == 2


def test_an_answer_there_is_no_memory_for_is_never_taken_for_another(
    store: Store, relay: Relay, directory: Path, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bytes(fetcher.fetch(remote_at(relay.url, store.put(payload(0, MB))))) == payload(0, MB)
    remotes = [remote_at(relay.url, store.put(payload(n, MB))) for n in (1, 2)]

    def none(self: shelf.Shelf, part: shelf.Part) -> memoryview:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patch:
        patch.setattr(shelf.Shelf, "map", none)
        with pytest.raises(FetchError, match="cannot be kept"):
            fetcher.fetch(remotes[0])
    assert left_in(directory) == {".fetched"}
    assert bytes(fetcher.fetch(remotes[1])) == payload(2, MB) and bytes(fetcher.fetch(remotes[0])) == payload(1, MB)
    assert [head.split()[1].decode() for head in relay.heads].count(path_of(remotes[1])) == 1


def test_what_was_damaged_is_fetched_again(store: Store, relay: Relay, directory: Path, fetcher: Fetcher) -> None:
    remote = remote_at(relay.url, store.put(payload(1, MB)))
    for damage in (b"", payload(2, MB)):
        assert bytes(fetcher.fetch(remote)) == payload(1, MB)
        gc.collect()
        path = directory / f"{remote.name}.fetched"
        path.unlink()
        path.write_bytes(damage)
    assert bytes(fetcher.fetch(remote)) == payload(1, MB) and len(relay.heads) == 3


@pytest.mark.parametrize("forked", [False, True])
def test_a_fetching_process_that_is_killed_is_replaced(store: Store, relay: Relay, directory: Path, fetcher: Fetcher, forked: bool) -> None:
    reference = store.put(payload(1, 6 * MB))
    code = FETCH
    if forked:  # with a child that lives on, and must not keep the lock
        code = code.replace(
            "view = fetcher.fetch(remote)",
            "import os, threading\nthreading.Thread(target=fetcher.fetch, args=[remote], daemon=True).start()\nsys.stdin.readline()\n"
            "if os.fork() == 0:\n    print('forked', flush=True)\n    sys.stdin.readline()\n    os._exit(0)\nthreading.Event().wait()",
        )
    relay.hold(MB)
    killed = child(code, directory, remote_at(relay.url, reference).encode().hex())
    try:
        assert said(killed) == "ready"
        tell(killed)
        assert relay.held.wait(60)
        if forked:
            tell(killed)
            assert said(killed) == "forked"
        future = fetcher.prefetch([remote_at(relay.url, reference)])[0]
        until(future.running)
        assert left_in(directory) == {".part", ".lock"}
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert bytes(future.result()) == payload(1, 6 * MB)
        assert fetcher.fetched == 1 and left_in(directory) == {".fetched"}
    finally:
        os.killpg(killed.pid, signal.SIGKILL) if forked else killed.kill()
        killed.communicate()


def test_what_killed_processes_have_left_goes(store: Store, relay: Relay, directory: Path) -> None:
    relay.hold(MB)
    killed = child(FETCH, directory, remote_at(relay.url, store.put(payload(1, 6 * MB))).encode().hex())
    assert said(killed) == "ready"
    tell(killed)
    assert relay.held.wait(60)
    with Fetcher(directory):
        assert left_in(directory) == {".part", ".lock"}  # it lives
    killed.kill()
    killed.communicate()
    with Fetcher(directory):
        assert left_in(directory) == set()


def test_the_last_one_removes_what_was_fetched(store: Store, relay: Relay, directory: Path) -> None:
    remote = remote_at(relay.url, store.put(payload(1, MB)))
    one, two = Fetcher(directory), Fetcher(directory)
    view = one.fetch(remote)
    one.close()
    assert left_in(directory) == {".fetched"} and bytes(two.fetch(remote)) == payload(1, MB)
    two.close()
    two.close()
    assert left_in(directory) == set() and bytes(view) == payload(1, MB)
    with pytest.raises(ClosedError):
        two.fetch(remote)
    with pytest.raises(ClosedError):
        two.prefetch([remote])


def test_nothing_is_left_open(store: Store, relay: Relay, directory: Path) -> None:
    def all_open() -> tuple[int, int]:
        ours = [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]
        fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]
        return len(ours), sum(str(directory) in fd for fd in fds)

    fetcher = Fetcher(directory, deadline_s=60)
    remotes = [remote_at(relay.url, store.put(payload(n, MB))) for n in range(8)]
    assert [future.result()[0] for future in fetcher.prefetch(remotes)] == [payload(n, MB)[0] for n in range(8)]
    assert all_open()[0] > 0 and all_open()[1] > 0
    fetcher.close()
    gc.collect()
    assert all_open() == (0, 0)
    for sock in relay._socks:  # those towards it are at an end
        until(lambda sock=sock: _is_over(sock))


def _is_over(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
        return False
    except OSError:
        return True


def test_close_ends_what_is_under_way(store: Store, relay: Relay, directory: Path) -> None:
    relay.hold(MB)
    fetcher = Fetcher(directory, deadline_s=600)
    futures = fetcher.prefetch(remote_at(relay.url, store.put(payload(n, 6 * MB))) for n in range(1))
    assert relay.held.wait(60)
    fetcher.close()
    with pytest.raises(ClosedError):
        futures[0].result()
    assert left_in(directory) == set()


def test_close_ends_the_wait_for_another(store: Store, relay: Relay, directory: Path, fetcher: Fetcher) -> None:
    relay.hold(MB)
    remote = remote_at(relay.url, store.put(payload(1, 6 * MB)))
    first = fetcher.prefetch([remote])[0]
    assert relay.held.wait(60)
    waiting = Fetcher(directory, deadline_s=600)
    second = waiting.prefetch([remote])[0]
    until(second.running)
    waiting.close()
    with pytest.raises(ClosedError):
        second.result()
    relay.go.set()
    assert bytes(first.result()) == payload(1, 6 * MB)


def test_use_after_fork_is_an_error(fetcher: Fetcher, directory: Path) -> None:
    forked = os.fork()
    if forked == 0:
        try:
            fetcher.fetch(remote_at("http://127.0.0.1:1", stated(WHOLE)))
        except UsedAfterFork:
            fetcher.close()
            os._exit(0)
        os._exit(1)
    assert os.waitpid(forked, 0)[1] == 0
    assert (directory / "users").exists()


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("open", "file", "link"):
        with pytest.raises(ConfigurationError, match=name):
            Fetcher(tmp_path / name)
    with pytest.raises(ConfigurationError, match="cafile"):
        Fetcher(tmp_path / "fetched", cafile=str(tmp_path / "none"))


def test_connections_that_are_kept_are_few_and_not_old(server: PayloadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_MOST_KEPT", 2)
    connections, origin = pull.Connections(), pull.Origin.of(f"http://127.0.0.1:{server.port}")
    made = [connections.make(origin, time.monotonic() + 60) for _ in range(3)]
    for sock in made:
        connections.keep(origin, sock)
    assert made[0].fileno() < 0 and connections.take(origin) is made[2]
    connections.keep(origin, made[2])
    monkeypatch.setattr(pull, "_KEPT_S", 0.0)
    assert connections.take(origin) is None and made[1].fileno() < 0 and made[2].fileno() < 0
    monkeypatch.setattr(pull, "_KEPT_S", 60.0)
    made.append(connections.make(origin, time.monotonic() + 60))
    connections.keep(origin, made[3])
    connections.close()
    assert made[3].fileno() < 0
