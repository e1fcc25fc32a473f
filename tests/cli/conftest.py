"""The command as users start it: a process of its own, without a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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
