"""A store that was not closed well is rebuilt from what is intact in it, in a child process.

LMDB keeps no checksums of its pages, and a damaged page can bring down the process that follows it. So the copying is done by a child
(`rebuild.py`); if it dies, another goes on from the other end. Every value is checked against its key on the way, and what is missing is named.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import msgspec
import xxhash

from edgeserve.core.errors import StoreDamaged, StoreDamagedWarning
from edgeserve.transport.local.lmdbkv import DATA, MARK

_log = logging.getLogger(__name__)
_SEAL = "seal.json"
_REBUILT = "data.rebuilt"
_DAMAGED = "damaged"
_MIN_TIMEOUT_S = 20.0


class Report(msgspec.Struct):
    """What a child says of its step."""

    damaged: int
    newest_commit: int
    missing: list[str]


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


def seal(root: Path) -> None:
    """Notes the content of a store that nobody has open any more."""
    file = root / DATA / "data.mdb"
    temporary = root / (_SEAL + ".new")
    temporary.write_text(json.dumps({"format": 1, "bytes": file.stat().st_size, "xxh3_128": _digest(file)}))
    temporary.replace(root / _SEAL)


def make_ready(root: Path) -> None:
    """Before the first process opens a store: checks the seal and takes it off, or rebuilds.

    Raises:
        StoreDamaged: nothing at all could be saved, and the file is not empty.
    """
    shutil.rmtree(root / _REBUILT, ignore_errors=True)
    file, sealed = root / DATA / "data.mdb", root / _SEAL
    if file.exists():
        known: object = None
        if sealed.exists():
            known = _read_seal(sealed)
            if known == {"format": 1, "bytes": file.stat().st_size, "xxh3_128": _digest(file)}:
                sealed.unlink()
                return
        _rebuild(root, changed=sealed.exists())
    sealed.unlink(missing_ok=True)


def _read_seal(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _rebuild(root: Path, *, changed: bool) -> None:
    size = (root / DATA / "data.mdb").stat().st_size
    started = time.monotonic()
    reports = [_copy(root, "forward", size)]
    if reports[0] is None:
        reports.append(_copy(root, "backward", size))
    last = _copy(root, "report", size)
    missing = list(last.missing) if last else ["everything"]
    if None in reports:
        missing.append("the store's structure")
    mark = root / MARK
    newest = max((r.newest_commit for r in reports if r), default=0)
    if mark.exists() and len(mark.read_bytes()) == 8 and (behind := int.from_bytes(mark.read_bytes(), "little") - newest) > 0 and newest:
        missing.append(f"the newest {behind} commits")
    damaged = sum(r.damaged for r in reports if r)
    bad = bool(missing or damaged or changed)
    if last is None and size > 0:
        raise StoreDamaged(f"the store in {root} is damaged and nothing could be saved: move the directory away to begin anew")
    kept = f"{root}/{_DAMAGED}-{time.time_ns()}"
    if bad:
        (root / DATA).rename(kept)
    else:
        shutil.rmtree(root / DATA)
    (root / _REBUILT).rename(root / DATA)
    mark.unlink(missing_ok=True)
    if bad:
        what = "; ".join(missing) or "nothing that is still needed"
        text = f"the store in {root} was damaged: {damaged} values could not be read, missing: {what}. What was intact was saved; the old files are in {kept}"
        warnings.warn(text, StoreDamagedWarning, stacklevel=4)
    else:
        _log.info("the store in %s was not closed; checked and rebuilt in %.1f s", root, time.monotonic() - started)


def _copy(root: Path, direction: str, size: int) -> Report | None:
    """Runs the child; None when it died or hung."""
    command = [sys.executable, "-m", "edgeserve.transport.local.rebuild", str(root / DATA), str(root / _REBUILT), direction]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MIN_TIMEOUT_S + size / 2e7,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=False,
        )
        if done.returncode == 0:
            return msgspec.json.decode(done.stdout, type=Report)
        _log.warning("the child that reads %s ended with %d: %s", root, done.returncode, done.stderr.decode(errors="replace")[-300:])
    except subprocess.TimeoutExpired:
        _log.warning("the child that reads %s did not end", root)
    return None


__all__ = ("Report", "make_ready", "seal")
