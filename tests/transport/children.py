"""Other processes for the tests: a piece of Python, what it prints, and its end."""

from __future__ import annotations

import select
import subprocess
import sys
import textwrap
from typing import Self

_PRELUDE = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("error")
from edgeserve.transport import *
url = sys.argv[1]
def say(*words): print(*words, flush=True)
"""
WAIT_S = 30


class Child:
    """A process that runs `code` with `url` and the arguments `sys.argv[2:]`."""

    def __init__(self, code: str, url: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + textwrap.dedent(code), url, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout is not None and self.process.stderr is not None
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT_S)
        text = self.process.stdout.readline() if ready else ""
        if not text:
            self.process.kill()
            raise AssertionError(f"the child said nothing and ended with {self.process.wait()}: {self.process.stderr.read()}")
        return text.strip()

    def tell(self, text: str = "") -> None:
        """Sends it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def end(self) -> list[str]:
        """Waits for its good end; the lines that it said before."""
        out, errors = self.process.communicate(timeout=WAIT_S)
        assert self.process.returncode == 0, f"ended with {self.process.returncode}: {errors}"
        return out.splitlines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
