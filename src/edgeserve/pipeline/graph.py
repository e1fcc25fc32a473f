"""The graph that declarations make: who feeds whom, over which topics, in which groups. Pure.

A node of edgeserve reads one topic, and all that is on it, and writes to one. So what is taken together shares a topic, and what is on a
topic is taken by all who read it: there is one topic for each set of inputs. Who is in several of these sets sends to a topic of its own,
and a relay (a task that hands on what it takes) brings it to each of the others.
"""

from __future__ import annotations

import functools
import graphlib
import keyword
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from xxhash import xxh3_64_hexdigest

from edgeserve.align import Latest
from edgeserve.pipeline.callables import Signature, check_args
from edgeserve.pipeline.declared import NAME_BYTES, Declared, did_you_mean
from edgeserve.pipeline.errors import BadValue, CyclicPipeline, DuplicateName, MissingValue, UnknownName
from edgeserve.pipeline.fit import check_files, check_keys, check_types
from edgeserve.stage.fuse import name_of
from edgeserve.stage.payloads import LAZY_BYTES, in_place

Inputs: TypeAlias = frozenset[str]
PartKind: TypeAlias = Literal["source", "task", "relay", "sink"]


@dataclass(frozen=True)
class Part:
    """A node of the graph, which runs as one process per replica.

    Attributes:
        inputs: what it takes: source ids, in the order of its parameters.
        sends: the source id of what it sends; "": nothing.
        topic_in: where its inputs come from; "": nowhere.
        topic_out: where it sends to; "": nowhere.
        group: what its replicas share the messages as; "" of a source.
        declared: what the user has said of it; of a relay that of the producer it hands on.
    """

    name: str
    kind: PartKind
    inputs: tuple[str, ...]
    sends: str
    topic_in: str
    topic_out: str
    group: str
    declared: Declared

    @property
    def replicas(self) -> int:
        """How many processes run it."""
        return 1 if self.kind == "relay" else self.declared.replicas

    def processes(self) -> list[str]:
        """The names of its processes."""
        return [self.name] if self.replicas == 1 else [f"{self.name}[{i}]" for i in range(self.replicas)]

    @property
    def stages(self) -> tuple[str, ...]:
        """What the stages of a fused task are called; empty of anything else."""
        fused = self.kind == "task" and self.declared.before
        return tuple(name_of(each.function) for each in self.declared.stages) if fused else ()

    @property
    def trigger(self) -> str:
        """Whether `any` message of an input starts a run of it, or the matching ones of `all` inputs do."""
        keywords = self.declared.keywords if self.kind == "task" else {}
        join = keywords.get("join")
        if isinstance(join, functools.partial):
            join = join.func
        newest = join is None or join is Latest or isinstance(join, Latest) or (isinstance(join, str) and join == "latest")
        return "any" if len(self.inputs) < 2 or (newest and not keywords.get("no_overlap")) else "all"

    @property
    def min_interval_ms(self) -> float:
        """The least time between two runs of it; 0 where there is none, or one for each key."""
        keywords = self.declared.keywords if self.kind == "task" else {}
        if keywords.get("by") is not None:
            return 0.0
        return float(keywords.get("min_interval_ms") or getattr(keywords.get("join"), "min_period_ns", 0) / 1e6)

    @property
    def lazy_bytes(self) -> int | None:
        """The size from which what it sends can stay where it is made, None: at no size; a relay's is that of whom it hands on."""
        keywords = self.declared.keywords
        stays = in_place("lazy", keywords.get("durability", "origin")) == "lazy"
        return int(keywords.get("lazy_bytes", LAZY_BYTES)) if stays and self.topic_out else None

    @property
    def shares_sets(self) -> bool:
        """Whether its replicas run sets that one of them has joined."""
        return self.kind == "task" and len(self.inputs) > 1 and self.replicas > 1 and self.declared.keywords.get("partitions") is None

    def place(self, replica: int) -> str | None:
        """Where a replica runs; None: anywhere. A relay runs where what it hands on is made."""
        places = self.declared.places
        return places[replica % len(places)] if places else None


@dataclass(frozen=True)
class Graph:
    """A pipeline, checked and wired.

    Attributes:
        pipeline: its name.
        parts: its nodes, each behind all that feed it: sources, tasks, sinks; relays behind what they hand on.
    """

    pipeline: str
    parts: tuple[Part, ...]

    def edges(self) -> list[tuple[Part, Part]]:
        """Who feeds whom."""
        return [
            (writer, reader)
            for writer in self.parts
            for reader in self.parts
            if writer.topic_out and writer.topic_out == reader.topic_in and writer.sends in reader.inputs
        ]

    def to_dict(self) -> dict[str, Any]:
        """The graph for programs, as `edgeserve graph --format json` writes it."""
        nodes = [
            {
                "name": part.name,
                "kind": part.kind,
                "inputs": list(part.inputs),
                "sends": part.sends or None,
                "stages": list(part.stages),
                "topic_in": part.topic_in or None,
                "topic_out": part.topic_out or None,
                "group": part.group or None,
                "replicas": part.replicas,
                "places": list(part.declared.places),
                "trigger": part.trigger if part.inputs else None,
                "min_interval_ms": part.min_interval_ms,
                "lazy_bytes": part.lazy_bytes,
                "shares_sets": part.shares_sets,
            }
            for part in self.parts
        ]
        edges = [{"from": writer.name, "to": reader.name, "topic": writer.topic_out} for writer, reader in self.edges()]
        return {"pipeline": self.pipeline, "nodes": nodes, "edges": edges}


def derive(pipeline: str, declared: Sequence[Declared]) -> Graph:
    """The graph of declarations.

    Raises:
        InvalidPipeline: one of its subclasses: what does not fit together.
    """
    makers = _makers(declared)
    inputs = {each.name: _inputs(each) for each in declared if each.kind != "source"}
    _check_inputs(declared, inputs, makers)
    order = _order(declared, inputs, makers)
    check_types(order, inputs, makers)
    check_keys(order, inputs, makers)
    check_files(order)
    return Graph(pipeline, tuple(_Wiring(pipeline, order, inputs, makers).parts()))


def _makers(declared: Iterable[Declared]) -> dict[str, Declared]:
    """Source id to who sends it."""
    makers: dict[str, Declared] = {}
    for each in declared:
        if not each.sends:
            continue
        if not each.sends.isidentifier() or keyword.iskeyword(each.sends):
            reason = f"{each.kind} {each.name!r} sends {each.sends!r}, which is no name that a parameter can have"
            option = "source_id" if each.kind == "source" else "output_id"
            raise BadValue(reason, each.at(option), f"give it another name, or {option}=: tasks take it by this name")
        other = makers.setdefault(each.sends, each)
        if other is not each:
            reason = f"{each.kind} {each.name!r} and {other.kind} {other.name!r} (line {other.where.line}) both send {each.sends!r}"
            raise DuplicateName(reason, each.at("source_id", "output_id"), "give each an id of its own, or one of them replicas=")
    return makers


def _inputs(each: Declared) -> tuple[str, ...]:
    """What a task or a sink takes, as it is said or as its parameters are called."""
    for stage in each.stages:
        check_args(stage)
    if each.kind == "sink" and each.inputs is not None:
        Signature(each)
        return each.inputs
    known = Signature(each).parameters
    if each.inputs is None:
        if not known:
            reason = f"{each.kind} {each.name!r}: what it takes is not known before it runs"
            raise MissingValue(reason, each.where, f"say it: {each.takes}")
        return known
    if known is not None and len(known) != len(each.inputs):
        reason = f"task {each.name!r} takes {', '.join(each.inputs)}, and has the parameters {', '.join(known)}"
        raise BadValue(reason, each.at("inputs", "sources"), "name one input for each parameter")
    return each.inputs


def _check_inputs(declared: Sequence[Declared], inputs: dict[str, tuple[str, ...]], makers: dict[str, Declared]) -> None:
    named = {each.name: each.sends for each in declared}
    for each in declared:
        if each.kind == "source":
            check_args(each)
        for i, name in enumerate(inputs.get(each.name, ())):
            if name not in makers:
                others = [maker for maker in makers if maker != each.sends]
                sent = named.get(name)
                hint = f"{name!r} sends {sent!r}: take that" if sent else did_you_mean(name, [*others], _sent(others))
                raise UnknownName(
                    f"{each.kind} {each.name!r} takes {name!r}, which nothing sends", each.at(f"inputs[{i}]", "inputs", "of"), hint
                )


def _sent(makers: Iterable[str]) -> str:
    return f"there is {', '.join(map(repr, makers))}" if makers else "there is nothing yet that sends: declare a source"


def _order(declared: Sequence[Declared], inputs: dict[str, tuple[str, ...]], makers: dict[str, Declared]) -> list[Declared]:
    """Sources, tasks behind what they take, sinks; otherwise as they are declared."""
    tasks = {each.name: each for each in declared if each.kind == "task"}
    feeds = {name: [makers[i].name for i in inputs[name] if makers[i].kind == "task"] for name in tasks}
    try:
        ordered = list(graphlib.TopologicalSorter(feeds).static_order())
    except graphlib.CycleError as exc:
        circle = exc.args[1]
        reason = f"tasks feed each other in a circle: {' -> '.join(circle)}"
        raise CyclicPipeline(reason, tasks[circle[0]].at("inputs", "sources"), "take one of these inputs out") from None
    rest = [[each for each in declared if each.kind == kind] for kind in ("source", "sink")]
    return [*rest[0], *(tasks[name] for name in ordered), *rest[1]]


class _Wiring:
    """Gives every set of inputs a topic."""

    def __init__(self, pipeline: str, order: Sequence[Declared], inputs: dict[str, tuple[str, ...]], makers: dict[str, Declared]) -> None:
        self._pipeline, self._order, self._inputs, self._makers = pipeline, order, inputs, makers
        self._readers: dict[Inputs, list[Declared]] = {}
        for each in order:
            if each.kind != "source":
                self._readers.setdefault(frozenset(inputs[each.name]), []).append(each)
        self._topics: dict[Inputs, str] = {}
        self._given()

    def _home(self, source: str) -> Inputs:
        """Where a producer sends to: with those that it is taken together with, if it is always the same ones."""
        sets = [each for each in self._readers if source in each]
        return sets[0] if len(sets) == 1 else frozenset((source,))

    def _given(self) -> None:
        """Topics that are given, to producers or to who takes them."""
        said: dict[Inputs, Declared] = {}
        used: dict[str, Inputs] = {}
        claims = [(self._home(each.sends), each, "topic" if each.kind == "source" else "topic_out") for each in self._order if each.sends]
        claims += [
            (frozenset(self._inputs[e.name]), e, "topic_in" if e.kind == "task" else "topic") for e in self._order if e.kind != "source"
        ]
        for inputs, each, option in claims:
            topic = each.keywords.get(option)
            if topic is None:
                continue
            other = said.setdefault(inputs, each)
            if self._topics.setdefault(inputs, topic) != topic:
                reason = f"{each.name!r} has {option}={topic!r}, and {other.name!r} {self._topics[inputs]!r} for the same messages"
                raise BadValue(reason, each.at(option), "give both the same topic, or leave it out: it is derived")
            if used.setdefault(topic, inputs) != inputs:
                reason = f"{each.name!r} has {option}={topic!r}, where {', '.join(sorted(used[topic]))} already goes"
                raise DuplicateName(
                    reason, each.at(option), "give it another, or leave it out: whoever reads a topic takes all that is on it"
                )

    def _topic(self, inputs: Inputs) -> str:
        if inputs not in self._topics:
            members = [each for each in self._order if each.sends in inputs and each.sends]
            names = "+".join(each.name for each in members)
            topic = f"{self._pipeline}.{names}"
            if len(topic.encode()) > 2 * NAME_BYTES + 1:
                topic = f"{self._pipeline}.{xxh3_64_hexdigest(names.encode())}"
            if topic in self._topics.values():
                reason = f"the topic {topic!r}, which is given, is that of what {members[0].name!r} sends"
                raise DuplicateName(reason, members[0].where, "give another one, or leave it out: it is derived")
            self._topics[inputs] = topic
        return self._topics[inputs]

    def parts(self) -> list[Part]:
        """Every node with its topics."""
        parts = [part for each in self._order for part in (self._part(each), *self._relays(each))]
        self._check_groups(parts)
        return parts

    def _part(self, each: Declared) -> Part:
        inputs = self._inputs.get(each.name, ())
        topic_in = self._topic(frozenset(inputs)) if inputs else ""
        topic_out = self._topic(self._home(each.sends)) if each.sends else ""
        group = "" if each.kind == "source" else each.keywords.get("group") or each.name
        return Part(each.name, each.kind, inputs, each.sends, topic_in, topic_out, group, each)

    def _relays(self, each: Declared) -> list[Part]:
        found: list[Part] = []
        if not (sent := each.sends):
            return found
        home = self._home(sent)
        for inputs, readers in self._readers.items():
            if sent in inputs and inputs != home:
                name = f"{each.name}>{readers[0].name}"
                found.append(Part(name, "relay", (sent,), sent, self._topic(home), self._topic(inputs), name, each))
        return found

    def _check_groups(self, parts: Iterable[Part]) -> None:
        seen: dict[tuple[str, str], Part] = {}
        for part in parts:
            if part.group and (other := seen.setdefault((part.topic_in, part.group), part)) is not part:
                reason = f"{part.name!r} and {other.name!r} take the same messages as one group, {part.group!r}"
                raise DuplicateName(
                    reason, part.declared.at("group"), "give each a group of its own: each message goes to one member of a group"
                )


__all__ = ("Graph", "Part", "derive")
