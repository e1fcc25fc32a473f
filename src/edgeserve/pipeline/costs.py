"""What a pipeline costs to run, as it was measured: the file that `edgeserve profile` writes and `edgeserve plan` reads."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct, field

from edgeserve.pipeline.errors import InvalidDocument, Where

FORMAT_VERSION = 1
"""The version of the format that this installation writes, and the newest that it reads."""


class SourceCost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a source sends: messages per second, the mean of their payload, and how many were measured."""

    rate_hz: float
    bytes: float
    messages: int


class TaskCost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a task takes: cpu-seconds per run (the mean and the quantiles 0.5, 0.9 and 0.99), memory, and its results."""

    cpu_s: float
    cpu_s_quantiles: dict[str, float]
    memory_bytes: float
    output_bytes: float
    outputs_per_run: float
    runs: int


class LinkCost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies between two hosts."""

    ends: tuple[str, str]
    bandwidth_bytes_s: float
    latency_ms: float


class Costs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pipeline's costs, by the names of its sources and tasks; `host` is where they were measured."""

    pipeline: str
    sources: dict[str, SourceCost]
    tasks: dict[str, TaskCost]
    links: list[LinkCost] = field(default_factory=list)
    host: str = ""
    version: int = FORMAT_VERSION


def read_costs(path: Path) -> Costs:
    """The costs in a file.

    Raises:
        InvalidDocument: they are no costs, or of a version that this installation does not read.
    """
    where = Where(str(path), 0)
    try:
        costs = msgspec.json.decode(path.read_bytes(), type=Costs)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise InvalidDocument(f"these are no costs: {exc}", where, "measure them: edgeserve profile") from exc
    if not 1 <= costs.version <= FORMAT_VERSION:
        reason = f"version {costs.version}, and this installation reads 1 to {FORMAT_VERSION}"
        raise InvalidDocument(reason, where, "upgrade edgeserve, or measure the costs anew: edgeserve profile")
    return costs


def write_costs(path: Path, costs: Costs) -> None:
    """Writes costs to a file, which `read_costs` reads."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")


__all__ = ("FORMAT_VERSION", "Costs", "LinkCost", "SourceCost", "TaskCost", "read_costs", "write_costs")
