"""A join of two sources on local://, this checkout beside another commit, run by run in turn.

    python bench/beside.py 736377a^            five runs each; exit 1 when a lone replica is slower than promised
    python bench/beside.py COMMIT --runs 9

Each side runs its own `bench/pipeline.py` with its own code, 100 B, saturated and paced, in a worktree of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
MOST_LATENCY, LEAST_RATE = 1.15, 0.85


def measure(tree: Path, file: Path) -> dict[str, dict[str, Any]]:
    """One run of both cases: by mode, what was measured."""
    command = [sys.executable, str(tree / "bench" / "pipeline.py"), "--check", "--runs", "1", "--only", "join", "--json", str(file)]
    # Its status says whether the promises of its time hold; here only the figures count.
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree / "src")}, capture_output=True, timeout=300, check=False)
    return {row["mode"]: row["runs"][0] for row in json.loads(file.read_text())}


def main() -> None:
    """Runs both in turn and compares the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeserve-beside-") as directory:
        other, file = Path(directory) / "tree", Path(directory) / "figures.json"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), given.commit], check=True, capture_output=True)
        try:
            found: dict[Path, list[dict[str, dict[str, Any]]]] = {HERE: [], other: []}
            for _ in range(given.runs):
                for tree, runs in found.items():
                    runs.append(measure(tree, file))
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True, capture_output=True)
    wrong = []
    for mode, figure, bound in (("saturated", "per_s", LEAST_RATE), ("paced", "p50_ms", MOST_LATENCY)):
        ours, theirs = ([run[mode][figure] for run in found[tree]] for tree in (HERE, other))
        ratio = statistics.median(ours) / statistics.median(theirs)
        shown = [f"{statistics.median(side):,.3f} ({min(side):,.3f}-{max(side):,.3f})" for side in (ours, theirs)]
        sys.stdout.write(f"join {mode:9} {figure:6} here {shown[0]:>34}   {given.commit} {shown[1]:>34}   {ratio:.2f}\n")
        if (ratio < bound) if figure == "per_s" else (ratio > bound):
            wrong.append(f"join {mode}: {figure} is {ratio:.2f} of {given.commit}'s, promised is {bound}")
    if not all(run["saturated"]["right"] for run in found[HERE]):
        wrong.append("a run received wrong or unordered results")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
