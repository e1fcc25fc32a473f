"""The files of a local:// store: sealed or not, damaged or not, of this version or another, on this disk or elsewhere."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import pytest
from tests.transport.children import Child

from edgeserve.core.errors import ConfigurationError, StoreDamagedWarning, StoreVersion, TransportError
from edgeserve.testing.transport.cases import drain, frames_of, numbered, opening, publish
from edgeserve.transport import GroupKind, connect, disconnect, log
from edgeserve.transport.groups import Claim, GroupState
from edgeserve.transport.kv import MemoryKV, Space
from edgeserve.transport.local.engine import filesystem_of
from edgeserve.transport.local.rebuild import complete
from edgeserve.transport.records import Limits, encode_state, group_key, make_head, save_head

REBUILD_LOGGER = "edgeserve.transport.local.recovery"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def content(root: Path, topic: str = "a") -> list[bytes]:
    transport = connect(f"local://{root}")
    frames = [f for f, _, _ in transport.read(topic)]
    disconnect(transport)
    return frames


def fill(root: Path, *topics: str) -> None:
    transport = connect(f"local://{root}")
    for topic in topics:
        publish(transport, topic, numbered(100, topic), batch=10)
    disconnect(transport)


def killed_copy(root: Path, to: Path) -> Path:
    """The store as a kill -9 of everything at this moment would leave it."""
    shutil.copytree(root, to, ignore=shutil.ignore_patterns("wake"))
    return to


def test_a_store_that_was_closed_is_taken_as_it_is(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fill(root, "a")
    before = (root / "data" / "data.mdb").stat().st_ino
    assert content(root) == numbered(100, "a")
    assert (root / "data" / "data.mdb").stat().st_ino == before
    assert not caplog.records


def test_a_store_that_was_not_closed_is_looked_through_in_silence(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with opening(lambda: f"local://{root}") as open_it:
        transport = open_it()
        publish(transport, "a", numbered(100), batch=7)
        subscription = transport.subscribe(["a"], "g")
        drain(subscription, 40)
        subscription.settle({}, {"out": [b"r"]}, ids=[b"i" * 16], attributes={"k": b"v"})
        copy = killed_copy(root, tmp_path / "copy")
    with opening(lambda: f"local://{copy}") as open_it:
        transport = open_it()
        assert [r.message for r in caplog.records if "rebuilt" in r.message]
        assert [f for f, _, _ in transport.read("a")] == numbered(100)
        assert [f for f, _, _ in transport.read("out")] == [b"r"]
        again = transport.subscribe(["a"], "g")
        assert again.settled_ids() == [b"i" * 16] and again.attributes() == {"k": b"v"}
        assert frames_of(drain(again, 60)) == numbered(60, start=40)
    assert not list(copy.glob("damaged*"))


def test_what_was_let_go_above_a_held_message_is_no_damage(root: Path, tmp_path: Path) -> None:
    with opening(lambda: f"local://{root}?retention_mb=0.01") as open_it:
        transport = open_it()
        one = transport.subscribe(["a"], "g")
        publish(transport, "a", numbered(1))
        one.receive(1, 1000)
        for _ in range(4):
            publish(transport, "a", numbered(1_000), batch=50)
            drain(one, 1_000)
        kept = [p for _, p, _ in transport.read("a")]
        assert kept[0] == 0 and kept[1] > 1_000
        copy = killed_copy(root, tmp_path / "copy")
    with opening(lambda: f"local://{copy}") as open_it:
        transport = open_it()  # a warning would be an error
        assert [p for _, p, _ in transport.read("a")] == kept
        assert len(drain(transport.subscribe(["a"], "late"), len(kept))) == len(kept)
    assert not list(copy.glob("damaged*"))


def test_a_batch_that_comes_back_beside_its_gap_is_dropped() -> None:
    kv = MemoryKV()
    with kv.write() as txn:
        scratch = bytearray()
        key, state = group_key("a", "g"), GroupState(GroupKind.SHARED, 90, claims=[Claim(0, 1, "m", 0, 0)])
        txn.put(Space.STATE, key, encode_state(key, state))
        head = make_head(txn, "a")
        head.groups.append("g")
        save_head(txn, "a", head)
        for at in range(10):
            log.append(txn, "a", numbered(10, start=at * 10), 1, Limits(), scratch)
        before = {bytes(k): bytes(v) for k, v in txn.scan(Space.LOG, b"", b"\xff")}
        head = make_head(txn, "a")
        log.trim(txn, "a", head, 0, 0, most=4, above_floor=True)
        log.trim(txn, "a", head, 0, 0, most=100, above_floor=True)
        save_head(txn, "a", head)
        after = {bytes(k): bytes(v) for k, v in txn.scan(Space.LOG, b"", b"\xff")}
        assert len(before) == 10 and len(after) == 3
        for key, value in before.items():
            if key not in after:
                txn.put(Space.LOG, key, value)
        assert complete(txn) == []  # type: ignore[arg-type]  # it asks for LMDB's, and uses what all have
        assert {bytes(k): bytes(v) for k, v in txn.scan(Space.LOG, b"", b"\xff")} == after


def test_the_last_of_several_processes_seals_the_store(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    code = """
    t = connect(url)
    t.publisher("a").publish([b"1"])
    say("open")
    sys.stdin.readline()
    t.publisher("a").publish([b"3"])
    disconnect(t)
    """
    with Child(code, f"local://{root}") as child:
        assert child.line() == "open"
        transport = connect(f"local://{root}")
        publish(transport, "a", [b"2"])
        disconnect(transport)
        child.tell()
        child.end()
    assert content(root) == [b"1", b"2", b"3"]
    assert not caplog.records


def test_kill_9_of_everything_loses_nothing(root: Path) -> None:
    code = """
    t = connect(url)
    if sys.argv[2] == "publish":
        p = t.publisher("a", send_window=10**9)
        for n in range(10**9):
            p.publish([f"{n}-{m}".encode() for m in range(n % 5 + 1)])
            say(n)
    s = t.subscribe(["a"], "g")
    for n in range(10**9):
        found = s.receive(3, 20000)
        s.settle({"a": [d[1] for d in found]}, {"out": [bytes(d[0]) for d in found]}, ids=[d[1].to_bytes(16, "big") for d in found])
        say(found[-1][1])
    """
    url, done, handled = f"local://{root}", -1, -1
    for _ in range(3):
        with Child(code, url, "publish") as one, Child(code, url, "settle") as two:
            for _ in range(30):
                two.line()
            for child in (one, two):
                child.process.kill()
            for child in (one, two):
                child.process.wait()
            said = [int(line) for line in one.process.stdout or ()]
            done = said[-1] if said else done
            settled = [int(line) for line in two.process.stdout or () if line.strip()]
            handled = max([handled, *settled])
        with opening(lambda: url) as open_it:  # damage would be a warning, and that an error here
            transport = open_it()
            frames = [f for f, _, _ in transport.read("a")]
            assert f"{done}-0".encode() in frames
            assert transport.subscribe(["a"], "g").floor("a") > handled
            assert [f for f, _, _ in transport.read("out")] == frames[: transport.topic_info("out").next]


def test_a_process_killed_while_it_makes_the_store(root: Path, tmp_path: Path) -> None:
    fill(root, "a")
    fresh = tmp_path / "fresh"
    (fresh / "data").mkdir(parents=True)
    (fresh / "data" / "data.mdb").touch()
    fill(fresh, "a")
    assert content(fresh) == content(root)


@pytest.mark.parametrize("killed", [False, True])
def test_a_store_of_another_version_is_refused_and_left_as_it_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    with monkeypatch.context() as patch:
        for module in ("records", "local.recovery"):
            patch.setattr(f"edgeserve.transport.{module}.DISK_FORMAT", 9)
        transport = connect(f"local://{root}")
        publish(transport, "a", [b"x"])
        copy = killed_copy(root, tmp_path / "copy")
        disconnect(transport)
    store = copy if killed else root
    (store / "opened.json").unlink(missing_ok=True)
    before = (store / "data" / "data.mdb").read_bytes()
    for _ in range(2):
        with pytest.raises(StoreVersion, match=r"format 9.*reads format 2"):
            connect(f"local://{store}")
    assert (store / "data" / "data.mdb").read_bytes() == before


def test_a_version_is_refused_before_anything_of_the_data_is_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for module in ("records", "local.recovery"):
            patch.setattr(f"edgeserve.transport.{module}.DISK_FORMAT", 7)
        transport = connect(f"local://{root}")
        copy = killed_copy(root, tmp_path / "copy")
        disconnect(transport)
    (copy / "data" / "data.mdb").write_bytes(b"in some other format")
    with pytest.raises(StoreVersion, match="format 7"):
        connect(f"local://{copy}")
    assert (copy / "data" / "data.mdb").read_bytes() == b"in some other format"


def test_damage_is_named_once_and_the_old_files_are_kept(root: Path) -> None:
    fill(root, "a", "b")
    file = root / "data" / "data.mdb"
    data = file.read_bytes().replace(b"a55", b"XXX")
    file.write_bytes(data)
    with pytest.warns(StoreDamagedWarning, match=r"1 values could not be read.*positions 50 to 59 of topic 'a'"):
        assert content(root) == numbered(50, "a") + numbered(40, "a", start=60)
    (kept,) = root.glob("damaged-*")
    assert (kept / "data.mdb").read_bytes() == data
    assert content(root, "b") == numbered(100, "b")


def test_a_deleted_topic_does_not_come_back_from_the_pages_of_a_damaged_store(root: Path) -> None:
    fill(root, "a", "b")
    transport = connect(f"local://{root}")
    reader = transport.subscribe(["a"], "g")
    drain(reader, 100)
    reader.close()
    transport.delete_topic("a")
    publish(transport, "c", numbered(3, "c"))
    publish(transport, "a", numbered(2, "new"))
    disconnect(transport)
    file = root / "data" / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"b55", b"XXX"))
    with pytest.warns(StoreDamagedWarning, match=r"positions 50 to 59 of topic 'b'") as said:
        assert content(root, "b") == numbered(50, "b") + numbered(40, "b", start=60)
    assert "topic 'a'" not in str(said[0].message) and "lost" not in str(said[0].message)
    assert (content(root, "a"), content(root, "c")) == (numbered(2, "new"), numbered(3, "c"))
    transport = connect(f"local://{root}")
    transport.delete_topic("a")
    disconnect(transport)
    file.write_bytes(file.read_bytes().replace(b"b65", b"XXX"))
    with pytest.warns(StoreDamagedWarning):
        assert content(root, "a") == []


def test_what_is_missing_is_skipped_and_named_to_who_receives(root: Path) -> None:
    transport = connect(f"local://{root}")
    publish(transport, "a", numbered(100), batch=10)
    transport.subscribe(["a"], "g").close()
    disconnect(transport)
    file = root / "data" / "data.mdb"
    file.write_bytes(file.read_bytes().replace(b"m55", b"XXX"))
    with pytest.warns(StoreDamagedWarning), opening(lambda: f"local://{root}") as open_it:
        subscription = open_it().subscribe(["a"], "g")
        found = []
        with pytest.warns(StoreDamagedWarning, match="10 messages of topic 'a'"):
            while some := subscription.receive(10, 0):
                subscription.settle({"a": [d[1] for d in some]})
                found += some
        assert frames_of(found) == numbered(50) + numbered(40, start=60)
        assert subscription.floor("a") == 100


def test_the_newest_commits_are_missed(root: Path, tmp_path: Path) -> None:
    transport = connect(f"local://{root}")
    publish(transport, "a", [b"1"])
    older = (root / "data" / "data.mdb").read_bytes()
    publish(transport, "a", [b"2"])
    copy = killed_copy(root, tmp_path / "copy")
    disconnect(transport)
    (copy / "data" / "data.mdb").write_bytes(older)
    with pytest.warns(StoreDamagedWarning, match="the newest 1 commits"):
        assert content(copy) == [b"1"]


def test_a_restart_of_the_machine_is_noticed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = {}
    for durability in ("process", "disk"):
        transport = connect(f"local://{root}-{durability}?durability={durability}")
        publish(transport, "a", [b"1"])
        copies[durability] = killed_copy(Path(f"{root}-{durability}"), tmp_path / durability)
        disconnect(transport)
    monkeypatch.setattr("edgeserve.transport.local.recovery.boot", lambda: "after the power cut")
    assert content(copies["disk"]) == [b"1"]
    with pytest.warns(StoreDamagedWarning, match="restarted"):
        assert content(copies["process"]) == [b"1"]


def test_a_rebuild_that_was_killed_at_its_end_is_taken_up(root: Path, tmp_path: Path) -> None:
    transport = connect(f"local://{root}")
    publish(transport, "a", numbered(5))
    copy = killed_copy(root, tmp_path / "copy")
    disconnect(transport)
    (copy / "data").rename(copy / "data.rebuilt")
    assert content(copy) == numbered(5)


def test_every_kind_of_damage(tmp_path: Path) -> None:
    from bench import damage

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = damage.run(2 * len(damage.KINDS) + 3, 11, tmp_path)
    assert {o.kind for o in outcomes} == set(damage.KINDS)
    assert [text for o in outcomes for text in o.failures] == []
    assert any(o.missing for o in outcomes) and any(not o.missing for o in outcomes)


MOUNTS = r"""sysfs /sys sysfs rw,nosuid 0 0
/dev/vda / ext4 rw,relatime 0 0
server:/export /mnt/nfs nfs4 rw,vers=4.2 0 0
/dev/vdb /mnt/nfs/local ext4 rw 0 0
//box/share /mnt/with\040space\134 cifs rw 0 0
tmpfs /mnt/over tmpfs rw 0 0
user@host:/ /mnt/over fuse.sshfs rw 0 0
broken line
short
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/mnt/nfs", "nfs4"),
        ("/mnt/nfs/a/b", "nfs4"),
        ("/mnt/nfsother", "ext4"),
        ("/mnt/nfs/local/store", "ext4"),
        ("/mnt/with space\\/store", "cifs"),
        ("/mnt/over/store", "fuse.sshfs"),
    ],
)
def test_the_filesystem_of_a_path(path: str, kind: str) -> None:
    assert filesystem_of(Path(path), MOUNTS) == kind


def test_a_network_filesystem_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeserve.transport.local.engine.filesystem_of", lambda path, mounts: "nfs4")
    with pytest.raises(ConfigurationError, match="network filesystem"):
        connect(f"local://{root}")


def test_one_store_under_several_names_is_one_store(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    root.mkdir()
    one, two = connect(f"local://{root}"), connect(f"local://{tmp_path}/link/../store?retention_mb=5")
    publish(one, "a", [b"x"])
    assert [f for f, _, _ in two.read("a")] == [b"x"]
    with pytest.raises(ConfigurationError, match="durability"):
        connect(f"local://{root}?durability=disk")
    disconnect(one)
    publish(two, "a", [b"y"])
    disconnect(two)
    assert content(root) == [b"x", b"y"]


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file", "file/store", "file/deep/store"):
        with pytest.raises(ConfigurationError, match=rf"{tmp_path}/file is a file.*directory of its own") as caught:
            connect(f"local://{tmp_path}/{path}")
        assert "File exists" not in str(caught.value)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigurationError, match="nowhere is a link to nothing"):
        connect(f"local://{tmp_path}/nowhere")
    with pytest.raises(ConfigurationError, match="cannot make the directory"):
        connect("local:///proc/store")
    with pytest.raises(ConfigurationError, match="absolute path"):
        connect("local://relative/path")
    (tmp_path / "taken" / "data").mkdir(parents=True)
    (tmp_path / "taken" / "data" / "data.mdb").mkdir()
    with pytest.raises(TransportError, match="taken"):
        connect(f"local://{tmp_path}/taken")


def test_without_a_path_the_store_is_in_the_state_directory(_own_state_directory: Path) -> None:
    transport = connect("local://")
    publish(transport, "a", [b"x"])
    disconnect(transport)
    assert (_own_state_directory / "edgeserve" / "local" / "data" / "data.mdb").exists()


def identity(url: str) -> str:
    transport = connect(url)
    disconnect(transport)
    return transport.identity


def test_a_store_has_an_identity_that_goes_with_it(root: Path) -> None:
    first = identity(f"local://{root}")
    assert first and first == identity(f"local://{root}?size_mb=100")
    (root / "identity.json").unlink()  # as in a store that was made before there were any
    second = identity(f"local://{root}")
    assert second not in ("", first) and second == identity(f"local://{root}")
    shutil.rmtree(root)
    assert identity(f"local://{root}") not in (first, second)


def test_a_repaired_store_keeps_its_identity_if_it_can_be_read(root: Path) -> None:
    fill(root, "a")
    first = identity(f"local://{root}")
    data = root / "data" / "data.mdb"
    data.write_bytes(data.read_bytes()[:8192])
    with pytest.warns(StoreDamagedWarning):
        assert identity(f"local://{root}") == first
    (root / "identity.json").write_text((root / "identity.json").read_text().replace(first[:4], "zzzz"))
    assert identity(f"local://{root}") not in ("", first)


def test_stores_in_memory_have_identities() -> None:
    assert identity("memory://one") == identity("memory://one") not in ("", identity("memory://two"))
