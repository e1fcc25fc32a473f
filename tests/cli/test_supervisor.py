"""What becomes of a process that fails: how often it is started again, and what that leaves behind."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from edgeserve.cli import supervisor
from edgeserve.cli.supervisor import Outcome, Supervisor

# Its words are what it says about its progress at each start; it fails unless it says that it has done all.
PROCESS = """
import os, sys

log, progress, *words = sys.argv[1:]
with open(log, "a") as file:
    file.write("x")
    start = file.tell() - 1
word = words[min(start, len(words) - 1)].strip("-")
if word:
    os.write(int(progress), word.encode())
sys.exit(0 if len(word) > 1 else 3)
"""


def pipes() -> int:
    """How many are open: what other threads of this process have open are sockets."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
    return count


class Run:
    """Runs one process, which says these words about its progress, one at each start."""

    def __init__(self, folder: Path, *words: str, restarts: int, forgets: bool = True) -> None:
        program, log = folder / "process.py", folder / "starts"
        program.write_text(PROCESS)
        self.open: list[int] = []
        commands = {"it": [sys.executable, str(program), str(log), "{progress}", *words]}

        def again(_name: str, _how: str) -> None:
            self.open.append(pipes())

        one = Supervisor(commands, lambda *line: None, lambda names: None, restarts=restarts, forgets=forgets, again=again)
        self.outcome: Outcome = one.run()
        self.starts = len(log.read_text())


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_RESTART_AFTER_S", 0.001)


def test_one_that_was_ready_and_fails_before_it_is_so_again_has_its_restarts_still(tmp_path: Path) -> None:
    run = Run(tmp_path, "1", "-", "-", "11", restarts=3)
    assert (run.starts, run.outcome.failures) == (4, [])


def test_one_that_never_was_ready_has_none(tmp_path: Path) -> None:
    run = Run(tmp_path, "-", restarts=3)
    assert (run.starts, [failure.why for failure in run.outcome.failures]) == (1, ["it failed before it was ready for the first time"])


def test_one_that_says_so_is_not_started_again(tmp_path: Path) -> None:
    run = Run(tmp_path, "0", restarts=3)
    assert (run.starts, len(run.outcome.failures)) == (1, 1)
    assert "may send once more" in run.outcome.failures[0].why


def test_restarts_are_not_forgotten_where_there_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_STEADY_S", 0.0)
    run = Run(tmp_path, "1", restarts=2, forgets=False)
    assert (run.starts, len(run.outcome.failures)) == (3, 1)
    (tmp_path / "starts").unlink()
    assert Run(tmp_path, "1", "1", "1", "1", "11", restarts=2).starts == 5


def test_one_that_was_started_again_leaves_nothing_open(tmp_path: Path) -> None:
    run = Run(tmp_path, *["1"] * 8, "11", restarts=8)
    assert run.starts == 9 and set(run.open) == {run.open[0]}
