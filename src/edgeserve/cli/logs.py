"""`edgeserve log`: the logs that the research prototype wrote."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click

from edgeserve.cli.messages import plain
from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output
from edgeserve.cli.picklelog import PickleLogError, read_records

_STDOUT = "-"


@click.group("log")
def log() -> None:
    """Convert logs of the prototype."""


@contextlib.contextmanager
def _destination(out: str) -> Iterator[BinaryIO]:
    if out == _STDOUT:
        yield sys.stdout.buffer
        return
    try:
        # A file that is there is never written over: it could be the log itself.
        file = Path(out).open("xb")
    except FileExistsError as exc:
        raise CommandError(f"{plain(out)} is there already", "--out", "name another file, or delete this one") from exc
    with file:
        yield file


def _convert(path: str, to: BinaryIO) -> int:
    count = 0
    with Path(path).open("rb") as file:
        try:
            for record in read_records(file):
                # Escaped, because a log's text may hold what UTF-8 cannot say.
                to.write(json.dumps(record, allow_nan=False).encode("ascii") + b"\n")
                count += 1
        except PickleLogError as exc:
            to.flush()
            where = f"{path}, byte {exc.offset}, after {count} converted record{'' if count == 1 else 's'}"
            raise CommandError(plain(f"{type(exc).__name__}: {exc}"), plain(where), exc.to_do) from exc
    return count


@command("convert", "edgeserve log convert")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, dir_okay=False))
@click.option("--out", "to", default=_STDOUT, metavar="FILE", help="Write to this new file. Default: -, standard output.")
def convert(out: Output, files: tuple[str, ...], to: str) -> None:
    """Write the records of the prototype's pickle logs as JSON, one per line. Nothing in a log is executed."""
    with _destination(to) as destination:
        counts = {path: _convert(path, destination) for path in files}
    if to == _STDOUT:
        return
    total = sum(counts.values())
    if out.as_json:
        out.document({"out": to, "records": total, "files": counts})
    else:
        out.line(f"converted {total} record{'' if total == 1 else 's'} to {plain(to)}")


log.add_command(convert)

__all__ = ("log",)
