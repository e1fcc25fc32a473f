"""A placement problem: the cluster, what streams through it, what may run where, and what counts."""

from __future__ import annotations

from typing import Any, Self

import msgspec
from msgspec import Struct, field

from edgeserve.placement.errors import BadValue, InvalidProblem, MissingValue, UnsupportedProblemVersion

FORMAT_VERSION = 1
"""The version of the JSON format that this installation writes, and the newest that it reads."""

ANY, ALL = "any", "all"
"""What a task's `trigger` may say besides the name of an input."""


class Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine, or with `cores=0` something that only forwards.

    Args:
        name: unique among nodes.
        cores: how many runs it carries at a time.
        memory_bytes: what tasks may take of its memory.
        accelerators: how many of each kind it has, for example `{"gpu": 1}`.
        speed: cpu-seconds of the profile that one core gets done per second.
        zone: where it stands; data may be bound to a zone.
        max_utilisation: the part of its cores that may be busy, below 1.
        cost_per_core_s: what a busy core costs per second, in a unit of your own.
    """

    name: str
    cores: int = 1
    memory_bytes: float = 0.0
    accelerators: dict[str, int] = field(default_factory=dict)
    speed: float = 1.0
    zone: str = ""
    max_utilisation: float = 0.8
    cost_per_core_s: float = 0.0


class Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link between two nodes, whose capacity both directions and all routes over it share.

    Args:
        name: unique among links.
        ends: the two nodes that it connects.
        bandwidth_bytes_s: bytes per second.
        latency_ms: propagation, one way.
        max_utilisation: the part of the bandwidth that may be used, below 1.
        cost_per_byte: in the unit of `Node.cost_per_core_s`.
    """

    name: str
    ends: tuple[str, str]
    bandwidth_bytes_s: float
    latency_ms: float = 0.0
    max_utilisation: float = 0.8
    cost_per_byte: float = 0.0


class Route(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which links lead from one node to another, in order. The way back uses the same ones unless it has a route of its own."""

    start: str
    end: str
    links: tuple[str, ...]


class Source(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stream that begins at a node: `rate_hz` messages of `bytes`, whose payload may not leave `stays_in` if that is a zone."""

    name: str
    node: str
    rate_hz: float
    bytes: float
    stays_in: str | None = None


class Task(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function of the newest, or of the matching, messages of its inputs. What it makes is a stream of the task's name.

    Args:
        name: unique among sources and tasks.
        inputs: names of sources and tasks.
        cpu_s: cpu-seconds per run, on a core of speed 1.
        memory_bytes: per replica.
        output_bytes: size of a result.
        outputs_per_run: results per run; less than 1 for a filter, more for a generator.
        accelerators: what each replica holds, for example `{"gpu": 1}`.
        trigger: `any` message of an input starts a run, `all` inputs' matching messages do (the latest of them), or those of one named
            input.
        min_interval_ms: least time from run to run; what comes in between starts none.
        replicas_min: at least so many replicas, each on a node of its own, share the runs.
        replicas_max: at most so many.
        stays_in: a zone that the payload of the results may not leave.
    """

    name: str
    inputs: tuple[str, ...]
    cpu_s: float
    memory_bytes: float = 0.0
    output_bytes: float = 0.0
    outputs_per_run: float = 1.0
    accelerators: dict[str, int] = field(default_factory=dict)
    trigger: str = ANY
    min_interval_ms: float = 0.0
    replicas_min: int = 1
    replicas_max: int = 1
    stays_in: str | None = None


class Sink(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a stream ends: at a node, with `weight` for each second of latency of each result."""

    name: str
    input: str
    node: str
    weight: float = 1.0


class Weights(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the objective adds up.

    Args:
        latency: per second of latency without waiting, of a result per second, times the sink's weight.
        waiting: per message or run that waits, in the mean.
        bytes: per byte per second on each link.
        cost: per unit of `cost_per_core_s` and `cost_per_byte`.
    """

    latency: float = 1.0
    waiting: float = 1.0
    bytes: float = 0.0
    cost: float = 0.0


class Problem(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to place where. Checked when it is made.

    Args:
        nodes: the cluster.
        links: what connects it; routes take the least latency, then the fewest links, where `routes` says nothing else.
        broker: the node of the broker.
        sources, tasks, sinks: what streams.
        routes: for pairs whose way is not the one of least latency.
        pins: task to the nodes that it may run on.
        colocate: sets of tasks that run on the same nodes.
        separate: sets of tasks of which no two share a node.
        header_bytes: size of a header.
        weights: what counts how much.
        version: of the format.

    Raises:
        InvalidProblem: one of its subclasses, when the problem makes no sense.

    Example:
        >>> problem = Problem(
        ...     nodes=(Node(name="camera"), Node(name="server", cores=8)),
        ...     links=(Link(name="wifi", ends=("camera", "server"), bandwidth_bytes_s=2.5e6, latency_ms=3),),
        ...     broker="server",
        ...     sources=(Source(name="frames", node="camera", rate_hz=10, bytes=100_000),),
        ...     tasks=(Task(name="detect", inputs=("frames",), cpu_s=0.02, output_bytes=500),),
        ...     sinks=(Sink(name="alarm", input="detect", node="server"),),
        ... )
        >>> Problem.from_json(problem.to_json()) == problem
        True
    """

    nodes: tuple[Node, ...]
    broker: str
    sources: tuple[Source, ...]
    tasks: tuple[Task, ...]
    sinks: tuple[Sink, ...]
    links: tuple[Link, ...] = ()
    routes: tuple[Route, ...] = ()
    pins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    colocate: tuple[tuple[str, ...], ...] = ()
    separate: tuple[tuple[str, ...], ...] = ()
    header_bytes: float = 200.0
    weights: Weights = field(default_factory=Weights)
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        from edgeserve.placement.check import check

        check(self)

    @property
    def made(self) -> list[Source | Task]:
        """All that makes a stream."""
        return [*self.sources, *self.tasks]

    def to_json(self) -> bytes:
        """The problem as JSON; fields that have their default are left out, but for the version."""
        plain = _plain(self)
        return msgspec.json.format(msgspec.json.encode({"version": self.version, **plain}), indent=2)

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            InvalidProblem: one of its subclasses; the message names the place, as `$.nodes[3].cores`.
        """
        try:
            version = msgspec.json.decode(data, type=_Version).version
            if not 1 <= version <= FORMAT_VERSION:
                raise UnsupportedProblemVersion(
                    f"$.version: the problem is in version {version} of the format, and this installation reads 1 to {FORMAT_VERSION}: "
                    f"upgrade edgeserve, or write the problem anew"
                )
            return msgspec.json.decode(data, type=cls)
        except InvalidProblem:
            raise
        except msgspec.ValidationError as exc:
            if isinstance(exc.__cause__, InvalidProblem):
                raise exc.__cause__ from None
            kind = MissingValue if "missing required field" in str(exc) else BadValue
            raise kind(f"{exc}: see the table of fields in docs/reference/placement.md") from exc
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise InvalidProblem(f"this is no JSON (NaN and Infinity are none either): {exc}") from exc


class _Version(Struct):
    version: int = FORMAT_VERSION


def _plain(value: Any) -> Any:
    """A Struct as a dict without the fields that have their default."""
    if isinstance(value, Struct):
        defaults = {item.name: item.default for item in msgspec.structs.fields(type(value))}
        factories = {item.name: item.default_factory for item in msgspec.structs.fields(type(value))}
        result = {}
        for name in value.__struct_fields__:
            got = getattr(value, name)
            made = factories[name]
            default = defaults[name] if made is msgspec.NODEFAULT else made()
            if got != default or type(got) is not type(default):
                result[name] = _plain(got)
        return result
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
