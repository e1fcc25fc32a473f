"""`Pipeline`: sources, tasks and sinks declared in one place, and what can be said of them before any of them runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from edgeserve.pipeline.build import build, look
from edgeserve.pipeline.declared import Declared, Kind, Node, check_pipeline_name, did_you_mean, names
from edgeserve.pipeline.errors import BadValue, DuplicateName, MissingValue, UnknownName, Where
from edgeserve.pipeline.graph import Graph, Part, derive

F = TypeVar("F", bound=Callable[..., Any])

_HERE = str(Path(__file__).parent)


class Pipeline:
    """A graph of sources, tasks and sinks. Topics, groups and relays are derived from who takes what.

    Declaring runs nothing. `edgeserve run app.py` gives each replica a process of its own; `nodes` makes them for a test.

    Args:
        name: begins the names of its topics.
        node: URL of the node. None: the environment variable EDGESERVE_NODE, else 'local://'. `edgeserve run --node URL` has the last word.

    Attributes:
        where: where it is declared.

    Example:
        >>> app = Pipeline("letters")
        >>> @app.source()
        ... def letter():
        ...     yield from "abc"
        >>> @app.task()
        ... def shout(letter: str) -> str:
        ...     return letter.upper() + "!"
        >>> @app.sink()
        ... def show(shout):
        ...     print(shout)
        >>> nodes = app.nodes("memory://docs-declared")
        >>> for node in nodes.values():
        ...     with node:
        ...         node.run(until="end")
        A!
        B!
        C!
    """

    def __init__(self, name: str, *, node: str | None = None) -> None:
        self.where = _caller()
        check_pipeline_name(name, self.where)
        if node is not None and not isinstance(node, str):
            raise BadValue(f"pipeline {name!r}: node={node!r}", self.where, "give the URL of a node, such as 'local://'")
        self.name = name
        self._node = node
        self._declared: list[Declared] = []

    def __repr__(self) -> str:
        return f"<Pipeline {self.name!r}: {', '.join(each.name for each in self._declared) or 'nothing'}>"

    @property
    def url(self) -> str:
        """The node that it runs on unless another is named."""
        return self._node or os.environ.get("EDGESERVE_NODE") or "local://"

    # --- declaring ----------------------------------------------------------------------------------------------

    def source(
        self,
        *,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        replicas: int = 1,
        place: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> Callable[[F], F]:
        """Declares the decorated function as a source: what it returns, or yields, is the stream. See `add_source`."""
        return self._decorator("source", name, inputs=None, args=args, replicas=replicas, place=place, keywords=keywords)

    def task(
        self,
        *,
        sources: str | Sequence[str] | None = None,
        fuse: Sequence[Any] | None = None,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        replicas: int = 1,
        place: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> Callable[[F], F]:
        """Declares the decorated function or class as a task; with `fuse` as its last stage, behind those. See `add_task`."""
        return self._decorator("task", name, inputs=sources, fuse=fuse, args=args, replicas=replicas, place=place, keywords=keywords)

    def sink(
        self,
        *,
        of: str | Sequence[str] | None = None,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        replicas: int = 1,
        place: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> Callable[[F], F]:
        """Declares the decorated function or class as a sink. See `add_sink`."""
        return self._decorator("sink", name, inputs=of, args=args, replicas=replicas, place=place, keywords=keywords)

    def add_source(
        self,
        name: str,
        stream: Any,
        *,
        args: Mapping[str, Any] | None = None,
        replicas: int = 1,
        place: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> None:
        """Declares a source.

        Args:
            name: its name, and the `source_id` of what it sends unless that is given.
            stream: a function or class that returns the stream, called in the process that runs it; or an iterable. One of
                `edgeserve.sources` brings its event times and message ids along.
            args: what `stream` is called with. One that has a parameter `replica` gets the replica's number.
            replicas: how many processes run it. They send under one source id.
            place: the host that it runs on, for `edgeserve run --host`; of several hosts one after the other for its replicas.
            **keywords: those of `DataSource`.

        Raises:
            InvalidPipeline: one of its subclasses: what is wrong with it alone. What does not fit together `graph` says.
        """
        self._add("source", name, stream, _caller(), inputs=None, args=args, replicas=replicas, place=place, keywords=keywords)

    def add_task(
        self,
        name: str,
        task: Any = None,
        *,
        fuse: Sequence[Any] | None = None,
        sources: str | Sequence[str] | None = None,
        args: Mapping[str, Any] | None = None,
        replicas: int = 1,
        place: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> None:
        """Declares a task.

        Args:
            name: its name, and the `output_id` of its results unless that is given.
            task: a function or an object, as `Compute` takes them; or a class, which is called in the process that runs it.
            fuse: in place of `task`: its stages, each of which is what a task may be. They run in one process, and each hands its results
                to the next one as the objects that they are.
            sources: what it takes, in the order of its parameters: source ids of sources, and the output ids of tasks. None: its parameters
                are called so.
            args: what `task` is called with to make the task; and the replica's number, if it has a parameter `replica`.
            replicas: how many processes share its work.
            place: as for `add_source`.
            **keywords: those of `Compute`.

        Raises:
            InvalidPipeline: as for `add_source`.
        """
        self._add("task", name, task, _caller(), inputs=sources, fuse=fuse, args=args, replicas=replicas, place=place, keywords=keywords)

    def add_sink(
        self,
        name: str,
        final_process: Any,
        *,
        of: str | Sequence[str] | None = None,
        args: Mapping[str, Any] | None = None,
        replicas: int = 1,
        place: str | Sequence[str] | None = None,
        **keywords: Any,
    ) -> None:
        """Declares a sink. Each sink sees all of what it is of; the replicas of one share it.

        Args:
            name: its name.
            final_process: a function or an object, as `Materialize` takes them; or a class, which is called in the process that runs it.
            of: what it takes: an output id or source id, or several. None: its parameter is called so.
            args: what `final_process` is called with to make the function; and the replica's number, as for `add_task`.
            replicas: how many processes share its work.
            place: as for `add_source`.
            **keywords: those of `Materialize`.

        Raises:
            InvalidPipeline: as for `add_source`.
        """
        self._add("sink", name, final_process, _caller(), inputs=of, args=args, replicas=replicas, place=place, keywords=keywords)

    def _decorator(self, kind: Kind, name: str | None, *, fuse: Sequence[Any] | None = None, **given: Any) -> Callable[[F], F]:
        where = _caller()

        def declare(function: F) -> F:
            called = function.__name__ if name is None else name
            if fuse is None:
                self._add(kind, called, function, where, **given)
            else:
                self._add(kind, called, None, where, fuse=[*_stages(fuse, f"{kind} {called!r}", where), function], **given)
            return function

        return declare

    def _add(
        self,
        kind: Kind,
        name: str,
        function: Any,
        where: Where,
        *,
        inputs: Any,
        args: Mapping[str, Any] | None,
        replicas: int,
        place: Any,
        keywords: Mapping[str, Any],
        fuse: Any = None,
        lines: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Declares what stands at `where`, its keywords on `lines`."""
        stages = [function]
        if fuse is not None:
            what, at = f"{kind} {name!r}", Where(where.file, lines.get("fuse", where.line))
            if function is not None:
                raise BadValue(f"{what} has both a task and fuse", at, "leave one of them out: fuse has all stages, the last one too")
            stages = _stages(fuse, what, at)
        elif function is None and kind == "task":
            hint = "write task: module:name under it, or fuse: with a list of them" if lines else "give it a task, or fuse=[...]"
            raise MissingValue(f"task {name!r} has no 'task' and no 'fuse'", where, hint)
        how = "of" if kind == "sink" else "inputs" if lines else "sources"
        taken = None if inputs is None else names(inputs, f"{kind} {name!r}: {how}", where)
        places = () if place is None else names(place, f"{kind} {name!r}: place", where)
        self.declare(Declared(kind, name, stages[-1], where, args, taken, replicas, places, keywords, lines, tuple(stages[:-1])))

    def emptied(self) -> Pipeline:
        """A pipeline of the same name, node and place that declares nothing yet."""
        made = Pipeline(self.name, node=self.url)
        made.where = self.where
        return made

    def declare(self, new: Declared) -> None:
        """Declares what another pipeline declares."""
        for other in self._declared:
            if other.name == new.name:
                reason = f"{new.kind} {new.name!r} has the name of the {other.kind} in line {other.where.line}"
                raise DuplicateName(reason, new.where, "give each a name of its own")
        self._declared.append(new)

    @property
    def declared(self) -> tuple[Declared, ...]:
        """What it declares, in that order."""
        return tuple(self._declared)

    # --- what it makes ------------------------------------------------------------------------------------------

    def graph(self) -> Graph:
        """The graph, checked: names, circles, types, topics, and the value of every keyword.

        Raises:
            InvalidPipeline: one of its subclasses; the message names the line, and what to do.
        """
        if not self._declared:
            raise MissingValue(f"pipeline {self.name!r} declares nothing", self.where, "declare a source, and what takes it")
        graph = derive(self.name, self._declared)
        for part in graph.parts:
            look(part, "memory://")
        return graph

    def nodes(self, node: str | None = None) -> dict[str, Node]:
        """A node for each process, by name; of several replicas `name[0]`, `name[1]` and so on. Streams, tasks and sinks are made.

        Args:
            node: URL of the node. None: `url`.

        Raises:
            InvalidPipeline: as `graph`.
        """
        return {name: build(part, node or self.url, replica) for name, part, replica in self._processes(None)}

    def node(self, name: str, node: str | None = None) -> Node:
        """One of `nodes`, made alone."""
        for process, part, replica in self._processes(None):
            if process == name:
                return build(part, node or self.url, replica)
        raise KeyError(name)

    def look(self, node: str | None = None, *, host: str | None = None) -> dict[str, Node]:
        """The nodes of `nodes` for a look at their topics: with stand-ins for streams, tasks and sinks, so that nothing of them is made.

        Args:
            node: URL of the node. None: `url`.
            host: those that run there. None: all.

        Raises:
            UnknownName: nothing runs on that host.
            MissingValue: something has no place, and would run on every host or on none.
        """
        return {name: look(part, node or self.url, replica) for name, part, replica in self._processes(host)}

    def _processes(self, host: str | None) -> Iterator[tuple[str, Part, int]]:
        found = [(name, part, i) for part in self.graph().parts for i, name in enumerate(part.processes())]
        if host is None:
            yield from found
            return
        places = [part.place(replica) for _, part, replica in found]
        known = sorted({place for place in places if place is not None})
        for (name, part, _), place in zip(found, places, strict=True):
            if place is None:
                raise MissingValue(
                    f"{name!r} has no place", part.declared.where, f"give it one, as {host!r}: else it would run on every host"
                )
        if host not in known:
            raise UnknownName(f"nothing runs on the host {host!r}", self.where, did_you_mean(host, known, f"places are {', '.join(known)}"))
        yield from (each for each, place in zip(found, places, strict=True) if place == host)


def _stages(fuse: Any, what: str, where: Where) -> list[Any]:
    if not isinstance(fuse, list | tuple) or not fuse:
        raise BadValue(f"{what}: fuse={fuse!r:.60}", where, "give a list of its stages, the first of which takes its inputs")
    return [*fuse]


def _caller() -> Where:
    """The line outside of this package that called it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return Where(frame.f_code.co_filename, frame.f_lineno)


__all__ = ("Pipeline",)
