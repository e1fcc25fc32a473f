"""Whether a process that was seen before still lives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgeserve.core.process import born, lives, process_name, this_host

pytestmark = pytest.mark.skipif(not this_host(), reason="the system does not name its hosts")


def test_a_process_lives_until_it_ends_and_not_only_until_somebody_waits_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        name, since = process_name(child.pid), born(child.pid)
        assert name.startswith(f"{child.pid}-") and since is not None and since.endswith(name.partition("-")[2])
        assert lives(this_host(), name) is True
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert (born(child.pid), process_name(child.pid), lives(this_host(), name)) == (None, "", False)
    assert lives(this_host(), name) is False


def test_another_with_the_same_number_is_not_it() -> None:
    number, _, started = process_name(os.getpid()).partition("-")
    assert lives(this_host(), f"{number}-{int(started) + 1}") is False


def test_of_other_hosts_nothing_is_known() -> None:
    for host, process in (("elsewhere", process_name(os.getpid())), ("", ""), (this_host(), "")):
        assert lives(host, process) is None


def test_the_main_thread_is_not_the_process() -> None:
    """It may have ended while others still write."""
    code = "import ctypes, threading; threading.Thread(target=input).start(); ctypes.CDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        name = process_name(child.pid)
        with open(f"/proc/{child.pid}/stat", "rb", buffering=0) as stat:
            while stat.read().rpartition(b")")[2].split()[0] != b"Z":
                stat.seek(0)
        assert lives(this_host(), name) is True
        child.kill()
    assert lives(this_host(), name) is False
