"""A pipeline declared in one place, in Python or in YAML: `Pipeline` derives topics, groups and processes, and checks them."""

from edgeserve.pipeline.document import load_yaml, schema
from edgeserve.pipeline.errors import (
    BadReference,
    BadValue,
    CyclicPipeline,
    DuplicateName,
    InvalidDocument,
    InvalidPipeline,
    MissingValue,
    TypeConflict,
    UnknownKeyword,
    UnknownName,
    UnsafeDocument,
    Where,
)
from edgeserve.pipeline.graph import Graph, Part
from edgeserve.pipeline.pipeline import Pipeline

__all__ = (
    "BadReference",
    "BadValue",
    "CyclicPipeline",
    "DuplicateName",
    "Graph",
    "InvalidDocument",
    "InvalidPipeline",
    "MissingValue",
    "Part",
    "Pipeline",
    "TypeConflict",
    "UnknownKeyword",
    "UnknownName",
    "UnsafeDocument",
    "Where",
    "load_yaml",
    "schema",
)
