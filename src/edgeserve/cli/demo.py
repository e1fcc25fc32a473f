"""`edgeserve demo`: runs the example that ships with the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from edgeserve.cli.options import command
from edgeserve.cli.output import CommandError, Output

_NAME = "network_security"


def example_directory(name: str) -> Path:
    """Where an example lives: beside `src` in a checkout, or inside the installed package."""
    package = Path(__file__).resolve().parent.parent
    for place in (package.parent.parent / "examples" / name, package / "_examples" / name):
        if (place / "demo.py").is_file():
            return place
    raise CommandError(f"the example {name!r} is not installed", str(package), "install the wheel, or run it from a checkout: make demo")


@command("demo", context={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(out: Output, arguments: tuple[str, ...]) -> None:
    """Combine the packet captures of two taps on this machine, and judge the joint decision.

    ARGUMENTS go to the example's own program, which tells them: `edgeserve demo -- --help`.
    """
    program = example_directory(_NAME) / "demo.py"
    given = [*(["--json"] if out.as_json else []), *arguments]
    sys.stdout.flush()
    # The demo takes this process's place: the terminal's signals and the exit status are its own.
    os.execv(sys.executable, [sys.executable, str(program), *given])


__all__ = ("demo", "example_directory")
