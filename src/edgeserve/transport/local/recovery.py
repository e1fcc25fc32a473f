"""A store that was not closed well is rebuilt from what is intact in it, in a child process.

LMDB keeps no checksums of its pages, and a damaged page can bring down the process that follows it. So the copying is done by a child
(`rebuild.py`); if it dies or misses something, another one searches the file page by page without LMDB. Every value is checked against
its key on the way, what belongs together is compared, and what is missing is named.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

import msgspec
import xxhash

from edgeserve.core.errors import DiskFull, StoreDamagedWarning, StoreVersion, TransportError
from edgeserve.core.process import boot
from edgeserve.transport.local.lmdbkv import DATA, MARK, read_mark
from edgeserve.transport.records import DISK_FORMAT

_log = logging.getLogger(__name__)
_SEAL = "seal.json"
_OPENED = "opened.json"
_IDENTITY = "identity.json"
_REBUILT = "data.rebuilt"
_OLD = "data.old"
_DAMAGED = "damaged"
_MIN_TIMEOUT_S = 20.0
NO_SPACE, OTHER_VERSION = 3, 4


class Report(msgspec.Struct):
    """What a child says of its step: how many values could not be read, the newest commit that the file knows, what is missing, and what
    lets one doubt that nothing else is."""

    damaged: int = 0
    commit: int = 0
    missing: list[str] = []
    doubts: list[str] = []


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
    return hasher.hexdigest()


def _write(path: Path, content: dict[str, object]) -> None:
    """A small file, whole or not at all, with a checksum of its content."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps({**content, "check": xxhash.xxh3_64_hexdigest(json.dumps(content).encode())}))
    temporary.replace(path)


def _read(path: Path) -> dict[str, object] | None:
    """What `_write` wrote, or None when it is not there or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError):
        return None
    if not isinstance(content, dict) or content.pop("check", None) != xxhash.xxh3_64_hexdigest(json.dumps(content).encode()):
        return None
    return content


def _content(file: Path) -> dict[str, object]:
    return {"format": DISK_FORMAT, "bytes": file.stat().st_size, "xxh3_128": _digest(file)} if file.exists() else {}


def seal(root: Path) -> None:
    """Notes the content of a store that nobody has open any more."""
    _write(root / _SEAL, _content(root / DATA / "data.mdb"))


def note_opened(root: Path, *, durable: bool) -> None:
    """While the store is open: its format, since when the machine runs, and whether everybody syncs to the disk."""
    known = _read(root / _OPENED) or {}
    content: dict[str, object] = {"format": DISK_FORMAT, "machine": boot(), "durable": durable and known.get("durable", True)}
    if content != known:
        _write(root / _OPENED, content)
        for path in (root / _OPENED, root):
            _sync(path)


def identity(root: Path) -> str:
    """What tells this store from any other that was or will be in its place; made where there is none that can be read.

    A file of its own, beside the data: the disk format stays as it is, and a repair, which replaces the data, leaves it alone.
    """
    known = _read(root / _IDENTITY)
    if known is not None and isinstance(found := known.get("id"), str) and found:
        return found
    made = uuid.uuid4().hex
    _write(root / _IDENTITY, {"id": made})
    for path in (root / _IDENTITY, root):
        _sync(path)
    return made


def wrong_version(root: Path, version: object) -> StoreVersion:
    """The store is of another format; nothing of it is touched."""
    return StoreVersion(
        f"the store in {root} has disk format {version}, this edgeserve reads format {DISK_FORMAT}: install the edgeserve that wrote it, "
        "or name another directory in the URL"
    )


def make_ready(root: Path) -> None:
    """Before the first process opens a store: checks the seal and takes it off, or rebuilds.

    Raises:
        StoreVersion: the store was written in another disk format.
        DiskFull: there is no room for rebuilding it.
    """
    if (root / _REBUILT).exists() and not (root / DATA).exists():
        (root / _REBUILT).rename(root / DATA)  # a rebuild was over but for this step
    for leftover in (_REBUILT, _OLD, "wake"):
        shutil.rmtree(root / leftover, ignore_errors=True)
    file, sealed, opened = root / DATA / "data.mdb", root / _SEAL, root / _OPENED
    known, mark = _read(opened), read_mark(root / MARK)
    if known is not None and known.get("format") != DISK_FORMAT:
        raise wrong_version(root, known.get("format"))
    if sealed.exists() or mark != 0 or (file.exists() and file.stat().st_size > 0):
        promised = _read(sealed)
        if promised is None or promised != _content(file):
            _rebuild(root, mark, changed=sealed.exists(), restarted=known is not None and not _kept(known))
        (root / DATA / "lock.mdb").unlink(missing_ok=True)
    for note in (sealed, opened):
        note.unlink(missing_ok=True)


def _kept(opened: dict[str, object]) -> bool:
    """Whether the machine has run on since the store was opened, or whether that does not matter."""
    return bool(opened.get("durable")) or opened.get("machine") == boot()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rebuild(root: Path, mark: int | None, *, changed: bool, restarted: bool) -> None:
    started = time.monotonic()
    report = _child(root, "copy")
    doubts = report.doubts if report else ["the file's structure"]
    if mark is None:
        doubts.append("the mark of the newest commit")
    elif report and mark > report.commit:
        doubts.append(f"the newest {mark - report.commit} commits")
    if not report:
        shutil.rmtree(root / _REBUILT, ignore_errors=True)
    if doubts or not report or report.damaged or report.missing:
        found = _child(root, "search") or Report(missing=["everything"])
        report = Report(report.damaged if report else 0, missing=found.missing)
    if restarted:
        doubts.append("perhaps the newest commits (the machine was restarted while the store was open; durability=disk prevents that)")
    missing = doubts + report.missing
    bad = bool(missing or report.damaged or changed)
    kept = root / (f"{_DAMAGED}-{time.time_ns()}" if bad else _OLD)
    for folder in (_REBUILT, DATA):
        (root / folder).mkdir(mode=0o700, exist_ok=True)
    (root / MARK).unlink(missing_ok=True)
    (root / DATA).rename(kept)
    (root / _REBUILT).rename(root / DATA)
    if not bad:
        shutil.rmtree(kept)
        _log.info("the store in %s was not closed; checked and rebuilt in %.1f s", root, time.monotonic() - started)
        return
    what = "; ".join(missing) or "nothing that is still needed"
    warnings.warn(
        f"the store in {root} was damaged: {report.damaged} values could not be read, missing: {what}. "
        f"What was intact was saved; the old files are in {kept}",
        StoreDamagedWarning,
        stacklevel=5,
    )


def _command(root: Path, step: str) -> list[str]:
    """The child imports only what it needs: the packages' own modules would bring numpy and half of edgeserve."""
    package = Path(__file__).parents[2]
    folders = {
        "edgeserve": package,
        "edgeserve.core": package / "core",
        "edgeserve.transport": package / "transport",
        "edgeserve.transport.local": package / "transport" / "local",
    }
    boot = (
        "import sys, types\n"
        f"for name, path in { ({n: str(p) for n, p in folders.items()})!r}.items():\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [path]\n"
        "from edgeserve.transport.local.rebuild import main\n"
        "main(sys.argv[1:])\n"
    )
    return [sys.executable, "-S", "-c", boot, str(root / DATA), str(root / _REBUILT), step]


def _child(root: Path, step: str) -> Report | None:
    """Runs the child; None when it died or hung."""
    file = root / DATA / "data.mdb"
    size = file.stat().st_size if file.exists() else 0
    try:
        done = subprocess.run(
            _command(root, step),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_MIN_TIMEOUT_S + size / 2e7,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=False,
        )
    except subprocess.TimeoutExpired:
        _log.warning("the child that reads %s did not end", root)
        return None
    if done.returncode == NO_SPACE:
        shutil.rmtree(root / _REBUILT, ignore_errors=True)
        raise DiskFull(f"no space left on the filesystem of {root} to look through the store there: free some and start again")
    if done.returncode == OTHER_VERSION:
        shutil.rmtree(root / _REBUILT, ignore_errors=True)
        raise wrong_version(root, done.stdout.decode())
    if done.returncode == 0:
        return msgspec.json.decode(done.stdout, type=Report)
    error = done.stderr.decode(errors="replace")[-300:]
    if step == "search":
        raise TransportError(f"the store in {root} could not be looked through, nothing of it was changed: {error}")
    _log.warning("the child that reads %s ended with %d: %s", root, done.returncode, error)
    return None


__all__ = ("NO_SPACE", "OTHER_VERSION", "Report", "identity", "make_ready", "note_opened", "seal", "wrong_version")
