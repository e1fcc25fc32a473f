"""One node of an app, in a process of its own: `python -m edgeserve.cli.child app.py NAME`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from edgeserve.cli.apps import App
from edgeserve.cli.output import explain, show_error
from edgeserve.cli.wiring import Found
from edgeserve.core.errors import EdgeServeError
from edgeserve.data_source import DataSource
from edgeserve.pipeline import InvalidPipeline
from edgeserve.pipeline.build import doubles
from edgeserve.stage.node import ends_after

_PACKAGE = Path(__file__).resolve().parent.parent


def run_node(node: Any, *, until_end: bool, progress: int | None = None) -> None:
    """Runs a node until it is told to stop, or until its sources have ended. A byte goes to `progress` when it is there ("0" if it is never
    to be started again), and another when it is closed and all that it has sent is stored."""
    with node:
        _say(progress, b"0" if doubles(node) else b"1")
        if until_end and not isinstance(node, DataSource):
            node.run(until="end")
        else:
            node.run()
    _say(progress, b"1")


def _say(progress: int | None, word: bytes) -> None:
    if progress is not None:
        with contextlib.suppress(BrokenPipeError):  # the supervisor has gone
            os.write(progress, word)


class _Parent:
    """What the supervisor says. Its pipe closes when it ends, however it ends: then this process stops as if it had been asked to.

    Attributes:
        upstream_over: set when a byte has come: the nodes that feed this one have ended.
        wake: called then.
    """

    def __init__(self, pipe: int) -> None:
        self.upstream_over = threading.Event()
        self.wake: Callable[[], object] = bool
        self._pipe = pipe
        threading.Thread(target=self._listen, name="edgeserve-parent", daemon=True).start()

    def _listen(self) -> None:
        while os.read(self._pipe, 1):
            self.upstream_over.set()
            with contextlib.suppress(Exception):  # it is closed by now; and else it looks now and then anyway
                self.wake()
        # Who read these pipes has gone, too; a task that prints must not fail for it while it finishes the message in hand.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _own(exc: Exception, app: Path) -> list[tuple[str, int | None]]:
    """Where in the app's own files an error came by."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(exc.__traceback__)]
    found = [at for at in frames if Path(at[0]).is_relative_to(app.parent)]
    return [at for at in found if "site-packages" not in at[0] and not Path(at[0]).is_relative_to(_PACKAGE)]


def _failure(exc: Exception, app: Path) -> dict[str, str]:
    """Why an app's file could not be run, where, what to do if that is known, and the traceback."""
    if isinstance(exc, InvalidPipeline):
        said = {"what": exc.reason, "where": str(exc.where), "to_do": exc.suggestion}
        return said | {"traceback": _traceback_without_this_package(exc.__cause__ or exc)}
    own = _own(exc, app)
    if isinstance(exc, SyntaxError) and exc.filename:
        own.append((exc.filename, exc.lineno))
    file, line = own[-1] if own else (str(app), None)
    return {
        "what": explain(exc, "").what,
        "where": f"{file}:{line}" if line else file,
        "traceback": _traceback_without_this_package(exc),
    }


def _traceback_without_this_package(exc: BaseException) -> str:
    """The user's own frames: how this module got there helps nobody."""
    tb = exc.__traceback__
    while (
        tb is not None
        and tb.tb_next is not None
        and (Path(tb.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE) or "importlib" in tb.tb_frame.f_code.co_filename)
    ):
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(exc), exc, tb))


def _declared(given: argparse.Namespace, app: Path, host: str | None = None) -> App:
    return App(
        app,
        given.node,
        host,
        recorded=given.recorded,
        out=given.out,
        live=given.live,
        measure=given.measure,
        messages=given.messages,
        assignment=given.assignment,
    )


def _list(given: argparse.Namespace, app: Path) -> int:
    """Writes as JSON to a file descriptor what the app declares, or why it cannot be told."""
    try:
        declared = _declared(given, app, given.host)
        found = Found(declared.listed(), declared.drawn())
    except Exception as exc:
        found = Found(error=_failure(exc, app))
    with os.fdopen(given.list_to, "wb") as pipe:
        pipe.write(msgspec.json.encode(found))
    return 1 if found.error else 0


def _files(text: str) -> dict[str, Path]:
    return {name: Path(path) for name, path in msgspec.json.decode(text, type=dict[str, str]).items()}


def _names(text: str) -> list[str]:
    return msgspec.json.decode(text, type=list[str])


def main() -> int:
    """Lists an app's nodes, or runs one of them."""
    parser = argparse.ArgumentParser(prog="python -m edgeserve.cli.child")
    parser.add_argument("app", type=Path)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--node", metavar="URL")
    parser.add_argument("--host", metavar="NAME")
    parser.add_argument("--assignment", type=Path, metavar="FILE")
    parser.add_argument("--recorded", type=_files, metavar="JSON")
    parser.add_argument("--out", type=_files, metavar="JSON")
    parser.add_argument("--live", type=_names, metavar="JSON", default=())
    parser.add_argument("--measure", type=Path, metavar="DIR", help="where its task leaves what a run takes")
    parser.add_argument("--messages", type=int, metavar="N")
    parser.add_argument("--counts", type=Path, metavar="DIR", help="where it writes what it has counted, to a file of its name")
    parser.add_argument("--list-to", type=int, metavar="FD")
    parser.add_argument("--parent", type=int, metavar="FD")
    parser.add_argument("--progress", type=int, metavar="FD")
    parser.add_argument("--fed", action="store_true", help="the parent says when the nodes that feed this one have ended")
    parser.add_argument("--until-end", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    # Until the node's own handlers are there, and again after them, a signal ends the process at once.
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    parent = None if given.parent is None else _Parent(given.parent)
    app = given.app.resolve()
    if given.list_to is not None:
        return _list(given, app)
    try:
        node = _declared(given, app).make(given.name)
        if parent is not None and given.fed:
            parent.wake = ends_after(node, parent.upstream_over)
        run_node(node, until_end=given.until_end, progress=given.progress)
        if given.counts is not None:
            (given.counts / given.name).write_bytes(msgspec.json.encode(dict(node.counters)))
    except KeyboardInterrupt:
        return 0  # what an engine's client makes of a signal that came before the node had its own handlers
    except Exception as exc:
        if isinstance(exc, EdgeServeError) and not _own(exc, app) and not given.verbose:
            show_error(explain(exc, f"{given.name} of {given.app}"), as_json=False)
        else:
            sys.stderr.write(_traceback_without_this_package(exc))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

__all__ = ("main", "run_node")
