"""Streams from files, for a `DataSource` or a loop of your own: recordings replayed at their own pace, logs followed while they grow."""

from edgeserve.sources.base import Source
from edgeserve.sources.csv_replay import CsvReplay
from edgeserve.sources.json_tail import JsonLinesTail
from edgeserve.sources.parquet_replay import ParquetReplay
from edgeserve.sources.timer import SystemTimer, Timer
from edgeserve.sources.times import time_ns

__all__ = ("CsvReplay", "JsonLinesTail", "ParquetReplay", "Source", "SystemTimer", "Timer", "time_ns")
