"""The command as users start it: a process of its own, without a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).with_name("edgeserve"))
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def edgeserve(tmp_path: Path) -> Command:
    """`edgeserve("topic", "list")` runs the command in the test's directory."""

    def run(*arguments: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=110,
            cwd=tmp_path,
            env=os.environ | (env or {}),
            check=False,
        )

    return run


@pytest.fixture
def node(tmp_path: Path) -> str:
    """A store of the test's own."""
    return f"local://{tmp_path}/store"


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`edgeserve run` under way."""
    with subprocess.Popen([COMMAND, "run", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process: subprocess.Popen[str], text: str, stream: str = "stdout") -> str:
    """The next line with this text on a stream of the process."""
    for line in getattr(process, stream):
        if text in line:
            return str(line)
    raise AssertionError(f"ended without {text!r}: {process.communicate()}")
