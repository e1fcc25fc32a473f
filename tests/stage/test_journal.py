"""The sink's journal: what is done stays done, what was in hand is known, damage is never taken for truth."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeserve.core.errors import DiskFull, StoreDamagedWarning, StoreVersion
from edgeserve.stage.journal import Journal
from edgeserve.stage.ring import Ring


def id_of(number: int) -> bytes:
    return b"message-%08d" % number


def do(journal: Journal, numbers: range) -> None:
    begin, end = journal.writer()
    for number in numbers:
        begin(id_of(number))
        end()


def test_done_ids_and_the_one_in_hand_outlive_the_writer(tmp_path: Path) -> None:
    first = Journal(tmp_path, slots=100)
    assert first.fresh
    do(first, range(5))
    first.writer()[0](id_of(5))
    # No close: the process was killed, and its lock went with it.
    second = Journal(tmp_path, slots=100)
    assert not second.fresh
    assert second.done == [id_of(n) for n in range(5)]
    assert second.in_hand == {id_of(5)}


def test_what_was_in_hand_stays_in_doubt_until_it_is_done(tmp_path: Path) -> None:
    killed = []
    for number in range(3):
        journal = Journal(tmp_path, slots=100)
        assert journal.in_hand == {id_of(n) for n in range(number)}
        journal.writer()[0](id_of(number))
        killed.append(journal)
        # Killed: its lock goes, its file stays as it is.
        fcntl.flock(journal._fd, fcntl.LOCK_UN)
    last = Journal(tmp_path, slots=100)
    assert last.in_hand == {id_of(n) for n in range(3)}
    do(last, range(2))
    last.close()
    assert Journal(tmp_path, slots=100).in_hand == {id_of(2)}


def test_the_ring_keeps_the_newest(tmp_path: Path) -> None:
    journal = Journal(tmp_path, slots=8)
    do(journal, range(20))
    journal.close()
    journal.close()
    assert Journal(tmp_path, slots=8).done == [id_of(n) for n in range(13, 20)]


def test_members_have_a_journal_each_and_read_all(tmp_path: Path) -> None:
    one, two = Journal(tmp_path, slots=8), Journal(tmp_path, slots=8)
    assert one.path != two.path
    do(one, range(2))
    do(two, range(2, 4))
    one.refresh()
    assert sorted(one.done) == [id_of(n) for n in range(4)]
    one.close()
    assert Journal(tmp_path, slots=8).path == one.path


def test_a_message_that_was_given_up_is_not_in_hand(tmp_path: Path) -> None:
    journal = Journal(tmp_path, slots=8)
    journal.writer()[0](id_of(1))
    journal.abandon(id_of(2))
    journal.refresh()
    assert journal.in_hand == {id_of(1)}
    journal.abandon(id_of(1))
    journal.refresh()
    assert (journal.done, journal.in_hand) == ([], set())


@pytest.mark.parametrize("damage", ["head", "short", "long", "counters", "foreign"])
def test_a_damaged_journal_is_kept_and_begun_anew(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path, slots=8)
    do(journal, range(5))
    path = journal.path
    journal.close()
    raw = bytearray(path.read_bytes())
    if damage == "head":
        raw[13] ^= 1
    elif damage == "short":
        del raw[-5:]
    elif damage == "long":
        raw += b"x"
    elif damage == "counters":
        raw[32] ^= 0x40
    else:
        raw = bytearray(b"something else")
    path.write_bytes(raw)
    with pytest.warns(StoreDamagedWarning, match="begun anew"):
        again = Journal(tmp_path, slots=8)
    assert again.done == []
    assert path.with_suffix(".damaged").read_bytes() == bytes(raw)
    do(again, range(3))
    again.refresh()
    assert len(again.done) == 3


def test_a_newer_journal_is_left_alone(tmp_path: Path) -> None:
    import xxhash

    journal = Journal(tmp_path, slots=8)
    path = journal.path
    journal.close()
    head = b"ESJRNL\r\n" + struct.pack("<II", 99, 8)
    path.write_bytes(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)) + path.read_bytes()[24:])
    before = path.read_bytes()
    with pytest.raises(StoreVersion, match="format 99"):
        Journal(tmp_path, slots=8)
    assert path.read_bytes() == before


@settings(max_examples=150)
@given(at=st.integers(0, 64 + 24 * 8 - 1), bit=st.integers(0, 7))
def test_no_bit_flip_makes_an_undone_message_done(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, slots=8)
    do(journal, range(5))
    journal.writer()[0](id_of(5))
    path = journal.path
    journal.close()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << bit
    path.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreDamagedWarning)
        try:
            again = Journal(directory, slots=8)
        except StoreVersion:
            return
    assert set(again.done) <= {id_of(n) for n in range(5)}
    again.close()


def test_a_kill_between_the_two_counters_forgets_no_done_id(tmp_path: Path) -> None:
    first = Journal(tmp_path, slots=100)
    do(first, range(3))
    path = first.path
    first.close()
    raw = bytearray(path.read_bytes())
    struct.pack_into("<QQ", raw, 32, 3, 2)
    path.write_bytes(raw)
    second = Journal(tmp_path, slots=100)
    do(second, range(3, 5))
    second.close()
    assert Journal(tmp_path, slots=100).done == [id_of(n) for n in range(5)]


def test_what_is_in_hand_is_never_read_as_done_though_its_owner_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Journal(tmp_path, slots=8)
    begin, end = owner.writer()
    do(owner, range(9))
    begin(id_of(9))
    slot, steps = Ring._slot, [lambda: (end(), begin(id_of(10)))]

    def slow(self: Ring, number: int) -> bytes:
        # The first slot of the ring is read: its owner comes round to it right then.
        if number == 2 and steps:
            steps.pop()()
        return slot(self, number)

    monkeypatch.setattr(Ring, "_slot", slow)
    other = Journal(tmp_path, slots=8)
    assert not steps
    assert id_of(10) not in other.done
    assert set(other.done) == {id_of(n) for n in range(3, 9)}
    assert id_of(9) in other.in_hand


def test_a_look_tells_what_others_did_since_and_what_they_have_in_hand(tmp_path: Path) -> None:
    one, two = Journal(tmp_path, slots=8), Journal(tmp_path, slots=8)
    assert two.complete() and not one.complete()
    one.refresh()
    assert one.complete()
    do(two, range(3))
    two.writer()[0](id_of(3))
    one.writer()[0](id_of(4))
    assert one.look(id_of(4)) == ([id_of(n) for n in range(3)], False)
    assert one.look(id_of(3)) == ([], True)
    assert two.look(id_of(4)) == ([], True)
    two.writer()[1]()
    do(two, range(4, 30))
    assert one.look(id_of(3)) == ([id_of(n) for n in range(23, 30)], False)
    one.close()
    two.close()


def test_a_damaged_journal_is_begun_anew_under_the_eyes_of_others(tmp_path: Path) -> None:
    one, two = Journal(tmp_path, slots=8), Journal(tmp_path, slots=8)
    do(two, range(5))
    one.refresh()
    path = two.path
    two.close()
    raw = bytearray(path.read_bytes())
    raw[32] ^= 0x40
    with path.open("r+b") as file:
        file.write(raw)
    with pytest.warns(StoreDamagedWarning):
        again = Journal(tmp_path, slots=8)
    do(again, range(5, 7))
    one.refresh()
    assert one.done == [id_of(n) for n in range(5, 7)]
    assert one.look(id_of(0)) == ([], False)


def test_doubts_are_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path, slots=8)
    for number in range(10_000):
        journal.doubt(id_of(number))
    assert (tmp_path / "doubts").stat().st_size <= 2 * 4096 * 24 + 24
    journal.refresh()
    assert id_of(9_999) in journal.in_hand and len(journal.in_hand) <= 4096


@pytest.mark.parametrize("written", [0, 11])
def test_a_doubt_that_finds_the_disk_full_is_named_and_damages_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """The disk's answer is made up: it takes a part of what it is to write, then nothing."""
    journal = Journal(tmp_path, slots=8)
    journal.doubt(id_of(1))
    write = os.pwrite

    def full(fd: int, data: bytes, at: int) -> int:
        if full.left:  # type: ignore[attr-defined]
            full.left = 0  # type: ignore[attr-defined]
            return write(fd, data[:written], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    full.left = written  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match=r"no space left in .* for a sink's journal"):
            journal.doubt(id_of(2))
    journal.doubt(id_of(3))
    journal.refresh()
    assert journal.in_hand == {id_of(1), id_of(3)}


def test_a_journal_that_cannot_write_down_a_doubt_lets_go_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Journal(tmp_path, slots=8)
    first.writer()[0](id_of(1))
    first.close()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull):
            Journal(tmp_path, slots=8)
    again = Journal(tmp_path, slots=8)
    assert again.path == first.path and again.in_hand == {id_of(1)}
