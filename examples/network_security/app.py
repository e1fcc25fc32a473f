"""A pipeline of four nodes: two taps replay captures, a joint task decides window by window, a destination writes the alerts down.

    edgeserve run --until-end examples/network_security/app.py

Each node gets its own process. What they need to know is in the environment:
    EDGESERVE_NODE   where messages go (default local://)
    TAP_A, TAP_B     captures of what clients ask and what servers answer (default: the `judge` recording)
    SPEED            how many times faster than recorded; 0: as fast as possible (default 1)
    RUN              ends the names of the topics (default: nothing)
    OUT              directory for alerts.jsonl, verdicts.jsonl and sent-tap_*.txt (default: the current one)

Windows are known by their start, so a source that dies and starts over doubles nothing. For the same reason a second run over the same
captures adds nothing; to see it again, name another store: EDGESERVE_NODE=local://$PWD/again
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from detect import Alert, Evidence, judge
from flows import Window, replay
from score import load_thresholds

from edgeserve.pipeline import Pipeline

RECORDING = Path(__file__).resolve().parent / "data" / "judge"
TAP_A = os.environ.get("TAP_A") or str(RECORDING / "tap_a.pcap.zst")
TAP_B = os.environ.get("TAP_B") or str(RECORDING / "tap_b.pcap.zst")
SPEED = float(os.environ.get("SPEED") or 1)
OUT = Path(os.environ.get("OUT") or ".")
RUN = os.environ.get("RUN") or ""
FLOWS, ALERTS = f"flows{RUN}", f"alerts{RUN}"


class Verdict(msgspec.Struct):
    """What the joint task says about one window, alerts or none. `handed_ns`: when the later of its two halves left its tap."""

    start_ns: int
    handed_ns: int
    packets: int
    flows: int
    alerts: list[Alert]


class Detector:
    """The joint task. Both taps' windows of the same second come together; what they add up to is kept from window to window."""

    def setup(self) -> None:
        self.evidence = Evidence()
        self.thresholds = load_thresholds("both taps")
        self.before_ns = 0

    def __call__(self, tap_a: Window, tap_b: Window) -> Verdict:
        counts = self.evidence.observe(tap_a.flows, tap_b.flows)
        alerts = judge(self.before_ns, counts, self.thresholds)
        self.before_ns = tap_a.start_ns
        handed_ns = max(tap_a.handed_ns, tap_b.handed_ns)
        return Verdict(tap_a.start_ns, handed_ns, tap_a.packets + tap_b.packets, len(tap_a.flows) + len(tap_b.flows), alerts)


def sent(path: str, name: str) -> Iterator[Window]:
    """Replays a capture and notes which windows were handed over, so that anyone can check that none was lost."""
    with (OUT / f"sent-{name}.txt").open("w", buffering=1) as note:
        for window in replay(path, SPEED):
            note.write(f"{window.start_ns}\n")
            yield window


def write_down(verdict: Verdict) -> None:
    """Appends the window's alerts to alerts.jsonl, and the window with the time at which this was done to verdicts.jsonl."""
    with (OUT / "alerts.jsonl").open("ab") as file:
        file.writelines(msgspec.json.encode(alert) + b"\n" for alert in verdict.alerts)
    done = {"start_ns": verdict.start_ns, "packets": verdict.packets, "flows": verdict.flows, "handed_ns": verdict.handed_ns}
    with (OUT / "verdicts.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(done | {"done_ns": time.time_ns()}) + b"\n")


def window_start(window: Window) -> int:
    return window.start_ns


app = Pipeline("network_security")
for name, path in (("tap_a", TAP_A), ("tap_b", TAP_B)):
    args = {"path": path, "name": name}
    app.add_source(name, sent, args=args, topic=FLOWS, event_time=window_start, message_id=window_start)
app.add_task("detector", Detector, join="exact", topic_out=ALERTS)
app.add_sink("sink", write_down, of="detector")
