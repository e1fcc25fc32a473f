"""A placement problem: the cluster, what streams through it, what may run where, and what counts."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any, Self

import msgspec
from msgspec import Struct, field

from edgeserve.placement.errors import BadValue, InvalidProblem, MissingValue, UnsupportedProblemVersion

FORMAT_VERSION = 1
"""The version of the JSON format that this installation writes, and the newest that it reads."""

ANY, ALL = "any", "all"
"""What a task's `trigger` may say besides the name of an input."""


class _Part(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What checks the types of its fields when it is made; what the numbers and the names are is the problem's to check."""

    def __post_init__(self) -> None:
        from edgeserve.placement.check import typed

        typed(self)


class Node(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class Link(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A link between two nodes, whose capacity all routes over it share.

    Args:
        name: unique among links.
        ends: the two nodes that it connects.
        bandwidth_bytes_s: bytes per second: of both directions together, or of each if it is `duplex`.
        latency_ms: propagation, one way.
        max_utilisation: the part of the bandwidth that may be used, below 1.
        cost_per_byte: in the unit of `Node.cost_per_core_s`.
        duplex: each direction has the whole bandwidth, as in a cable; in the air both share it.
    """

    name: str
    ends: tuple[str, str]
    bandwidth_bytes_s: float
    latency_ms: float = 0.0
    max_utilisation: float = 0.8
    cost_per_byte: float = 0.0
    duplex: bool = False


class Route(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which links lead from one node to another, in order. The way back uses the same ones unless it has a route of its own."""

    start: str
    end: str
    links: tuple[str, ...]


class Source(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stream that begins at a node: `rate_hz` messages of `bytes`, whose payload may not leave `stays_in` if that is a zone.

    One that is not `lazy` always travels with its headers. `phase_ms`: it keeps a pace, and its first message comes so long after a moment
    that all sources share; None: its messages come by chance.
    """

    name: str
    node: str
    rate_hz: float
    bytes: float
    stays_in: str | None = None
    lazy: bool = True
    phase_ms: float | None = None


class Task(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A function of the newest, or of the matching, messages of its inputs. What it makes is a stream of the task's name.

    Args:
        name: unique among sources and tasks.
        inputs: names of sources and tasks.
        cpu_s: cpu-seconds per run, on a core of speed 1.
        memory_bytes: per process.
        output_bytes: size of a result.
        outputs_per_run: results per run; less than 1 for a filter, more for a generator.
        accelerators: what each process holds, for example `{"gpu": 1}`.
        trigger: `any` message of an input starts a run, `all` inputs' matching messages do (the latest of them), or those of one named
            input.
        min_interval_ms: least time from run to run; what comes in between starts none.
        replicas_min: at least so many replicas, each on a node of its own, share the runs.
        replicas_max: at most so many.
        processes: how many run it, on all nodes together, which take them in turn; None: one on each of its nodes.
        stays_in: a zone that the payload of the results may not leave.
        lazy: whether the payload of the results can travel apart from its header; if not, it always goes along.
        shares_sets: of several inputs and in several processes: one joins, and what belongs together goes through the broker once more,
            payloads included, to the one that runs it. If not, each joins a part by itself.
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
    processes: int | None = None
    stays_in: str | None = None
    lazy: bool = True
    shares_sets: bool = True


class Sink(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a stream ends: at a node, with `weight` for each second of latency of each result."""

    name: str
    input: str
    node: str
    weight: float = 1.0


class Weights(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class Problem(_Part, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
        header_bytes: size of a header, with all that is said about a message between a node and the broker.
        reference_bytes: what a header is longer by when the payload stays where it was made: where it lies, and what others say there.
        fetch_bytes: what asking for a payload, and the head of the answer, take beside it on the way between its maker and who uses it.
        settle_bytes: what noting runs as done takes between a task's node and the broker, some 8 times a second at most.
        hop_ms: what a message through the broker takes beside its way over links: programs that wake up, encode and decode.
        variability: how much messages come at irregular times: variance over squared mean of the times between them. 1 if they come by
            chance (Poisson), 0 at a steady pace, more in bursts.
        weights: what counts how much.
        version: of the format.

    Raises:
        InvalidProblem: one of its subclasses, when the problem makes no sense. Numbers are from 0 to 1e18; rates, speeds and bandwidths at
            least 1e-18; names have at most 1,000 characters.

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
    reference_bytes: float = 0.0
    fetch_bytes: float = 0.0
    settle_bytes: float = 0.0
    hop_ms: float = 0.0
    variability: float = 1.0
    weights: Weights = field(default_factory=Weights)
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        from edgeserve.placement.check import check

        super().__post_init__()
        check(self)

    @property
    def made(self) -> list[Source | Task]:
        """All that makes a stream."""
        return [*self.sources, *self.tasks]

    def to_json(self) -> bytes:
        """The problem as JSON, which `from_json` reads; fields that have their default are left out, but for the version.

        Raises:
            BadValue: a name holds a lone surrogate, which cannot be written as UTF-8.
        """
        try:
            return msgspec.json.format(msgspec.json.encode({"version": self.version, **_plain(self)}), indent=2)
        except UnicodeEncodeError as exc:
            raise BadValue(f"a name cannot be written as UTF-8 ({exc}): replace the lone surrogate in it") from exc

    @classmethod
    def from_json(cls, data: bytes | str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            InvalidProblem: one of its subclasses where the content is wrong; the message names the place, as `$.nodes[3].cores` or
                `nodes['a'].cores`. For text that is no JSON it gives the line and the column, in bytes.
        """
        if not isinstance(data, bytes | bytearray | memoryview | str):
            raise InvalidProblem(f"the JSON is a {type(data).__name__}: give its text, as bytes or a str")
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
            said = re.sub(r"(`[^`]{80})[^`]+", r"\1...", str(exc))
            kind = MissingValue if "missing required field" in said else BadValue
            raise kind(f"{said}{_meant(said)}: see the table of fields in docs/reference/placement.md") from exc
        except (msgspec.DecodeError, UnicodeError) as exc:
            said = exc.reason if isinstance(exc, UnicodeDecodeError | UnicodeEncodeError) else str(exc)
            raise InvalidProblem(f"{_place(data, said)}: this is no JSON (NaN and Infinity are none either): {said}") from exc
        except RecursionError as exc:
            raise InvalidProblem(
                "the JSON is nested too deep to be read: no field of a problem is deeper than `$.nodes[0].accelerators`"
            ) from exc


class _Version(Struct):
    version: int = FORMAT_VERSION


def _place(data: bytes | bytearray | memoryview | str, said: str) -> str:
    """The line and the column of an error of syntax: where it was met, or the end of a text that was cut off."""
    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else bytes(data)
    found = re.search(r"\(byte (\d+)\)", said)
    at = int(found[1]) if found else len(raw)
    try:
        raw.decode()
    except UnicodeDecodeError as exc:
        at = exc.start
    before = raw[:at].split(b"\n")
    return f"line {len(before)}, column {len(before[-1]) + 1}"


def _meant(said: str) -> str:
    """What a field that is not known may be: most often its name lacks the unit."""
    found = re.search(r"unknown field `([^`]+)`(?: - at `\$\.(\w+))?", said)
    if found is None:
        return ""
    parts = {"nodes": Node, "links": Link, "routes": Route, "sources": Source, "tasks": Task, "sinks": Sink, "weights": Weights}
    names = parts.get(found[2], Problem).__struct_fields__
    close = [name for name in names if name.startswith(f"{found[1]}_")] or get_close_matches(found[1], names, 1)
    return f"; did you mean `{close[0]}`?" if close else ""


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
            if got != default:
                result[name] = _plain(got)
        return result
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
