"""Payloads in shared memory: read in place, never reused under a reader, never left behind."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeserve.core.errors import ConfigurationError, CorruptMessage, PayloadGone
from edgeserve.core.process import boot
from edgeserve.payload import (
    PayloadReader,
    PayloadWriter,
    Reference,
    Sweep,
    is_gone,
    make_payload_directory,
    payload_base,
    reader_of,
    remove_orphans,
    store_name,
)
from edgeserve.payload import writer as writer_module
from edgeserve.payload.leases import key_of, leased
from edgeserve.payload.segment import PAGE, Entry, Segment
from edgeserve.payload.writer import is_settled, slot_bytes_for

SIZE = 100_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


class Groups:
    """What all groups have settled, and where the topic ends, as an engine tells it."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []
        self.last = 7
        self.asked = 0

    def __call__(self, topic: str) -> list[tuple[int, int]]:
        assert topic == "t"
        self.asked += 1
        return self.done

    def end(self, topic: str) -> int:
        return self.last


def writer_of(directory: Path, groups: Groups | None = None, slots: int = 0) -> PayloadWriter:
    """A writer with room for so many payloads."""
    groups = groups or Groups()
    limit = slots * slot_bytes_for(SIZE) or 256 << 20
    return PayloadWriter(directory, "t", groups, groups.end, limit)


def payload(n: int, size: int = SIZE) -> bytes:
    return bytes([n % 251]) * size


def expected(writer: PayloadWriter, n: int, size: int = SIZE) -> tuple[Reference, object]:
    """Keeps payload n; what refers to it, and the frame that is expected to be stored."""
    kept = writer.put([payload(n, size)], size)
    assert kept is not None
    frame = object()
    writer.expect(frame, kept[1])
    return kept[0], frame


def put(writer: PayloadWriter, n: int, position: int, size: int = SIZE) -> Reference:
    """Keeps payload n, whose message is stored at `position`."""
    reference, frame = expected(writer, n, size)
    writer.placed([object(), frame], position - 1)
    return Reference.decode(reference.encode())


def test_a_payload_is_read_where_it_was_written(directory: Path) -> None:
    writer, reader = writer_of(directory), PayloadReader(directory)
    kept = writer.put([b"ab", memoryview(np.arange(9, dtype=np.int32)), b"c"], 39)
    assert kept is not None
    view = reader.open(kept[0])
    assert bytes(view) == b"ab" + np.arange(9, dtype=np.int32).tobytes() + b"c"
    assert view.readonly and not np.frombuffer(view, np.uint8).flags.writeable
    address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    assert address % PAGE == 0
    assert bytes(reader.copy(kept[0])) == bytes(view)


def test_a_slot_is_used_again_when_its_message_is_settled_and_not_before(directory: Path) -> None:
    groups = Groups()
    writer, reader = writer_of(directory, groups, 2), PayloadReader(directory)
    first, second = put(writer, 1, 10), put(writer, 2, 11)
    groups.done = [(0, 11)]
    third = put(writer, 3, 12)
    assert (third.segment, third.slot) == (first.segment, first.slot) and third.generation > first.generation
    assert bytes(reader.open(second)) == payload(2) and bytes(reader.open(third)) == payload(3)
    with pytest.raises(PayloadGone):
        reader.open(first)
    with pytest.raises(PayloadGone):
        reader.copy(first)


def test_a_view_that_is_held_keeps_its_payload(directory: Path) -> None:
    groups = Groups()
    writer, reader = writer_of(directory, groups, 2), PayloadReader(directory)
    put(writer, 1, 0)
    held: Any = np.frombuffer(reader.open(put(writer, 2, 1)), np.uint8)[5:50]
    groups.done = [(0, 2)]
    third = put(writer, 3, 2)
    groups.done = [(0, 3)]
    assert put(writer, 4, 3).slot == third.slot
    assert held.tolist() == [2] * 45
    assert len(leased(directory)) == 1
    del held
    gc.collect()
    assert not leased(directory)
    groups.done = [(0, 4)]
    assert {put(writer, 5, 4).slot, put(writer, 6, 5).slot} == {0, 1}


def test_what_is_not_looked_at_any_more_has_no_lease(directory: Path) -> None:
    writer, reader = writer_of(directory), PayloadReader(directory)
    for n in range(5):
        assert reader.open(put(writer, n, n))[0] == n
    assert not leased(directory)


def test_more_than_the_budget_is_copied(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeserve.payload.reader.LEASE_BYTES", 2 * SIZE)
    writer, reader = writer_of(directory), PayloadReader(directory)
    held = [reader.open(put(writer, n, n)) for n in range(4)]
    assert [view[0] for view in held] == [0, 1, 2, 3]
    assert (len(leased(directory)), reader.copied) == (2, 2)
    del held
    assert not leased(directory)


def test_without_room_for_leases_payloads_are_copied(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reference, reader = put(writer_of(directory), 1, 0), PayloadReader(directory)
    with monkeypatch.context() as patched:
        patched.setattr("edgeserve.payload.reader.Table", full)
        assert bytes(reader.open(reference)) == payload(1) and reader.copied == 1
    view = reader.open(reference)
    assert view[0] == 1 and len(leased(directory)) == 1


def test_a_payload_that_may_not_be_read_is_gone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = put(writer_of(directory), 1, 0)
    path = directory / reference.segment
    path.rename(directory / "elsewhere")
    path.symlink_to(directory / "elsewhere")
    with pytest.raises(PayloadGone, match="cannot be read"):
        PayloadReader(directory).open(reference)


def test_a_payload_is_looked_at_once_however_often_it_is_opened(directory: Path) -> None:
    writer, reader = writer_of(directory), reader_of(directory)
    assert reader_of(directory) is reader  # of two nodes in one process, the first to let go must not let go for both
    reference = put(writer, 1, 0)
    one, two = reader.open(reference), reader.open(reference)
    del one
    assert len(leased(directory)) == 1 and two[0] == 1
    del two
    assert not leased(directory)


def test_a_forks_copy_of_a_view_lets_nothing_go(directory: Path) -> None:
    view = PayloadReader(directory).open(put(writer_of(directory), 1, 0))
    child = os.fork()
    if child == 0:
        del view
        os._exit(0)
    os.waitpid(child, 0)
    assert len(leased(directory)) == 1 and view[0] == 1


def test_a_group_that_comes_while_a_slot_is_let_go_keeps_it(directory: Path) -> None:
    groups, calls = Groups(), list[int]()

    def settled(topic: str) -> list[tuple[int, int]]:
        calls.append(1)
        return [(0, 2)] if len(calls) % 2 else [(0, 1)]  # it has come between the two looks, and wants the second

    writer = PayloadWriter(directory, "t", settled, groups.end, 2 * slot_bytes_for(SIZE))
    first, second = put(writer, 1, 0), put(writer, 2, 1)
    third = put(writer, 3, 2)
    reader = PayloadReader(directory)
    assert third.slot == first.slot and bytes(reader.open(second)) == payload(2)


def test_a_payload_stays_when_it_cannot_be_asked_whether_it_is_needed(directory: Path) -> None:
    groups, calls = Groups(), list[int]()

    def settled(topic: str) -> list[tuple[int, int]]:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return [(0, 1)]

    writer, reader = PayloadWriter(directory, "t", settled, groups.end, slot_bytes_for(SIZE)), PayloadReader(directory)
    reference = put(writer, 1, 0)
    with pytest.raises(OSError, match="open files"):
        writer.put([payload(2)], SIZE)
    assert bytes(reader.open(reference)) == payload(1)
    writer.close()
    groups.done = [(0, 1)]
    assert Sweep(directory, groups, groups.end).look() == 1


def test_leases_are_seen_after_their_directory_was_removed(directory: Path) -> None:
    writer, reader = writer_of(directory), PayloadReader(directory)
    assert reader.open(put(writer, 1, 0))
    shutil.rmtree(directory)
    directory.mkdir()
    view = reader.open(put(writer_of(directory), 2, 0))
    assert len(leased(directory)) == 1 and view[0] == 2


def test_a_frame_that_may_be_stored_twice_keeps_its_payload_until_all_before_is_settled(directory: Path) -> None:
    groups = Groups()
    writer = writer_of(directory, groups, 1)
    reference, frame = expected(writer, 1)
    writer.doubt([frame])  # it may be at 3
    writer.placed([frame], 9)
    groups.done = [(0, 3), (4, 12)]
    reader = PayloadReader(directory)
    assert reader.open(reference)[0] == 1 and put_or_none(writer) is None
    groups.done = [(0, 12)]
    assert put_or_none(writer) is not None


def test_a_frame_that_is_abandoned_keeps_its_payload_until_what_there_is_is_settled(directory: Path) -> None:
    groups = Groups()
    writer = writer_of(directory, groups, 1)
    _, frame = expected(writer, 1)
    writer.abandon([frame])
    groups.done = [(0, 6)]
    assert put_or_none(writer) is None
    groups.done = [(0, 7)]
    assert put_or_none(writer) is not None


def put_or_none(writer: PayloadWriter) -> object:
    """Whether there is room at once."""
    writer._stalled = True
    return writer.put([payload(9)], SIZE)


def test_writers_that_come_and_go_do_not_fill_the_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_STALL_S", 0.01)
    for n in range(4):
        writer = writer_of(directory, slots=4)
        for slot in range(4):
            if (kept := writer.put([payload(slot)], SIZE)) is not None:
                frame = object()
                writer.expect(frame, kept[1])
                writer.placed([frame], 4 * n + slot)
        writer.close()
    assert sum(path.stat().st_size for path in directory.glob("*.payloads")) < 5 * slot_bytes_for(SIZE) + 3 * PAGE


def test_what_a_writer_before_has_left_is_room_again_when_it_is_settled(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = Groups()
    before = writer_of(directory, groups, 2)
    put(before, 1, 0), put(before, 2, 1)
    before.close()
    sweep = Sweep(directory, groups, groups.end)
    writer = PayloadWriter(directory, "t", groups, groups.end, 2 * slot_bytes_for(SIZE), sweep=sweep.look)
    assert writer.put([payload(3)], SIZE) is None and writer.put([payload(3)], SIZE) is None
    assert [record.message.count("wait to be settled") for record in caplog.records] == [1]
    groups.done = [(0, 2)]
    writer._sweep_at = 0.0  # a moment later
    assert put(writer, 4, 2)


def test_without_room_a_payload_travels_with_its_message(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_STALL_S", 0.05)
    groups = Groups()
    writer = writer_of(directory, groups, 2)
    put(writer, 1, 0), put(writer, 2, 1)
    assert writer.put([payload(3)], SIZE) is None and writer.put([payload(3)], SIZE) is None
    assert writer.put([payload(3, 10 * SIZE)], 10 * SIZE) is None
    assert writer.refused == 3
    groups.done = [(0, 2)]
    assert put(writer, 4, 2)


def test_memory_goes_to_whatever_size_comes(directory: Path) -> None:
    groups = Groups()
    writer = PayloadWriter(directory, "t", groups, groups.end, 1 << 20)
    for n, size in enumerate([SIZE, 400_000, 70_000, 900_000, SIZE]):
        put(writer, n, n, size)
        groups.done = [(0, n + 1)]
    assert sum(path.stat().st_size for path in directory.glob("*.payloads")) < 2 << 20
    writer.close()
    assert list(directory.glob("*.payloads")) == []


def test_what_was_not_sent_after_all_is_let_go(directory: Path) -> None:
    writer = writer_of(directory, slots=1)
    for n in range(3):
        kept = writer.put([payload(n)], SIZE)
        assert kept is not None
        if n:
            writer.cancel(kept[1])
        else:
            frame = object()
            writer.expect(frame, kept[1])
            writer.drop([frame])


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("store", "other", PayloadGone),
        ("store", "../store", CorruptMessage),
        ("segment", "../../etc/passwd", CorruptMessage),
        ("segment", "leases", PayloadGone),
        ("segment", "0123456789abcdef.0123456789abcdef.payloads", PayloadGone),
        ("slot", 1_000_000, CorruptMessage),
        ("slot", -1, CorruptMessage),
        ("size", 2**40, CorruptMessage),
        ("size", SIZE - 1, CorruptMessage),
        ("generation", 9, PayloadGone),
        ("checksum", 7, CorruptMessage),
        ("checksum", "x", CorruptMessage),
    ],
)
@pytest.mark.parametrize("looked_at", [False, True])
def test_a_hostile_reference_is_refused(directory: Path, field: str, value: object, error: type[Exception], looked_at: bool) -> None:
    writer, reader = writer_of(directory), PayloadReader(directory)
    reference = put(writer, 1, 0)
    held = reader.open(reference) if looked_at else None
    at = Reference.__struct_fields__.index(field)
    raw = msgspec.to_builtins(reference)
    raw[at] = value
    for read in (reader.open, reader.copy):
        with pytest.raises(error):
            read(Reference.decode(msgspec.msgpack.encode(raw)))
    assert held is None or len(leased(directory)) == 1


def test_a_slot_that_seems_to_be_of_a_generation_before_is_looked_at_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups()
    writer = writer_of(directory, groups, 1)
    put(writer, 1, 0)
    groups.done = [(0, 1)]
    reference, entry = put(writer, 2, 1), Segment.entry

    def half_written(self: Segment, slot: int) -> Entry:
        monkeypatch.setattr(Segment, "entry", entry)
        found = entry(self, slot)
        found.generation -= 1
        return found

    monkeypatch.setattr(Segment, "entry", half_written)
    assert PayloadReader(directory).open(reference)[0] == 2


@pytest.mark.parametrize("damage", [b"", b"x" * 10_000, b"edgePAY\x01" + b"\xff" * 10_000, b"edgePAY\x01" + bytes(4096 - 8)])
def test_a_file_that_is_none_of_ours_is_refused(directory: Path, damage: bytes) -> None:
    reference = put(writer_of(directory), 1, 0)
    (directory / reference.segment).unlink()
    (directory / reference.segment).write_bytes(damage)
    with pytest.raises(CorruptMessage, match="payloads"):
        PayloadReader(directory).open(reference)


WRITER = """
import sys, time
from pathlib import Path
from edgeserve.payload import PayloadWriter
writer = PayloadWriter(Path(sys.argv[1]), "t", lambda topic: [], lambda topic: 7)
for position in (3, 5, None):
    reference, slot = writer.put([b"p" * 100_000], 100_000)
    frame = object()
    writer.expect(frame, slot)
    if position is not None:
        writer.placed([frame], position)
    print(reference.encode().hex(), flush=True)
time.sleep(600)
"""


def test_what_a_killed_writer_left_goes_when_it_is_settled_and_not_before(directory: Path) -> None:
    groups = Groups()
    sweep = Sweep(directory, groups, groups.end)
    with subprocess.Popen([sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        references = [Reference.decode(bytes.fromhex(child.stdout.readline())) for _ in range(3)]
        groups.done = [(0, 100)]
        assert sweep.look() == 0  # it lives
        child.send_signal(signal.SIGKILL)
    groups.done = [(0, 3), (4, 100)]
    assert sweep.look() == 0
    groups.done = [(0, 6)]  # of the third it is not known where its message is: it may be the topic's last
    assert sweep.look() == 0
    groups.done = [(0, 7)]
    view = PayloadReader(directory).open(references[1])
    assert sweep.look() == 0  # somebody looks
    del view
    assert sweep.look() == 1 and list(directory.glob("*.payloads")) == []


def test_stores_that_are_gone_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    directories = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        directories.append(make_payload_directory(store_name("0" * 32, tmp_path / name), tmp_path / name))
        writer = writer_of(directories[-1])
        put(writer, 1, 0)
        writer.close()
    assert directories[0] != directories[1]  # a copy of a store is another

    def look() -> list[bool]:
        """As the second store's sender does."""
        remove_orphans(payload_base(), lambda directory: is_gone(directory, directories[1].name, tmp_path / "two"))
        return [directory.exists() for directory in directories]

    assert look() == [True, True]
    shutil.rmtree(tmp_path / "one")
    assert look() == [False, True]
    # Another store in the place of the first, which may have got its inode.
    again = store_name("1" * 32, tmp_path / "two")
    remove_orphans(payload_base(), lambda directory: is_gone(directory, again, tmp_path / "two"))
    assert not directories[1].exists()


@pytest.fixture
def orphan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The payloads of a store that is not to be seen any more."""
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    root = tmp_path / "gone"
    root.mkdir()
    directory = make_payload_directory(store_name("0" * 32, root), root)
    writer = writer_of(directory)
    put(writer, 1, 0)
    writer.close()
    root.rmdir()
    return directory


def remove_all_but(root: Path) -> None:
    """As the sender of another store does."""
    root.mkdir()
    name = store_name("1" * 32, root)
    remove_orphans(payload_base(), lambda directory: is_gone(directory, name, root))


def in_another_container(directory: Path) -> Path:
    note = directory / "origin"
    note.write_bytes(note.read_bytes().replace(b"mnt:[", b"mnt:[9"))
    return directory


def before_another_start(directory: Path) -> Path:
    note = directory / "origin"
    note.write_bytes(note.read_bytes().replace(boot().encode(), b"0" * 8))
    return directory


def half_written(directory: Path) -> Path:
    (directory / "origin").write_bytes(b"")
    return directory


def with_a_relative_origin(directory: Path) -> Path:
    note = directory / "origin"
    note.write_bytes(note.read_bytes().replace(b"\n/", b"\n"))
    return directory


def on_a_disk_that_is_not_mounted(directory: Path) -> Path:
    identity, device, number = directory.name.split("-")
    return directory.rename(directory.with_name(f"{identity}-{int(device, 16) + 1:x}-{number}"))


def with_another_name(directory: Path) -> Path:
    return directory.rename(directory.with_name("photos"))


@pytest.mark.parametrize(
    "made",
    [in_another_container, before_another_start, half_written, with_a_relative_origin, on_a_disk_that_is_not_mounted, with_another_name],
)
def test_what_may_belong_to_a_store_elsewhere_is_left_alone(orphan: Path, tmp_path: Path, made: Callable[[Path], Path]) -> None:
    directory = made(orphan)
    before = sorted(directory.rglob("*"))
    remove_all_but(tmp_path / "mine")
    assert sorted(directory.rglob("*")) == before and len(before) > 1


def test_what_others_have_put_beside_payloads_stays(orphan: Path, tmp_path: Path) -> None:
    (orphan / "notes.txt").write_text("mine")
    remove_all_but(tmp_path / "mine")
    assert [path.name for path in orphan.rglob("*")] == ["notes.txt"]


def test_where_a_store_is_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", str(tmp_path / "payloads"))
    (tmp_path / "one").mkdir()
    note = make_payload_directory("one", tmp_path / "one") / "origin"
    whole, first = note.read_bytes(), note.stat()
    make_payload_directory("one", tmp_path / "one")
    assert (note.stat().st_ino, note.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    note.write_bytes(b"")
    with open(note, "rb") as reading:
        make_payload_directory("one", tmp_path / "one")
        assert reading.read() == b""  # it is replaced, and not written anew, so that nobody reads half of it
    assert note.read_bytes() == whole and [path.name for path in note.parent.iterdir()] == ["origin"]


def test_a_relative_directory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_PAYLOAD_DIR", "~/payloads")
    with pytest.raises(ConfigurationError, match="absolute"):
        payload_base()


def test_a_killed_readers_leases_hold_nothing(directory: Path) -> None:
    reference = put(writer_of(directory), 1, 0)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom edgeserve.payload import PayloadReader, Reference\n"
        "view = PayloadReader(Path(sys.argv[1])).open(Reference.decode(bytes.fromhex(sys.argv[2])))\n"
        "print('open', flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(directory), reference.encode().hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "open\n"
        assert leased(directory) == {key_of(reference.segment, reference.slot, reference.generation)}
        child.send_signal(signal.SIGKILL)
    assert not leased(directory) and os.listdir(directory / "leases") == []


FORKS = """
import os, sys, time
from pathlib import Path
from edgeserve.payload import PayloadReader, PayloadWriter
directory = Path(sys.argv[1])
writer = PayloadWriter(directory, "t", lambda topic: [], lambda topic: 7)
reference, slot = writer.put([b"p" * 100_000], 100_000)
frame = object()
writer.expect(frame, slot)
writer.placed([frame], 0)
view = PayloadReader(directory).open(reference)
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_a_child_of_fork_keeps_nothing_that_its_killed_parent_had_locked(directory: Path) -> None:
    groups = Groups()
    groups.done = [(0, 1)]
    with subprocess.Popen([sys.executable, "-c", FORKS, str(directory)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert len(leased(directory)) == 1
        parent.send_signal(signal.SIGKILL)
    try:
        assert not leased(directory)
        assert Sweep(directory, groups, groups.end).look() == 1
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_of_fork_lets_go_of_nothing_that_its_parent_has_locked(directory: Path) -> None:
    groups = Groups()
    groups.done = [(0, 1)]
    writer = writer_of(directory, groups)
    put(writer, 1, 0)
    child = os.fork()
    if child == 0:
        writer._segments[0].close()
        os._exit(0)
    os.waitpid(child, 0)
    assert Sweep(directory, groups, groups.end).look() == 0


def test_what_cannot_be_mapped_leaves_no_file_and_no_descriptor(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    writer = writer_of(directory)
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", refuse)
        assert writer.put([payload(1)], SIZE) is None
    assert os.listdir("/proc/self/fd") == before and os.listdir(directory) == []


def test_who_looks_at_a_file_that_is_being_made_is_waited_for(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def looked_at(fd: int, how: int) -> None:
        """Somebody has the new file locked when its maker is about to."""
        monkeypatch.setattr(fcntl, "flock", flock)
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        flock(other, fcntl.LOCK_SH)
        threading.Timer(0.05, os.close, [other]).start()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", looked_at)
    assert put(writer_of(directory), 1, 0)


def test_positions_are_found_in_ranges() -> None:
    ranges = [(0, 3), (5, 6), (9, 12)]
    assert [n for n in range(15) if is_settled(n, ranges, whole=False)] == [0, 1, 2, 5, 9, 10, 11]
    assert [n for n in range(15) if is_settled(n, ranges, whole=True)] == [0, 1, 2]
    assert not is_settled(0, [], whole=False) and not is_settled(0, [(1, 9)], whole=True)


def test_slots_waste_little() -> None:
    for size in (1, 64 << 10, 100_000, 1_000_000, 6_220_800, 1 << 30):
        assert size <= slot_bytes_for(size) <= max(PAGE, size * 1.26)
