"""What can be wrong with a pipeline before anything of it runs: what, where, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from edgeserve.core.errors import ConfigurationError


@dataclass(frozen=True)
class Where:
    """A line of a file, as editors and terminals take it: `app.yaml:12`."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class InvalidPipeline(ConfigurationError):
    """The pipeline cannot run as it is written. The root of those below.

    Attributes:
        reason: what is wrong.
        where: the line that says so.
        suggestion: what to do.
    """

    def __init__(self, reason: str, where: Where, suggestion: str) -> None:
        super().__init__(f"{where}: {reason}; {suggestion}")
        self.reason, self.where, self.suggestion = reason, where, suggestion


class UnknownName(InvalidPipeline, LookupError):
    """An input that nothing in the pipeline sends, or a place where nothing of it runs."""


class DuplicateName(InvalidPipeline):
    """Two things have one name: nodes, what they send, topics of different inputs, groups of one topic, keys of a YAML mapping."""


class CyclicPipeline(InvalidPipeline):
    """Tasks feed each other in a circle; the message lists it."""


class UnknownKeyword(InvalidPipeline, TypeError):
    """A keyword that neither the pipeline nor the node it declares takes."""


class MissingValue(InvalidPipeline):
    """Something that has no default is not there."""


class BadValue(InvalidPipeline):
    """A value that cannot work, such as a negative number of replicas."""


class TypeConflict(InvalidPipeline, TypeError):
    """A parameter's annotation contradicts what its source is annotated to send."""


class BadReference(InvalidPipeline, LookupError):
    """A `module:name` that names nothing, or whose module cannot be imported."""


class InvalidDocument(InvalidPipeline):
    """The file is no YAML, or YAML of another shape than a pipeline's."""


class UnsafeDocument(InvalidDocument):
    """The file is larger or deeper than a pipeline's ever is, or has anchors, aliases or tags, which it never needs."""


__all__ = (
    "BadReference",
    "BadValue",
    "CyclicPipeline",
    "DuplicateName",
    "InvalidDocument",
    "InvalidPipeline",
    "MissingValue",
    "TypeConflict",
    "UnknownKeyword",
    "UnknownName",
    "UnsafeDocument",
    "Where",
)
