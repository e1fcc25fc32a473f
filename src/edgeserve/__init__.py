"""Streams from many nodes, aligned in time, joined, and served."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeserve.compute import Compute
    from edgeserve.core.external import External
    from edgeserve.data_source import DataSource
    from edgeserve.materialize import Materialize
    from edgeserve.stage.context import TaskContext, context

__version__ = "0.1.0"

__all__ = ("Compute", "DataSource", "External", "Materialize", "TaskContext", "__version__", "context")

_HOMES = {
    "Compute": "edgeserve.compute",
    "DataSource": "edgeserve.data_source",
    "External": "edgeserve.core.external",
    "Materialize": "edgeserve.materialize",
    "TaskContext": "edgeserve.stage.context",
    "context": "edgeserve.stage.context",
}


def __getattr__(name: str) -> Any:
    """Imports a noun when it is first asked for: the command line comes through here, and must hear Ctrl-C from its start on."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value
