"""Streams for a `DataSource` or a loop of your own: recordings at their own pace, logs while they grow, videos, cameras."""

from edgeserve.sources.base import Source
from edgeserve.sources.camera import Camera
from edgeserve.sources.csv_replay import CsvReplay
from edgeserve.sources.json_tail import JsonLinesTail
from edgeserve.sources.parquet_replay import ParquetReplay
from edgeserve.sources.timer import SystemTimer, Timer
from edgeserve.sources.times import time_ns
from edgeserve.sources.video import Video

__all__ = ("Camera", "CsvReplay", "JsonLinesTail", "ParquetReplay", "Source", "SystemTimer", "Timer", "Video", "time_ns")
