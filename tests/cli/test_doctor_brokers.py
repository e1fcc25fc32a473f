"""`edgeserve doctor --node`: what is said of real brokers, and that no secret is."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.transport.nats_server import Server

from edgeserve.cli.brokers.manage import free_port
from edgeserve.cli.engine_checks import _pulsar_settings, _retention, engine_checks

PULSAR = (
    "pulsar admin",
    "pulsar batch-index acknowledgement",
    "pulsar failover delay",
    "pulsar keep-alive",
    "pulsar entry check delay",
    "pulsar message size",
    "pulsar retention",
    "pulsar inactive topics",
)


INFO = b'INFO {"server_id": "x", "version": "2.10.0", "max_payload": 1048576, "jetstream": true, "headers": true, "proto": 1}\r\n'


def findings(edgeserve, url: str, **options: Any) -> dict[str, dict[str, str]]:
    result = edgeserve("doctor", "--json", "--node", url, **options)
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_a_pulsar_with_what_suits_passes(edgeserve, pulsar_url: str):
    found = findings(edgeserve, pulsar_url)
    assert {name: found[name]["status"] for name in PULSAR} == dict.fromkeys(PULSAR, "PASS"), found


class Answers:
    """An admin API with these answers."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def call(self, path: str) -> Any:
        return self._answers.get(path.rpartition("/")[2])


AS_SHIPPED = {
    "acknowledgmentAtBatchIndexLevelEnabled": "false",
    "activeConsumerFailoverDelayTimeMillis": "1000",
    "keepAliveIntervalSeconds": "30",
    "managedLedgerNewEntriesCheckDelayInMillis": "10",
    "maxMessageSize": "5242880",
    "defaultRetentionTimeInMinutes": "0",
    "defaultRetentionSizeInMB": "0",
    "brokerDeleteInactiveTopicsEnabled": "true",
    "brokerDeleteInactiveTopicsMode": "delete_when_no_subscriptions",
    "brokerDeleteInactiveTopicsFrequencySeconds": "60",
}


def test_a_pulsar_as_it_ships_gets_what_to_do_for_each_setting():
    found = {check.name: check for check in [*_pulsar_settings(AS_SHIPPED), *_retention(Answers(), AS_SHIPPED, "a/b")]}  # type: ignore[arg-type]
    assert set(found) == set(PULSAR) - {"pulsar admin"}
    assert {name for name, check in found.items() if check.status == "PASS"} == {"pulsar message size"}
    for name in AS_SHIPPED:
        if name.startswith(("ack", "active", "keep", "managed")):
            assert any(f"set {name}=" in check.to_do for check in found.values())
    assert found["pulsar retention"].to_do == "bin/pulsar-admin namespaces set-retention a/b --time 1d --size 512M"


def test_what_a_namespace_says_goes_before_the_brokers_default():
    kept = Answers(retention={"retentionTimeInMinutes": -1, "retentionSizeInMB": -1}, inactiveTopicPolicies=None)
    assert [check.status for check in _retention(kept, AS_SHIPPED, "a/b")] == ["PASS", "PASS"]  # type: ignore[arg-type]
    lost = Answers(
        retention={"retentionTimeInMinutes": 5, "retentionSizeInMB": 0},
        inactiveTopicPolicies={
            "deleteWhileInactive": True,
            "inactiveTopicDeleteMode": "delete_when_subscriptions_caught_up",
            "maxInactiveDurationSeconds": 60,
        },
    )
    retention, inactive = _retention(lost, AS_SHIPPED, "a/b")  # type: ignore[arg-type]
    assert (retention.status, inactive.status) == ("WARN", "WARN")
    assert "even where groups stand on them" in inactive.seen


def test_an_admin_api_that_does_not_answer_is_a_warning():
    (check,) = engine_checks(f"pulsar://127.0.0.1:6650?admin=http://127.0.0.1:{free_port()}")
    assert (check.status, check.name) == ("WARN", "pulsar admin")
    assert "refused" in check.seen and "?admin=" in check.to_do


def test_a_server_that_is_no_pulsar_is_a_warning(nats_url: str):
    (check,) = engine_checks(f"pulsar://127.0.0.1:6650?admin=http://{nats_url.partition('://')[2]}")
    assert (check.status, check.name) == ("WARN", "pulsar admin")


def test_a_nats_with_jetstream_passes(edgeserve, nats_url: str):
    found = findings(edgeserve, nats_url)
    for name in ("nats jetstream", "nats message size", "nats storage"):
        assert found[name]["status"] == "PASS", found[name]


def test_a_token_opens_the_account_and_is_never_shown(edgeserve, new_nats):
    url = new_nats(token="tok-s3cret").url
    for node, env, status in (
        (f"{url}?token=tok-s3cret", {}, "PASS"),
        (url.replace("://", "://tok-s3cret@"), {}, "PASS"),
        (url, {"EDGESERVE_NATS_TOKEN": "tok-s3cret"}, "PASS"),
        (f"{url}?token=wrong-s3cret", {}, "FAIL"),
        (url.replace("://", "://me:wrong-s3cret@"), {}, "FAIL"),
    ):
        result = edgeserve("doctor", "--json", "--node", node, env=env)
        found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        name = "nats storage" if status == "PASS" else "nats server"
        assert found[name]["status"] == status, found[name]
        assert "s3cret" not in result.stdout + result.stderr


def test_a_nats_that_is_not_there_is_a_warning():
    (check,) = engine_checks(f"nats://127.0.0.1:{free_port()}")
    assert check.status == "WARN" and "edgeserve broker start nats" in check.to_do


def test_a_nats_without_jetstream_fails(tmp_path: Path):
    server = Server(tmp_path, jetstream=False)
    try:
        (check,) = engine_checks(server.url())
    finally:
        server.stop()
    assert (check.status, check.name) == ("FAIL", "nats jetstream")
    assert "--jetstream" in check.to_do


def test_a_user_of_the_environment_opens_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = Server(tmp_path, config="authorization { user: me, password: s3cret }")
    monkeypatch.setenv("EDGESERVE_NATS_USER", "me")
    monkeypatch.setenv("EDGESERVE_NATS_PASSWORD", "s3cret")
    try:
        found = [(check.name, check.status) for check in engine_checks(server.url())]
    finally:
        server.stop()
    assert found == [("nats jetstream", "PASS"), ("nats message size", "PASS"), ("nats storage", "PASS")]


def test_a_server_without_tls_is_told_no_password_where_tls_is_asked_for():
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError):  # closed: the test is over
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(INFO)
                        while some := connection.recv(4096):
                            heard.append(some)

        thread = threading.Thread(target=answer)
        thread.start()
        (check,) = engine_checks(f"nats+tls://me:s3cret@127.0.0.1:{server.getsockname()[1]}")
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert (check.status, check.name) == ("FAIL", "nats server")
    assert "does not speak TLS: nothing secret was sent" in check.seen
    assert heard == []


def test_the_second_line_of_an_error_hides_secrets_too(edgeserve):
    result = edgeserve("topic", "list", "--node", "carrier-pigeon://me:s3cret@roof?token=s3cret")
    assert "where: edgeserve topic list --node carrier-pigeon://***@roof?token=***" in result.stderr.splitlines()
