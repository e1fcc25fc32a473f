"""How the commands speak: tables for people, aligned text for pipes, JSON for programs; errors in three lines."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeserve.core import errors

_TO_DO: tuple[tuple[type[BaseException], str], ...] = (
    (errors.UnknownScheme, "name an engine that is installed, for example --node local://"),
    (errors.ConfigurationError, "correct it and run the command again; --help lists what is accepted"),
    (errors.StoreVersion, "use the edgeserve version that wrote the store, or name another directory: --node local:///other/dir"),
    (errors.StoreDamaged, "move the directory away and start with a new one"),
    (errors.StoreFull, "give the store more room (size_mb= in the node URL) or let its consumers catch up"),
    (errors.DiskFull, "free some space on that filesystem; nothing acknowledged was lost"),
    (errors.GroupBusy, "end the member that holds the group, or use another group"),
    (errors.GroupConflict, "see who is in the group with: edgeserve groups --node URL"),
    (errors.MissingExtra, "install what the message names"),
    (
        errors.TransportError,
        "check the node with: edgeserve doctor --node URL, and the names with: edgeserve topic list or edgeserve groups",
    ),
    (PermissionError, "run it as the user who owns the path, or name another one"),
    (FileNotFoundError, "check the path"),
)


class CommandError(Exception):
    """A command could not do its work. Shown as three lines: what, where, what to do.

    `traceback` is another process's, shown with --verbose in place of this one's.
    """

    exit_code = 1

    def __init__(self, what: str, where: str, to_do: str, *, exit_code: int = 1, traceback: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.to_do, self.exit_code, self.traceback = what, where, to_do, exit_code, traceback


class Output:
    """Where a command writes to. `as_json` gives one JSON document (or one per line where a command streams)."""

    def __init__(self, *, as_json: bool = False, verbose: bool = False) -> None:
        self.as_json, self.verbose = as_json, verbose
        self.console = Console(highlight=False, soft_wrap=True)
        self.rich = not as_json and self.console.is_terminal

    def document(self, value: Any) -> None:
        """Writes one JSON document."""
        click.echo(json.dumps(value, indent=None if not sys.stdout.isatty() else 2, default=str))

    def json_line(self, value: Any) -> None:
        """Writes one JSON document on a line of its own."""
        click.echo(json.dumps(value, default=str))

    def line(self, text: str, style: str = "") -> None:
        """Writes a line; the style shows on a terminal only."""
        if self.rich:
            self.console.print(Text(text, style=style))
        else:
            click.echo(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Writes rows under their headings, each on one line, whatever its names hold. Numbers stand right."""
        texts = [["-" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
        right = [bool(rows) and all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(columns))]
        if self.rich:
            table = Table(box=None, header_style="bold", pad_edge=False)
            for heading, numeric in zip(columns, right, strict=True):
                table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
            for row in texts:
                table.add_row(*(Text(cell) for cell in row))
            self.console.print(table)
            return
        widths = [max(len(row[i]) for row in [list(columns), *texts]) for i in range(len(columns))]
        for row in [list(columns), *texts]:
            cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
            click.echo("  ".join(cells).rstrip())


def one_line(text: str) -> str:
    """A name as it may be shown: what would end the line, or command the terminal, is written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def explain(error: BaseException, where: str) -> CommandError:
    """Turns an error into the three lines that a person can act on."""
    if isinstance(error, CommandError):
        return error
    what = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, errors.EdgeServeError):
        what = f"{type(error).__name__}: {what}"
    to_do = next((hint for kind, hint in _TO_DO if isinstance(error, kind)), "run it again with --verbose to see the traceback")
    return CommandError(what, where, to_do)


def show_error(error: CommandError, *, as_json: bool) -> None:
    """Writes the three lines to standard error; as one JSON document where the command speaks JSON."""
    if as_json:
        click.echo(json.dumps({"error": {"what": error.what, "where": error.where, "to_do": error.to_do}}), err=True)
        return
    label = click.style("error:", fg="red", bold=True)
    click.echo(f"{label} {error.what}\nwhere: {error.where}\nto do: {error.to_do}", err=True)


def guarded(command: str, out: Output, where: str, body: Callable[[], None]) -> None:
    """Runs a command's body; whatever it raises ends as three lines (and a traceback with --verbose)."""
    try:
        body()
        sys.stdout.flush()
    except (click.exceptions.Exit, click.exceptions.Abort, SystemExit):
        raise
    except BrokenPipeError:
        _leave_quietly()
    except KeyboardInterrupt:
        raise click.exceptions.Exit(130) from None
    except click.ClickException as exc:
        _fail(CommandError(exc.format_message(), where, f"see: edgeserve {command} --help", exit_code=exc.exit_code), exc, out)
    except Exception as exc:
        _fail(explain(exc, where), exc, out)


def _fail(error: CommandError, cause: BaseException, out: Output) -> NoReturn:
    if out.verbose:
        click.echo(error.traceback or "".join(traceback.format_exception(cause)), err=True, nl=False)
    show_error(error, as_json=out.as_json)
    raise click.exceptions.Exit(error.exit_code)


def _leave_quietly() -> NoReturn:
    """The reader of a pipe (`| head`) has gone; the interpreter must not complain about it on its way out."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise click.exceptions.Exit(0)


__all__ = ("CommandError", "Output", "explain", "guarded", "one_line", "show_error")
