"""Truth, scores and the choice of thresholds.

The unit that is judged is (client, server, block of 10 s). It counts as attacked when a probe of a scan fell into the block, as alerted
when the detector raised an alert for a window of the block. Precision, recall and F1 follow from the two sets.

    python examples/network_security/score.py           # scores on both recordings with thresholds.json
    python examples/network_security/score.py --choose  # chooses thresholds.json anew, on the train recording only
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from detect import Alert, Counter, Evidence, Pair, judge
from flows import SECOND, Window, windows

HERE = Path(__file__).resolve().parent
THRESHOLDS = HERE / "thresholds.json"
BLOCK_NS = 10 * SECOND
LEAST_GAIN = 0.01
"""What another threshold has to add to F1 on the train recording: less is chance."""
VIEWS = {"both taps": ("a", "b"), "tap A alone": ("a",), "tap B alone": ("b",)}
"""What each detector is fed with. They are the same code; only the other half of the evidence is missing."""

Unit = tuple[str, str, int]


class Score(NamedTuple):
    precision: float
    recall: float
    f1: float


class Row(NamedTuple):
    """The counters of one pair for one window."""

    start_ns: int
    pair: Pair
    counts: dict[Counter, int]


def truth(recording: Path) -> set[Unit]:
    """The attacked units of a recording."""
    attacked = set()
    for attack in json.loads((recording / "truth.json").read_text())["attacks"]:
        for block in range(attack["start_ns"] // BLOCK_NS, attack["end_ns"] // BLOCK_NS + 1):
            attacked.add((attack["src"], attack["dst"], block))
    return attacked


def alerted(alerts: Iterable[Alert]) -> set[Unit]:
    """The units that a detector raised alerts for."""
    return {(alert.src, alert.dst, alert.start_ns // BLOCK_NS) for alert in alerts}


def score(found: set[Unit], attacked: set[Unit]) -> Score:
    """Precision, recall and F1; all 0 when nothing was found."""
    right = len(found & attacked)
    if not right:
        return Score(0.0, 0.0, 0.0)
    return Score(right / len(found), right / len(attacked), 2 * right / (len(found) + len(attacked)))


def evidence(tap_a: Iterable[Window], tap_b: Iterable[Window], view: tuple[str, ...] = ("a", "b")) -> Iterator[Row]:
    """Runs the detector's counters over two captures, or with one of them left out."""
    state = Evidence()
    before_ns = 0
    for a, b in zip(tap_a, tap_b, strict=True):
        for pair, counts in state.observe(a.flows if "a" in view else (), b.flows if "b" in view else ()).items():
            yield Row(before_ns, pair, counts)
        before_ns = a.start_ns


def load_thresholds(view: str) -> dict[Counter, int]:
    """The thresholds of one view as chosen on the train recording."""
    return {(rule["kind"], rule["horizon"]): rule["at_least"] for rule in json.loads(THRESHOLDS.read_text())[view]}


def choose(rows: list[Row], attacked: set[Unit]) -> dict[Counter, int]:
    """Chooses the thresholds with the best F1, step by step: of all counters and thresholds the one is set that gains most together with
    those already set, until none gains. Of equally good thresholds it takes the middle one, furthest from a mistake."""
    units = sorted({(*row.pair, row.start_ns // BLOCK_NS) for row in rows})
    number = {unit: n for n, unit in enumerate(units)}
    unit_of_row = np.array([number[*row.pair, row.start_ns // BLOCK_NS] for row in rows])
    is_attack = np.array([unit in attacked for unit in units])
    highest: dict[Counter, np.ndarray] = {}
    for counter in sorted({counter for row in rows for counter in row.counts}):
        highest[counter] = np.zeros(len(units), int)
        np.maximum.at(highest[counter], unit_of_row, [row.counts.get(counter, 0) for row in rows])
    chosen: dict[Counter, int] = {}
    best = 0.0
    while True:
        before = best
        for counter, counted in highest.items():
            others = np.zeros(len(units), bool)
            for other, at_least in chosen.items():
                others |= (other != counter) & (highest[other] >= at_least)
            found = others | (counted >= np.arange(1, counted.max() + 2)[:, None])
            f1 = 2 * (found & is_attack).sum(1) / (found.sum(1) + len(attacked))
            if f1.max() > max(best, before + LEAST_GAIN):
                best, plateau = f1.max(), np.flatnonzero(f1 > f1.max() - 1e-9) + 1
                step = counter, int(plateau[np.argmax(np.diff(plateau, append=0) != 1) // 2])
        if best == before:
            return chosen
        chosen[step[0]] = step[1]


def judged(rows: Iterable[Row], thresholds: Mapping[Counter, int]) -> list[Alert]:
    """All alerts of a run."""
    return [alert for row in rows for alert in judge(row.start_ns, {row.pair: row.counts}, thresholds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="choose the thresholds anew and write thresholds.json")
    args = parser.parse_args()
    chosen = {}
    for recording in (HERE / "data" / "train", HERE / "data" / "judge"):
        tap_a, tap_b = (list(windows(recording / f"tap_{tap}.pcap.zst")) for tap in "ab")
        attacked = truth(recording)
        print(f"{recording.name}: {len(attacked)} attacked units")
        for view, fed in VIEWS.items():
            rows = list(evidence(tap_a, tap_b, fed))
            if args.choose and recording.name == "train":
                chosen[view] = choose(rows, attacked)
            thresholds = chosen[view] if args.choose else load_thresholds(view)
            result = score(alerted(judged(rows, thresholds)), attacked)
            print(f"  {view:12} precision {result.precision:.2f}  recall {result.recall:.2f}  F1 {result.f1:.2f}")
    if args.choose:
        rules = {view: [{"kind": k, "horizon": h, "at_least": n} for (k, h), n in c.items()] for view, c in chosen.items()}
        THRESHOLDS.write_text(json.dumps(rules, indent=1) + "\n")


if __name__ == "__main__":
    main()
