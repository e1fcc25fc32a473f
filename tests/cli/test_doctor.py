"""`edgeserve doctor` finds what is wrong, names it, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeserve.cli.brokers.manage import free_port
from edgeserve.cli.doctor import _node
from edgeserve.core.errors import MissingExtra


def checks(result) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


def test_a_fit_machine_passes(edgeserve, node):
    result = edgeserve("doctor", "--json", "--node", node)
    assert result.returncode == 0, result.stdout
    found = checks(result)
    for name in ("python", "platform", "lmdb", "package", "store", "state directory", "node"):
        assert found[name]["status"] == "PASS", found[name]


def test_plain_text_has_a_status_per_line_and_no_colours(edgeserve):
    result = edgeserve("doctor")
    assert "\x1b" not in result.stdout
    assert all(line.startswith(("PASS  ", "WARN  ", "FAIL  ", "      -> ")) for line in result.stdout.splitlines())


def test_a_foreign_package_of_this_name_is_named_with_the_command_that_removes_it(edgeserve, tmp_path: Path):
    info = tmp_path / "site" / "edgeserve-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeserve\nVersion: 9.9\n")
    (info / "RECORD").write_text("edgeserve/__init__.py,,\nedgeserve-9.9.dist-info/RECORD,,\n")
    result = edgeserve("doctor", "--json", env={"PYTHONPATH": str(tmp_path / "site")})
    assert result.returncode == 1
    package = checks(result)["package"]
    assert package["status"] == "FAIL"
    assert "pip uninstall edgeserve" in package["to_do"]


def test_an_unreachable_node_fails(edgeserve):
    result = edgeserve("doctor", "--node", "carrier-pigeon://roof")
    assert result.returncode == 1
    assert "FAIL  node: carrier-pigeon://roof" in result.stdout
    assert result.stderr.splitlines()[0].startswith("error: 1 of ")
    assert len(result.stderr.splitlines()) == 3


def test_a_state_directory_that_is_a_file_fails(edgeserve, tmp_path: Path):
    (tmp_path / "file").write_text("")
    result = edgeserve("doctor", "--json", env={"EDGESERVE_STATE_DIR": str(tmp_path / "file")})
    assert result.returncode == 1
    assert checks(result)["state directory"]["status"] == "FAIL"


def test_a_broker_that_is_away_fails_in_seconds(edgeserve):
    node = f"nats://127.0.0.1:{free_port()}?deadline_s=1"
    found = checks(edgeserve("doctor", "--json", "--node", node))
    assert found["node"]["status"] == "FAIL" and "no NATS server answers" in found["node"]["seen"]


def test_a_pulsar_whose_admin_api_answers_alone_fails(edgeserve, pulsar_url: str):
    node = f"pulsar://127.0.0.1:{free_port()}?{pulsar_url.partition('?')[2]}"
    found = checks(edgeserve("doctor", "--json", "--node", node))["node"]
    assert found["status"] == "FAIL"
    assert "the admin API answers, but nobody does at 127.0.0.1:" in found["seen"]
    assert checks(edgeserve("doctor", "--json", "--node", pulsar_url))["node"]["status"] == "PASS"


def test_a_client_that_is_not_installed_is_no_server_that_is_down(monkeypatch: pytest.MonkeyPatch):
    def connect(_: str) -> None:
        raise MissingExtra("nats:// needs: pip install 'edgeserve-streams[nats]'")

    monkeypatch.setattr("edgeserve.transport.connect", connect)
    (check,) = _node("nats://127.0.0.1:4222")
    assert (check.status, check.to_do) == ("FAIL", "install what the message names")


def test_the_hosts_that_payloads_may_come_from_are_told(edgeserve):
    assert "EDGESERVE_ORIGINS is not set" in checks(edgeserve("doctor", "--json"))["payload origins"]["seen"]
    found = checks(edgeserve("doctor", "--json", env={"EDGESERVE_ORIGINS": "Camera-3.lan,10.0.0.0/8"}))["payload origins"]
    assert found["status"] == "PASS" and found["seen"].endswith("camera-3.lan, 10.0.0.0/8")
    found = checks(edgeserve("doctor", "--json", env={"EDGESERVE_ORIGINS": "http://cam"}))["payload origins"]
    assert found["status"] == "FAIL" and "'http://cam' is no host" in found["seen"]
