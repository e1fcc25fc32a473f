"""Source -> task -> sink on a broker, ours beside the raw client, run by run in turn.

    python bench/engines.py --pulsar pulsar://127.0.0.1:6650 --nats nats://127.0.0.1:4222
    python bench/engines.py --pulsar ... --quick          a quarter of the messages
    python bench/engines.py --pulsar ... --only paced     only how long a message takes

Ours and the raw client (`raw_pulsar.py`, a hand-written pipeline on pulsar-client: asynchronous sends in batches of up to 500, batch
receive, acknowledgement in the send's callback; its `--mode sync` waits for each send) have the same payload, durability, batching and
processes.
Exits 1 when a median falls short of what is promised. A case whose raw client stays under 5,000 messages/s at 100 B or 1 KB is void.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import measure

RAW = Path(__file__).resolve().parents[2] / "shared" / "bench" / "raw_pulsar.py"
SATURATED = ((100, 60_000), (1_000, 40_000), (100_000, 3_000), (1_000_000, 400))
PACED = ((100, 1_000), (1_000, 1_000))
LEAST_RAW = 5_000
LEAST_RATIO, MOST_RATIO = 0.8, 1.1
NATS_LEAST, NATS_MOST_MS = 5_000, 3.0


def raw(script: Path, node: str, mode: str, size: int, messages: int, rate: float) -> dict[str, float]:
    """One run of the raw client, in the words of `measure`."""
    # Its client takes no parameters of ours.
    command = [sys.executable, str(script), "--node", node.partition("?")[0], "--mode", mode, "--size", str(size)]
    done = subprocess.run(
        [*command, "--messages", str(messages), "--rate", str(rate)], capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return {"per_s": found["messages_per_s"], "p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"]}


def spread(runs: list[dict[str, Any]], figure: str) -> tuple[float, float, float]:
    """(least, median, most)."""
    values = [r[figure] for r in runs]
    return min(values), statistics.median(values), max(values)


class Table:
    """What was measured, and what fell short."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.short: list[str] = []
        sys.stdout.write(f"{'engine':8} {'mode':9} {'bytes':>9} {'figure':>8} {'ours (min-max)':>28} {'raw (min-max)':>28} {'ratio':>7}\n")

    def row(self, engine: str, mode: str, size: int, figure: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]] | None) -> float:
        """Prints a line; returns the ratio of the medians."""
        wrong = [r for r in ours if not r["right"]]
        if wrong:
            self.short.append(f"{engine} {mode} {size} B: {len(wrong)} runs received wrong or unordered results")
        digits = 0 if figure == "per_s" else 3
        low, middle, high = spread(ours, figure)
        text = f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"
        ratio, beside = float("nan"), ""
        if theirs is not None:
            low, their_middle, high = spread(theirs, figure)
            ratio = middle / their_middle
            beside = f"{their_middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"
        sys.stdout.write(f"{engine:8} {mode:9} {size:9,} {figure:>8} {text:>28} {beside:>28} {ratio:7.2f}\n")
        sys.stdout.flush()
        self.rows.append({"engine": engine, "mode": mode, "bytes": size, "figure": figure, "ours": ours, "raw": theirs, "ratio": ratio})
        return ratio


def pulsar(node: str, script: Path, runs: int, scale: int, table: Table, only: str | None) -> None:
    """Ours beside the raw client, in turn."""
    for size, messages in SATURATED if only != "paced" else ():
        ours, theirs = [], []
        for _ in range(runs):
            theirs.append(raw(script, node, "batched", size, messages // scale, 0))
            # As long a run: a pipeline that is over before it is warm says little.
            ours.append(measure("pipeline", size, messages * (3 if size <= 1_000 else 1) // scale, 0.0, node))
        ratio = table.row("pulsar", "saturated", size, "per_s", ours, theirs)
        if size <= 1_000 and spread(theirs, "per_s")[1] < LEAST_RAW:
            table.short.append(f"pulsar saturated {size} B: void, the raw client stayed under {LEAST_RAW:,} messages/s")
        elif ratio < LEAST_RATIO:
            table.short.append(f"pulsar saturated {size} B: {ratio:.2f} of the raw client, promised is at least {LEAST_RATIO}")
        if size == 100:
            table.row("pulsar", "vs sync", size, "per_s", ours, [raw(script, node, "sync", size, 3_000 // scale, 0) for _ in range(runs)])
    for size, messages in PACED if only != "saturated" else ():
        ours, theirs = [], []
        for _ in range(runs):
            theirs.append(raw(script, node, "batched", size, messages // scale, 100))
            ours.append(measure("pipeline", size, messages // scale, 100.0, node))
        ratio = table.row("pulsar", "paced", size, "p50_ms", ours, theirs)
        table.row("pulsar", "paced", size, "p99_ms", ours, theirs)
        if ratio > MOST_RATIO:
            table.short.append(f"pulsar paced {size} B: p50 {ratio:.2f} times the raw client's, promised is at most {MOST_RATIO}")


def nats(node: str, runs: int, scale: int, table: Table, only: str | None) -> None:
    """Ours alone."""
    if only != "saturated":
        paced = [measure("pipeline", 100, 500 // scale, 100.0, node) for _ in range(runs)]
        table.row("nats", "paced", 100, "p50_ms", paced, None)
        table.row("nats", "paced", 100, "p99_ms", paced, None)
        if (found := spread(paced, "p50_ms")[1]) > NATS_MOST_MS:
            table.short.append(f"nats paced 100 B: p50 {found:.2f} ms, promised are at most {NATS_MOST_MS}")
    for size, messages in ((100, 100_000), *SATURATED[1:]) if only != "paced" else ():
        fast = [measure("pipeline", size, messages // scale, 0.0, node) for _ in range(runs)]
        table.row("nats", "saturated", size, "per_s", fast, None)
        if size == 100 and (found := spread(fast, "per_s")[1]) < NATS_LEAST:
            table.short.append(f"nats saturated 100 B: {found:,.0f} messages/s, promised are at least {NATS_LEAST:,}")


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pulsar", help="URL of a Pulsar")
    parser.add_argument("--nats", help="URL of a NATS server with JetStream")
    parser.add_argument("--raw", type=Path, default=RAW, help="the raw client's script")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=["saturated", "paced"])
    parser.add_argument("--quick", action="store_true", help="a quarter of the messages")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.pulsar or arguments.nats):
        parser.error("name a broker: --pulsar URL, --nats URL, or both")
    table, scale = Table(), 4 if arguments.quick else 1
    if arguments.pulsar:
        pulsar(arguments.pulsar, arguments.raw, arguments.runs, scale, table, arguments.only)
    if arguments.nats:
        nats(arguments.nats, arguments.runs, scale, table, arguments.only)
    if arguments.json:
        arguments.json.write_text(json.dumps(table.rows, indent=1))
    if table.short:
        sys.exit("\n".join(table.short))


if __name__ == "__main__":
    main()
