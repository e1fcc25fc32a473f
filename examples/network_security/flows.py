"""Packets to flow records: what one tap sends to the join, one micro-batch per window of capture time."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from pcap import ACK, FIN, RST, SYN, CaptureError, packets

SECOND = 1_000_000_000
MAX_GAP_WINDOWS = 100_000


class Flow(msgspec.Struct):
    """What one window shows of one direction of a conversation."""

    src: str
    dst: str
    proto: int
    sport: int
    dport: int
    first_ns: int
    last_ns: int
    packets: int = 0
    bytes: int = 0
    payload_bytes: int = 0
    syn: int = 0
    syn_ack: int = 0
    fin: int = 0
    rst: int = 0
    unreachable: int = 0


class Window(msgspec.Struct):
    """One micro-batch: all flows of [start_ns, start_ns + the window's length). `handed_ns`: wall clock when it left the tap."""

    start_ns: int
    flows: list[Flow] = []
    packets: int = 0
    handed_ns: int = 0


def windows(path: str | Path, window_ns: int = SECOND) -> Iterator[Window]:
    """Yields the windows of a capture in order, empty ones too. They start at multiples of their length, so that two taps' windows
    match. A packet stamped a little earlier than the one before it, as captures have them, counts for the window at hand."""
    start_ns = None
    flows: dict[tuple[object, ...], Flow] = {}
    count = 0
    for packet in packets(path):
        if start_ns is None:
            start_ns = packet.time_ns // window_ns * window_ns
        if packet.time_ns - start_ns > MAX_GAP_WINDOWS * window_ns:
            raise CaptureError(f"{path}: the clock jumps from {start_ns} to {packet.time_ns} ns. Cut the file there: editcap -A / -B")
        while packet.time_ns >= start_ns + window_ns:
            yield Window(start_ns, list(flows.values()), count)
            start_ns, flows, count = start_ns + window_ns, {}, 0
        count += 1
        key = packet[1:6]
        flow = flows.get(key)
        if flow is None:
            flow = flows[key] = Flow(*key, first_ns=packet.time_ns, last_ns=packet.time_ns)
        flow.last_ns = packet.time_ns
        flow.packets += 1
        flow.bytes += packet.bytes
        flow.payload_bytes += packet.payload_bytes
        flow.syn += packet.flags & (SYN | ACK) == SYN
        flow.syn_ack += packet.flags & (SYN | ACK) == SYN | ACK
        flow.fin += packet.flags & FIN != 0
        flow.rst += packet.flags & RST != 0
        flow.unreachable += packet.unreachable
    if start_ns is not None:
        yield Window(start_ns, list(flows.values()), count)


def replay(path: str | Path, speed: float, window_ns: int = SECOND) -> Iterator[Window]:
    """The windows of a capture at the pace at which they were recorded, times `speed` (0: as fast as they can be read)."""
    begin = time.monotonic_ns()
    first_ns = None
    for window in windows(path, window_ns):
        first_ns = window.start_ns if first_ns is None else first_ns
        if speed:
            due_ns = begin + (window.start_ns + window_ns - first_ns) / speed
            time.sleep(max(0.0, (due_ns - time.monotonic_ns()) / SECOND))
        window.handed_ns = time.time_ns()
        yield window
