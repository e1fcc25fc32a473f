"""Streams from many nodes, aligned in time, joined, and served."""

from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.stage.context import TaskContext, context

__version__ = "0.1.0"

__all__ = ("Compute", "DataSource", "Materialize", "TaskContext", "__version__", "context")
