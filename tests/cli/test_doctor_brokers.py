"""`edgeserve doctor --node`: what is said of real brokers, and that no secret is."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest

from edgeserve.cli.brokers.manage import free_port
from edgeserve.cli.checks import shown, without_secrets
from edgeserve.cli.engine_checks import _pulsar_settings, _retention, admin_url, engine_checks

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

    def ask(self, path: str) -> Any:
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
    url = new_nats(token="tok-secret").url
    for node, env, status in (
        (f"{url}?token=tok-secret", {}, "PASS"),
        (url.replace("://", "://tok-secret@"), {}, "PASS"),
        (url, {"EDGESERVE_NATS_TOKEN": "tok-secret"}, "PASS"),
        (f"{url}?token=wrong-secret", {}, "FAIL"),
        (url.replace("://", "://me:wrong-secret@"), {}, "FAIL"),
    ):
        result = edgeserve("doctor", "--json", "--node", node, env=env)
        found = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        assert found["nats storage"]["status"] == status, found["nats storage"]
        assert "secret" not in result.stdout + result.stderr


def test_a_nats_that_is_not_there_is_a_warning():
    (check,) = engine_checks(f"nats://127.0.0.1:{free_port()}")
    assert check.status == "WARN" and "edgeserve broker start nats" in check.to_do


def test_a_nats_without_jetstream_fails():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b'INFO {"version": "2.10.0", "max_payload": 1048576}\r\n')

        thread = threading.Thread(target=answer)
        thread.start()
        (check,) = engine_checks(f"nats://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    assert (check.status, check.name) == ("FAIL", "nats jetstream")
    assert "--jetstream" in check.to_do


@pytest.mark.parametrize(
    ("url", "admin"),
    [
        ("pulsar://h:6650", "http://h:8080"),
        ("pulsar://h", "http://h:8080"),
        ("pulsar://[::1]:6650/a/b", "http://[::1]:8080"),
        ("pulsar+ssl://h:6651", "https://h:8443"),
        ("pulsar+ssl://h:6651?admin=https://other:443/", "https://other:443"),
    ],
)
def test_where_the_admin_api_is(url: str, admin: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EDGESERVE_PULSAR_ADMIN", raising=False)
    assert admin_url(url) == admin


@pytest.mark.parametrize(
    "url",
    [
        "nats://s3cret@h:1",
        "nats://me:s3cret@h:1,g:2/x?token=s3cret",
        "nats://me:s3cr%65t@h",
        "pulsar://h?admin=http://a&token=s3cret",
        "pulsar://h?Password=s3cret#x",
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str):
    assert "3cr" not in shown(url)
    assert "3cr" not in without_secrets(f"cannot reach {url} as s3cret", url)


def test_the_second_line_of_an_error_hides_secrets_too(edgeserve):
    result = edgeserve("topic", "list", "--node", "carrier-pigeon://me:s3cret@roof?token=s3cret")
    assert "where: edgeserve topic list --node carrier-pigeon://***@roof?token=***" in result.stderr.splitlines()
