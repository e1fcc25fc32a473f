"""What a sink remembers on its host, and of which store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeserve import DataSource, Materialize
from edgeserve.core.errors import ConfigurationError


def pass_through(node: str) -> list[int]:
    """Sends what can be sent again, and returns what comes out of a sink."""
    found: list[int] = []
    with DataSource(range(5), node, source_id="n", topic="dst", message_id=lambda n: n) as source:
        source.run()
    with Materialize(found.append, node) as sink:
        sink.run(until="end")
    return found


def test_a_store_in_the_place_of_a_deleted_one_begins_anew(tmp_path: Path) -> None:
    node = f"local://{tmp_path / 'store'}"
    assert pass_through(node) == list(range(5))
    assert pass_through(node) == []
    shutil.rmtree(tmp_path / "store")
    assert pass_through(node) == list(range(5))


def test_the_journal_is_the_store_s_by_whatever_name_and_place(tmp_path: Path) -> None:
    assert pass_through(f"local://{tmp_path / 'store'}") == list(range(5))
    (tmp_path / "store").rename(tmp_path / "moved")
    (tmp_path / "moved" / "data" / "data.mdb").unlink()  # so that only the journal knows what is done
    for name in ("seal.json", "mark"):
        (tmp_path / "moved" / name).unlink()
    assert pass_through(f"local://{tmp_path / 'moved'}?size_mb=64") == []


def test_what_a_store_in_memory_did_leaves_nothing_behind(_own_state_directory: Path) -> None:
    assert pass_through("memory://passing") == list(range(5))
    assert not list(_own_state_directory.rglob("*.journal"))


def test_a_journal_that_cannot_be_kept_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    with pytest.raises(ConfigurationError, match=rf"journal in {tmp_path}/state/sinks/.*EDGESERVE_STATE_DIR"):
        pass_through(f"local://{tmp_path / 'store'}")
