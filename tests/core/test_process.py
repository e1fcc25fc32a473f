"""Whether a process that was seen before still lives."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edgeserve.core import process
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
    for host, name in (("elsewhere", process_name(os.getpid())), ("", ""), (this_host(), "")):
        assert lives(host, name) is None


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


SEE = """
import sys
sys.path.insert(0, sys.argv[1])
from edgeserve.core.process import hidden, lives, this_host
pid, name = int(sys.argv[2]), sys.argv[3]
print(lives(this_host(), name), hidden(pid), lives(this_host(), "4194304-1"))
"""
APART = "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid=65534 --regid=65534 --clear-groups "
"""Starts what follows as a user who is shown no processes of others."""


def can_be_kept_apart() -> bool:
    return subprocess.run(["unshare", "-m", "sh", "-c", f"{APART} true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_be_kept_apart(), reason="needs the right to mount /proc anew")
def test_another_users_process_that_is_not_shown_is_not_taken_for_dead(tmp_path: Path) -> None:
    module = tmp_path / "edgeserve" / "core" / "process.py"  # where that user may read it
    module.parent.mkdir(parents=True)
    module.write_bytes(Path(process.__file__).read_bytes())
    see = tmp_path / "see.py"
    see.write_text(SEE)
    folder = module.parent
    while folder != Path(tempfile.gettempdir()):
        folder.chmod(0o755)
        folder = folder.parent
    # -I: whatever PYTHONPATH names would be found first, and may be nothing that this user can read.
    python = [os.path.realpath(sys.executable), "-I", str(see), str(tmp_path), str(os.getpid()), process_name(os.getpid())]
    found = subprocess.run(["unshare", "-m", "sh", "-c", f'{APART} "$@"', "sh", *python], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["None", "True", "False"]
