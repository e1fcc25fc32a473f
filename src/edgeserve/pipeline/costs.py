"""What a pipeline's sources, tasks and links were measured to cost: the file that `edgeserve profile` writes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from edgeserve.core.errors import ConfigurationError
from edgeserve.pipeline.wholefile import write_whole

FORMAT_VERSION = 1
"""The version of the file's format that this installation writes, and the newest that it reads."""

QUANTILES = ("0.5", "0.9", "0.99")
_MOST_BYTES = 16_000_000
_Number: TypeAlias = Annotated[float, Meta(ge=0, le=1e18)]
_Positive: TypeAlias = Annotated[float, Meta(gt=0, le=1e18)]
_Count: TypeAlias = Annotated[int, Meta(ge=1)]
_Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1000)]
_Quantile: TypeAlias = Annotated[str, Meta(pattern=r"^(0(\.\d+)?|1(\.0+)?)$")]


class InvalidCosts(ConfigurationError):
    """A file of costs that cannot be used as it is: what is wrong, in which file and where in it, and what to do."""


class UnsupportedCostsVersion(InvalidCosts):
    """The file was written in a version of the format that this installation does not read."""


class SourceCost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a source sends.

    Args:
        rate_hz: messages per second of event time, of all its replicas together.
        bytes: mean size of a payload.
        messages: how many it was measured on.
        phase_ms: how much event time after the first message of any source its own first one came, if it keeps a pace.
    """

    rate_hz: _Positive
    bytes: _Number
    messages: _Count
    phase_ms: _Number | None = None


class TaskCost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a task takes of one process and makes.

    Args:
        cpu_s: mean cpu-seconds of a run, in all threads of its process.
        cpu_s_quantiles: quantile, as "0.99", to the cpu-seconds that this part of the runs stayed within.
        memory_bytes: the most memory that its process held.
        output_bytes: mean size of a result's payload.
        outputs_per_run: mean number of results of a run.
        runs: how many it was measured on.
    """

    cpu_s: _Number
    cpu_s_quantiles: dict[_Quantile, _Number]
    memory_bytes: _Number
    output_bytes: _Number
    outputs_per_run: _Number
    runs: _Count


class LinkCost(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies between two nodes: bytes per second of a long transfer, and half the least round trip."""

    ends: tuple[_Name, _Name]
    bandwidth_bytes_s: _Positive
    latency_ms: _Number


class Costs(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The costs of one pipeline, measured on one host.

    Args:
        pipeline: its name.
        sources: by the name that each is declared with.
        tasks: by the name that each is declared with.
        links: between nodes, where they were measured.
        host: on which the tasks ran.
        version: of the format.
    """

    pipeline: _Name
    sources: dict[_Name, SourceCost]
    tasks: dict[_Name, TaskCost]
    links: list[LinkCost] = field(default_factory=list)
    host: str = ""
    version: Annotated[int, Meta(ge=1)] = FORMAT_VERSION


class _Version(Struct):
    version: Annotated[int, Meta(ge=1)] = FORMAT_VERSION


def read_costs(path: str | os.PathLike[str]) -> Costs:
    """Reads what `write_costs` wrote.

    Raises:
        InvalidCosts: it is no file of costs, is cut off, or a value in it has the wrong type or cannot be: negative, or not finite.
        UnsupportedCostsVersion: a newer installation wrote it.
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise InvalidCosts(f"{path}: it has more than {_MOST_BYTES:,} bytes, and costs have a few thousand: is it the right file?")
    return _decode(data, path)


def write_costs(path: str | os.PathLike[str], costs: Costs) -> None:
    """Writes costs as JSON. The file is there whole or not at all; an older one of that name is replaced.

    Raises:
        InvalidCosts: a value in them could not be read again, as a rate that is not finite.
        OSError: the file cannot be written.
    """
    try:
        data = msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n"
    except UnicodeEncodeError as exc:
        raise InvalidCosts(f"{path}: a name cannot be written as UTF-8 ({exc}): replace the lone surrogate in it") from exc
    _decode(data, path)
    write_whole(Path(path), data)


def _decode(data: bytes, path: str | os.PathLike[str]) -> Costs:
    again = "measure anew with: edgeserve profile"
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version > FORMAT_VERSION:
            raise UnsupportedCostsVersion(
                f"{path}: $.version: the costs are in version {version} of the format, and this installation reads 1 to {FORMAT_VERSION}: "
                f"upgrade edgeserve, or {again}"
            )
        return msgspec.json.decode(data, type=Costs)
    except msgspec.ValidationError as exc:
        said = re.sub(r"(`[^`]{80})[^`]+", r"\1...", str(exc))
        raise InvalidCosts(f"{path}: {said}: correct it (docs/how-to/measure-a-pipeline.md has the fields), or {again}") from exc
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        raise InvalidCosts(f"{path}: this is no JSON (NaN and Infinity are none either), or it is cut off: {exc}: {again}") from exc


__all__ = (
    "FORMAT_VERSION",
    "QUANTILES",
    "Costs",
    "InvalidCosts",
    "LinkCost",
    "SourceCost",
    "TaskCost",
    "UnsupportedCostsVersion",
    "read_costs",
    "write_costs",
)
