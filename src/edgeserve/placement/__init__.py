"""Placement: where tasks run and how streams travel, computed, priced and proven. Pure: no I/O, and the clock is a parameter."""

from edgeserve.placement.errors import (
    BadValue,
    CyclicGraph,
    DuplicateName,
    InvalidPlan,
    InvalidProblem,
    MissingValue,
    UnknownName,
    Unplaceable,
    UnsupportedProblemVersion,
)
from edgeserve.placement.evaluation import Evaluation, Load, Violation, evaluate
from edgeserve.placement.mixed import milp
from edgeserve.placement.plan import Plan, Reason
from edgeserve.placement.problem import FORMAT_VERSION, Link, Node, Problem, Route, Sink, Source, Task, Weights
from edgeserve.placement.simulation import Simulation, simulate
from edgeserve.placement.solver import greedy, local_search, solve

__all__ = (
    "FORMAT_VERSION",
    "BadValue",
    "CyclicGraph",
    "DuplicateName",
    "Evaluation",
    "InvalidPlan",
    "InvalidProblem",
    "Link",
    "Load",
    "MissingValue",
    "Node",
    "Plan",
    "Problem",
    "Reason",
    "Route",
    "Simulation",
    "Sink",
    "Source",
    "Task",
    "UnknownName",
    "Unplaceable",
    "UnsupportedProblemVersion",
    "Violation",
    "Weights",
    "evaluate",
    "greedy",
    "local_search",
    "milp",
    "simulate",
    "solve",
)
