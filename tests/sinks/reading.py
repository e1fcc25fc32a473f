"""What is in the files of a sink, as other programs read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet

from edgeserve.sinks import JsonLinesSink, ParquetSink


def lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines, all of which are whole."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def rows(directory: Path) -> list[Any]:
    """The rows of the Parquet files in a directory, file by file."""
    return [row for path in sorted(directory.glob("*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()]


def made(kind: str, folder: Path, **options: Any) -> JsonLinesSink | ParquetSink:
    """A sink of either kind, in a folder."""
    return JsonLinesSink(folder / "out.jsonl", **options) if kind == "json" else ParquetSink(folder / "out", **options)


def written(kind: str, folder: Path) -> list[Any]:
    """What it has written."""
    return lines(folder / "out.jsonl") if kind == "json" else rows(folder / "out")


def hidden(folder: Path) -> list[str]:
    """The names of the files that are no data."""
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".ids")
