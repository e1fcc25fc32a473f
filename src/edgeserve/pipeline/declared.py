"""What a user declares: a source, a task or a sink, with its name, its keywords and where it stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

from edgeserve.compute import Compute
from edgeserve.core.codec import as_parameter
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.pipeline.errors import BadValue, MissingValue, UnknownKeyword, Where

Kind: TypeAlias = Literal["source", "task", "sink"]
Node: TypeAlias = DataSource | Compute | Materialize

NODES: dict[Kind, type[Node]] = {"source": DataSource, "task": Compute, "sink": Materialize}
_SAYS_ITS_ID: dict[Kind, str] = {"source": "source_id", "task": "output_id"}
# The pipeline's own: what runs, and the node that all of it runs on.
_NOT_GIVEN = frozenset(("stream", "task", "fuse", "final_process", "node", "pulsar_node"))
DERIVED = frozenset(("source_id", "output_id", "worker_id", "topic", "topic_in", "topic_out", "group"))
"""Keywords that the pipeline fills in where they are not given."""

_NAME = re.compile(r"[\w-]+")
MOST_REPLICAS = 1_000
NAME_BYTES = 44
"""Of a name, at most: topics, groups and what belongs to them are called after two or three of them, and have 200."""


def keywords_of(kind: Kind) -> dict[str, inspect.Parameter]:
    """The keywords that a declaration hands on to its node."""
    return {name: p for name, p in inspect.signature(NODES[kind]).parameters.items() if name not in _NOT_GIVEN}


@dataclass(frozen=True)
class Declared:
    """A source, a task or a sink, checked as far as it can be alone.

    Attributes:
        function: what runs: a function, an object or a class; of a source a function that returns the stream, or an iterable; of a fused
            task its last stage.
        args: what to call `function` with to get what runs; None: it runs itself, unless it is a class.
        inputs: what it takes, in the order of its parameters; None: its parameter names say it.
        places: where its replicas run, in turn; empty: anywhere.
        keywords: those of its `DataSource`, `Compute` or `Materialize`.
        where: where it is declared.
        lines: the lines of single keywords, where they are known.
        before: the stages before `function` of a fused task, in order.
    """

    kind: Kind
    name: str
    function: Any
    where: Where
    args: Mapping[str, Any] | None = None
    inputs: tuple[str, ...] | None = None
    replicas: int = 1
    places: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, int] = field(default_factory=dict)
    before: tuple[Any, ...] = ()

    @property
    def stages(self) -> tuple[Declared, ...]:
        """The stages of a fused task, in order, each as a task that stands where it is named; of anything else itself."""
        if not self.before:
            return (self,)
        last = replace(self, before=(), inputs=None, where=self.at(f"fuse[{len(self.before)}]"))
        rest = [replace(last, function=f, keywords={}, where=self.at(f"fuse[{i}]")) for i, f in enumerate(self.before)]
        return (*rest, last)

    @property
    def made(self) -> bool:
        """Whether `function` is called to get what runs."""
        return self.args is not None or isinstance(self.function, type)

    @property
    def sends(self) -> str:
        """What its messages are called downstream; "" of a sink."""
        if self.kind == "sink":
            return ""
        given = self.keywords.get(_SAYS_ITS_ID[self.kind])
        return as_parameter(given if isinstance(given, str) else self.name)

    @property
    def takes(self) -> str:
        """How the keyword that says what it takes is written where it was declared."""
        in_yaml = bool(self.lines)
        return f"{'of' if self.kind == 'sink' else 'inputs' if in_yaml else 'sources'}{':' if in_yaml else '='}"

    def at(self, *keywords: str) -> Where:
        """The line of the first of these keywords whose line is known."""
        known = [self.lines[keyword] for keyword in keywords if keyword in self.lines]
        return Where(self.where.file, known[0]) if known else self.where

    def __post_init__(self) -> None:
        _check_name(f"the {self.kind}", self.name, self.where)
        known = keywords_of(self.kind)
        for keyword in self.keywords:
            if keyword not in known:
                raise unknown_keyword(keyword, [*known, "replicas", "place", "args"], f"{self.kind} {self.name!r}", self.at(keyword))
        for keyword in DERIVED & set(self.keywords):
            if not isinstance(given := self.keywords[keyword], str | None) or given == "":
                raise BadValue(
                    f"{self.kind} {self.name!r}: {keyword}={given!r}", self.at(keyword), "give a name, or leave it out: it is derived"
                )
        if isinstance(self.replicas, bool) or not isinstance(self.replicas, int) or not 1 <= self.replicas <= MOST_REPLICAS:
            reason = f"{self.kind} {self.name!r}: replicas={self.replicas!r}"
            raise BadValue(reason, self.at("replicas"), f"give how many processes run it, an int from 1 to {MOST_REPLICAS}")
        if self.args is not None and not (isinstance(self.args, Mapping) and all(isinstance(name, str) for name in self.args)):
            reason = f"{self.kind} {self.name!r}: args={self.args!r:.60} is no dict from parameter names to values"
            raise BadValue(reason, self.at("args"), "name each parameter that it is for, as in {'path': 'frames.csv'}")
        if self.args is not None and not callable(self.function):
            reason = f"{self.kind} {self.name!r}: args= are what a function or class is called with, and {self.function!r} is neither"
            raise BadValue(reason, self.at("args"), "leave them out, or name what takes them")
        if self.inputs is not None and (not self.inputs or len(set(self.inputs)) < len(self.inputs)):
            reason = f"{self.kind} {self.name!r} takes {list(self.inputs)}"
            raise BadValue(reason, self.at("inputs", "sources", "of"), "name at least one input, and each once")
        for i, runs in enumerate((*self.before, self.function) if self.kind != "source" else ()):
            if not callable(runs):
                reason = f"{self.kind} {self.name!r} is {type(runs).__name__} {runs!r:.60}, and nothing that can be called"
                raise BadValue(reason, self.at(f"fuse[{i}]"), "give it a function, a class or an object with __call__")
        if self.before and self.args is not None:
            reason = f"{self.kind} {self.name!r} has several stages, and args= are what one is called with"
            raise BadValue(reason, self.at("args"), "leave them out, and fuse objects that are made with them")


def names(given: Any, what: str, where: Where) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else None
    if found is None or not all(isinstance(name, str) and name for name in found):
        raise BadValue(f"{what}={given!r}", where, "give a name, or a list of names")
    return found


def unknown_keyword(keyword: str, known: list[str], what: str, where: Where) -> UnknownKeyword:
    """Says that a keyword is none, and which was most likely meant."""
    return UnknownKeyword(f"{what} takes no {keyword!r}", where, did_you_mean(keyword, known))


def did_you_mean(name: str, known: list[str], otherwise: str = "") -> str:
    """The nearest of the known names as a suggestion; else all of them, or what is said otherwise."""
    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return otherwise or f"it takes {', '.join(sorted(known))}"


def _check_name(what: str, name: Any, where: Where) -> None:
    if not isinstance(name, str) or not name:
        raise MissingValue(f"{what} has no name", where, "give it one, a str")
    if not _NAME.fullmatch(name) or len(name.encode(errors="replace")) > NAME_BYTES:
        raise BadValue(f"{what} is called {name[:60]!r}", where, f"give it a name of letters, digits, _ and -, at most {NAME_BYTES} bytes")


def check_pipeline_name(name: Any, where: Where) -> None:
    """Raises what is wrong with the name of a pipeline."""
    _check_name("the pipeline", name, where)


__all__ = (
    "DERIVED",
    "MOST_REPLICAS",
    "NAME_BYTES",
    "NODES",
    "Declared",
    "Kind",
    "Node",
    "check_pipeline_name",
    "did_you_mean",
    "keywords_of",
    "names",
    "unknown_keyword",
)
