"""The settings for payloads between hosts."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgeserve.cli.brokers.manage import free_port
from edgeserve.core.errors import ConfigurationError, CorruptMessage, NotAllowed
from edgeserve.payload import Origins, Reference, Serving
from edgeserve.payload.hosts import PORT, Fetching, advertised, token_of


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    monkeypatch.delenv("EDGESERVE_ADVERTISE", raising=False)
    return tmp_path / "payloads"


@pytest.mark.parametrize(
    ("given", "found"),
    [("cam.lan", ("cam.lan", PORT)), ("10.0.0.1:99", ("10.0.0.1", 99)), ("[::1]:7", ("::1", 7)), ("[fe80::1]", ("fe80::1", PORT))],
)
def test_an_address_may_leave_out_the_port(given: str, found: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_ADVERTISE", given)
    assert advertised() == found


@pytest.mark.parametrize("given", ["http://cam", "cam:x", "cam:0", "cam:70000", ":99", "cam/1", "me@cam", "1:2:3", "cam?x", "a b"])
def test_what_is_no_address_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_ADVERTISE", given)
    with pytest.raises(ConfigurationError, match="EDGESERVE_ADVERTISE"):
        Serving()


def test_the_token_is_one_for_all_and_its_owner_s(base: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        tokens = set(threads.map(lambda _: token_of(base), range(32)))
    assert len(tokens) == 1
    assert len(tokens.pop()) > 40
    assert [path.name for path in base.iterdir()] == ["token"]
    os.chmod(base / "token", 0o644)
    with pytest.raises(ConfigurationError, match="others can read it"):
        token_of(base)


def test_nodes_of_a_process_share_a_server_and_processes_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_ADVERTISE", f"127.0.0.1:{free_port()}")
    one, two = Serving(), Serving()
    assert one.origin == two.origin == f"http://{os.environ['EDGESERVE_ADVERTISE']}"
    pid = os.fork()
    if pid == 0:
        try:
            Serving().close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    one.close()
    one.close()
    fetching = Fetching()
    with pytest.raises(LookupError):
        fetching.fetch(Reference("broker-1", "none", 0, 1, 10, 0, two.origin, two.token))
    fetching.close()
    two.close()


def test_a_certificate_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESERVE_ADVERTISE", "127.0.0.1:1")
    monkeypatch.setenv("EDGESERVE_PAYLOAD_CERT", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigurationError, match="EDGESERVE_PAYLOAD_CERT"):
        Serving()


def test_a_reference_of_before_has_no_origin_and_one_with_more_is_read() -> None:
    bare = Reference("broker-1", "segment", 3, 1, 10, 7)
    assert bare == Reference.decode(bare.encode()) == Reference("broker-1", "segment", 3, 1, 10, 7, "http://h", "secret").bare()
    full = Reference("broker-1", "segment", 3, 1, 10, 7, "http://h", "secret")
    assert Reference.decode(full.encode()) == full
    assert "secret" not in repr(full)
    with pytest.raises(CorruptMessage):
        Reference.decode(b"\x93\x01\x02\x03")


METADATA = ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fe80::1", "0.0.0.0", "::", "224.0.0.1", "2852039166"]


@pytest.mark.parametrize(
    ("listed", "allowed", "refused"),
    [
        ("", ["10.0.0.1", "127.0.0.1", "::1", "203.0.113.7", "camera-3.lan", "localhost"], METADATA),
        ("camera-3.lan, 10.0.0.0/8", ["camera-3.LAN", "10.1.2.3", "::ffff:10.1.2.3"], ["127.0.0.1", "11.0.0.1", *METADATA]),
        ("camera-3.lan", ["camera-3.lan"], ["camera-3.lan.evil.example", "localhost", "10.0.0.1"]),
        ("fd00::/8,[2001:db8::1]", ["fd00::7", "2001:db8::1"], ["2001:db8::2", "127.1"]),
    ],
)
def test_which_origins_are_asked(listed: str, allowed: list[str], refused: list[str]) -> None:
    origins = Origins({"EDGESERVE_ORIGINS": listed})
    for host in allowed:
        origins.check(host)
    for host in refused:
        with pytest.raises(NotAllowed, match="EDGESERVE_ORIGINS"):
            origins.check(host)


def found(*addresses: str) -> list[tuple[Any, ...]]:
    return [(0, 0, 0, "", (address, 7465)) for address in addresses]


def test_of_a_name_that_is_not_listed_the_addresses_count() -> None:
    origins = Origins({"EDGESERVE_ORIGINS": "10.0.0.0/8,camera-3.lan"})
    assert origins.admitted("other.lan", found("127.0.0.1", "10.0.0.3", "169.254.169.254")) == found("10.0.0.3")
    assert origins.admitted("camera-3.lan", found("192.168.0.1")) == found("192.168.0.1")
    with pytest.raises(NotAllowed):
        origins.admitted("other.lan", found("127.0.0.1"))
    with pytest.raises(NotAllowed):
        Origins({}).admitted("metadata.example", found("169.254.169.254"))


@pytest.mark.parametrize("listed", ["http://cam", "10.0.0.1/8", "a b", "10.0.0.0/99", "cam:7465", "*", ",", " , "])
def test_a_list_of_origins_that_is_none_is_named(listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_ORIGINS", listed)
    with pytest.raises(ConfigurationError, match="EDGESERVE_ORIGINS"):
        Fetching()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_origin_that_is_not_listed_hears_nothing(host: str, monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setenv("EDGESERVE_ORIGINS", "10.0.0.0/8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        fetching = Fetching()
        try:
            with pytest.raises(NotAllowed, match=f"lies on {host}"):
                fetching.fetch(Reference("broker-1", "x", 0, 1, 10, 0, f"http://{host}:{listener.getsockname()[1]}", "a-token-of-others"))
        finally:
            fetching.close()
        with pytest.raises(BlockingIOError):
            listener.accept()
