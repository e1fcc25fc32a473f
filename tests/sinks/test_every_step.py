"""Sinks cut off at each of their system calls, by a kill or by a full disk: every row is there once."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.sinks.dying import CALLS, MANY, ROWS
from tests.sinks.reading import hidden, made, rows, written

from edgeserve.core.errors import DiskFull

DYING = Path(__file__).with_name("dying.py")


@pytest.mark.parametrize(("kind", "taken"), [("json", False), ("parquet", False), ("parquet", True)])
def test_a_kill_at_any_step_loses_nothing_and_doubles_nothing(kind: str, taken: bool, tmp_path: Path) -> None:
    command = [sys.executable, str(DYING), kind, str(tmp_path), "taken" if taken else "left"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = list(tmp_path.iterdir())
    assert len(folders) > 2 * (4 + 2 * len(ROWS))  # it did die, at each of them
    for folder in folders:
        found = written(kind, folder)
        if taken:
            found = rows(folder / "taken") + found
        assert found == ROWS, folder.name
        assert hidden(folder) == ["out.jsonl.ids" if kind == "json" else ".ids"], folder.name


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_twenty_kills_in_the_midst_of_writing_lose_nothing_and_double_nothing(kind: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, str(DYING), kind, str(tmp_path), str(seed)], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert written(kind, tmp_path) == MANY
    assert hidden(tmp_path) == ["out.jsonl.ids" if kind == "json" else ".ids"]


class FullOnce:
    """The system call of this number finds the disk full; what it was to write it writes half of."""

    def __init__(self, step: int, patch: pytest.MonkeyPatch) -> None:
        self.left = itertools.count(step - 1, -1)
        self.met = False
        for name in CALLS:
            patch.setattr(os, name, self._call(getattr(os, name), name in ("write", "pwrite")))

    def _call(self, real: Any, writes: bool) -> Any:
        def call(*args: Any, **rest: Any) -> Any:
            if next(self.left) == 0:
                self.met = True
                if writes:
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **rest)

        return call


def again(what: Any) -> None:
    """Does it, and once more if the disk was full."""
    try:
        what()
    except DiskFull:
        what()


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_full_disk_at_any_step_loses_nothing_and_doubles_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        options: dict[str, Any] = {} if kind == "json" else {"rows_per_file": 2}
        sink = made(kind, folder, fsync=True, **options)
        with monkeypatch.context() as patch:
            full = FullOnce(step, patch)
            again(sink.setup)
            for row in ROWS:
                id_ = row["n"].to_bytes(16, "big")  # type: ignore[attr-defined]
                again(partial(sink.write, row, id_=id_))
            try:
                sink.close()
            except DiskFull:
                sink.setup()
                sink.close()
        assert written(kind, folder) == ROWS, step
        if not full.met:
            break
    assert step > 4 + 2 * len(ROWS)
