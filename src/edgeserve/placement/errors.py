"""What can be wrong with a placement problem, and with a plan for it."""

from __future__ import annotations

from edgeserve.core.errors import ConfigurationError, EdgeServeError


class InvalidProblem(ConfigurationError):
    """The problem cannot be placed as it is written; the message says what is wrong, where, and what to do. The root of those below."""


class CyclicGraph(InvalidProblem):
    """Tasks feed each other in a circle; the message lists it."""


class UnknownName(InvalidProblem, LookupError):
    """Something refers to a node, link, stream, task or zone that is not there."""


class DuplicateName(InvalidProblem):
    """Two things of the problem have one name."""


class BadValue(InvalidProblem):
    """A number is negative, not finite, or outside of its range, or a field or an argument has the wrong type."""


class MissingValue(InvalidProblem):
    """A field that has no default is not there."""


class UnsupportedProblemVersion(InvalidProblem):
    """The JSON was written in a version of the format that this installation does not read."""


class InvalidPlan(ConfigurationError):
    """An assignment or a routing that is not one of this problem: a task without a node, an unknown node, an unknown edge."""


class Unplaceable(EdgeServeError, ValueError):
    """No placement keeps within the capacities.

    Attributes:
        capacity: what is short, for example `memory of edge-1`.
        short_by: by how much, in the unit of that capacity (cores, bytes, accelerators, bytes/s, or a count).
        proven: True when no placement can exist; False when the search found none in its time, and `short_by` is of the nearest miss.
    """

    def __init__(self, message: str, *, capacity: str, short_by: float, proven: bool) -> None:
        super().__init__(message)
        self.capacity = capacity
        self.short_by = short_by
        self.proven = proven
