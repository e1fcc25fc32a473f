"""A program: writes rows in a process that dies at its n-th system call, then all of them again in one that does not. For every n.

Arguments: the kind of sink, a folder that gets one folder per n, and 'taken' if readers take the files away between the two, else 'left';
or a seed: then it writes many rows, and is killed often, from outside and anywhere.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from edgeserve.sinks import JsonLinesSink, ParquetSink
from edgeserve.sinks.columns import pyarrow

CALLS = ("open", "write", "pwrite", "ftruncate", "truncate", "posix_fallocate", "replace", "unlink", "fsync", "fdatasync")
ROWS = [{"n": n, "text": "x" * 40 * n} for n in range(5)]
MANY = [{"n": n, "text": "x" * (n % 7 * 300)} for n in range(2_000)]
KILLS = 20
AGAIN = 10


def die_at(step: int, half: bool) -> None:
    """At the call of this number the process is killed; before it, or when half of what it writes is written."""
    left = itertools.count(step - 1, -1)

    def dying(real: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            if next(left) == 0:
                if half and writes:
                    real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **rest)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name), name in ("write", "pwrite")))


def write_all(kind: str, folder: Path) -> None:
    sink = JsonLinesSink(folder / "out.jsonl", fsync=True) if kind == "json" else ParquetSink(folder / "out", rows_per_file=2, fsync=True)
    with sink:
        for row in ROWS:
            sink.write(row, id_=row["n"].to_bytes(16, "big"))


def forked(what: Callable[[], None]) -> int:
    """How a child that does it ends."""
    pid = os.fork()
    if pid == 0:
        try:
            what()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def life_and_death(kind: str, folder: Path, step: int, half: bool, taken: bool) -> bool:
    """Whether it died."""
    folder.mkdir()

    def dies() -> None:
        die_at(step, half)
        write_all(kind, folder)

    status = forked(dies)
    if taken:
        (folder / "taken").mkdir()
        for path in folder.glob("out/*.parquet"):
            path.rename(folder / "taken" / path.name)
    if status not in (0, -signal.SIGKILL) or forked(lambda: write_all(kind, folder)):
        sys.exit(f"{folder.name}: went wrong ({status})")
    return status != 0


def kill_often(kind: str, folder: Path, seed: int) -> None:
    """Kills a process that writes rows, wherever it is, `KILLS` times. The newest that were written come again, and no others."""
    chance = random.Random(seed)
    start = 0
    for _ in range(KILLS):
        told, tells = os.pipe()
        pid = os.fork()
        if pid == 0:
            write_many(kind, folder, start, partial(os.write, tells, b"."))
            os._exit(0)
        os.close(tells)
        count = 0
        for _ in range(chance.randrange(2 * len(MANY) // KILLS)):
            count += len(os.read(told, 1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(told, 65_536):
            count += len(more)
        os.close(told)
        start = max(0, start + count - AGAIN)
    if status := forked(lambda: write_many(kind, folder, start, lambda: None)):
        sys.exit(f"the last one went wrong ({status})")


def write_many(kind: str, folder: Path, start: int, tell: Callable[[], object]) -> None:
    sink = JsonLinesSink(folder / "out.jsonl") if kind == "json" else ParquetSink(folder / "out", rows_per_file=37)
    with sink:
        for row in MANY[start:]:
            sink.write(row, id_=row["n"].to_bytes(16, "big"))
            tell()


def main(kind: str, root: Path, how: str) -> None:
    if kind == "parquet":
        pyarrow()  # once, and not in every child
    if how.isdecimal():
        kill_often(kind, root, int(how))
        return
    taken = how == "taken"
    for half in (False, True):
        for step in itertools.count(1):
            if not life_and_death(kind, root / f"{step}{'half' * half}", step, half, taken):
                break


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
