"""`edgeserve doctor` finds what is wrong, names it, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path


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
