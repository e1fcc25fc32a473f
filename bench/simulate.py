"""Replicas of a join in a simulated world: seeded schedules of threads, network, kills, pauses and restarts of the broker.

    python bench/simulate.py                        100,000 schedules on all cores, then each planted bug until it is found
    python bench/simulate.py --schedules 2000       fewer
    python bench/simulate.py --seed 1706            one of them, and what happened in it

The code that runs is the product's, from `Compute` down to the member of a broker's group; what is simulated is the machine (threads,
time, processes) and the broker. Exits 1 when a schedule breaks a promise, or when a planted bug is not found.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.simulation.planted import PLANTED
from tests.simulation.scenario import Verdict, run, search

CHUNK, SAY_EVERY = 250, 5_000
MOST = 20_000
"""Schedules in which a planted bug has to show."""


def some(first: int) -> tuple[int, int, int, int, list[Verdict]]:
    """(schedules, kills, pauses, restarts of the broker, those that failed) of one chunk."""
    seen = list[Verdict]()
    failed = run(range(first, first + CHUNK), each=seen.append)
    faults = [fault.split()[1] for verdict in seen for fault in verdict.faults]
    return len(seen), faults.count("kill"), faults.count("pause"), faults.count("broker"), failed


def found(bug: str) -> tuple[str, int, Verdict | None]:
    """After how many schedules a planted bug shows, and how."""
    return bug, *search(range(MOST), PLANTED[bug])


def main() -> None:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.seed is not None:
        failed = run([arguments.seed], each=print)
        sys.exit(1 if failed else 0)
    began, count, kills, pauses, restarts = time.monotonic(), 0, 0, 0, 0
    wrong = list[Verdict]()
    with mp.get_context("spawn").Pool(arguments.processes) as pool:
        chunks = range(arguments.first, arguments.first + arguments.schedules, CHUNK)
        for done, killed, paused, restarted, failed in pool.imap_unordered(some, chunks):
            count, kills, pauses, restarts, wrong = count + done, kills + killed, pauses + paused, restarts + restarted, wrong + failed
            for verdict in failed:
                print(verdict, flush=True)
            if count % SAY_EVERY == 0:
                print(f"{count:,} of {arguments.schedules:,}: {len(wrong)} failed", file=sys.stderr, flush=True)
        minutes = (time.monotonic() - began) / 60
        print(f"{count:,} schedules, {kills:,} kills, {pauses:,} pauses, {restarts:,} restarts of the broker: {len(wrong)} failed", end="")
        print(f" ({minutes:.1f} min, {count / minutes:,.0f} a minute)", flush=True)
        missed = 0
        for bug, tried, shown in pool.imap_unordered(found, PLANTED):
            missed += shown is None
            print(f"planted: {bug}: " + ("NOT FOUND" if shown is None else f"found after {tried}: {shown.wrong[0][:80]}"), flush=True)
    if wrong or missed:
        sys.exit(f"{len(wrong)} schedules broke a promise, {missed} planted bugs were not found")


if __name__ == "__main__":
    main()
