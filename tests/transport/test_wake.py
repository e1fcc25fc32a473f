"""Wake-ups are best effort: what they tell of is committed already, so none of their errors may look like one of the commit."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from edgeserve.transport.wake import SocketSwitchboard


def test_a_process_without_free_descriptors_still_notifies_without_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board = SocketSwitchboard(tmp_path / "wake")
    waker = board.waker()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        with caplog.at_level(logging.WARNING, "edgeserve"):
            board.notify(waker.address)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "could not be woken" in caplog.text
    board.notify(waker.address, b"later")
    assert waker.drain() == [b"later"]
    waker.close()
    board.close()


def test_an_address_that_nobody_has_is_no_error(tmp_path: Path) -> None:
    board = SocketSwitchboard(tmp_path / "wake")
    waker = board.waker()
    board.notify(waker.address)
    waker.close()
    board.notify(waker.address)
    board.notify("never-was")
    assert not board.alive(waker.address)
    board.close()


def test_a_wait_ends_in_time_though_signals_keep_coming(tmp_path: Path) -> None:
    board = SocketSwitchboard(tmp_path / "wake")
    waker = board.waker()
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    # If the wait began anew with every signal, it would last until this wakes it.
    late = threading.Timer(20, board.notify, (waker.address,))
    late.start()
    try:
        waker.wait(0.1)
        assert waker.drain() == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        late.cancel()
        waker.close()
        board.close()
