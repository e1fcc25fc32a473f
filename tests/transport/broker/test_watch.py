"""A dead process is noticed at once."""

from __future__ import annotations

import os
import subprocess
import sys

from edgeserve.transport.broker.watch import Watch


def test_a_process_that_is_killed_is_noticed_at_once_and_until_it_is_let_go() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    watch = Watch()
    try:
        watch.only([child.pid, os.getpid()])
        watch.only([child.pid])
        assert not watch.someone_died()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, though its parent has not taken notice
        assert watch.someone_died() and watch.someone_died()
        watch.only([])
        assert not watch.someone_died()
    finally:
        child.communicate()
        watch.close()
        watch.close()


def test_a_process_that_is_not_there_cannot_be_watched() -> None:
    watch = Watch()
    watch.only([2**22 + 1])
    assert not watch.someone_died()
