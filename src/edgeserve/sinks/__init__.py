"""Destinations to hand to `Materialize`: files that hold every result once, whatever was killed in between."""

from edgeserve.sinks.jsonlines import JsonLinesSink
from edgeserve.sinks.parquet import ParquetSink

__all__ = ("JsonLinesSink", "ParquetSink")
