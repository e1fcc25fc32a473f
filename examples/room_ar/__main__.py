"""A ball in a room, seen by three cameras and felt by a motion sensor: one track of it, and how far that is from the truth.

    python examples/room_ar                          # records the room if need be, runs every stage, reports; exit 1 if it is not good
    python examples/room_ar --live                   # with the room from above in the terminal
    python examples/room_ar --node nats://HOST:4222 --routing eager --join latest
    python examples/room_ar camera --index 0 --node nats://HOST:4222 --room DIR   # one stage of a run over several hosts

It is good when the median error is at most 5 cm, and there are at least 2 results a second.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import stages

from room import CAMERAS, record

MOST_CM, LEAST_HZ = 5.0, 2.0
SECONDS = 20.0
STAGES = ("camera", "imu", "detect", "track", "sink")
_BEFORE_S = 3.0
"""How long consumers have to start, before the sources do."""


def positive(text: str) -> float:
    """A number of at least a hundredth; anything else is the command line's error."""
    number = float(text)
    if not 0.01 <= number < 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.01 to 100000")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="room_ar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=("run", "record", *STAGES), default="run", help="what to do (default: all)")
    parser.add_argument("--node", help="where messages go (default: local://, in a store of this run's own)")
    parser.add_argument("--room", type=Path, help="the recording; made if it is not there (default: a new one)")
    parser.add_argument("--out", type=Path, help="where results go (default: they are thrown away, but for the report)")
    parser.add_argument("--seconds", type=positive, help="how long a recording is made, at least one picture (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the recording's noise (default: 1)")
    parser.add_argument("--speed", type=positive, default=1.0, help="how many times faster than recorded (default: 1)")
    parser.add_argument("--routing", choices=("eager", "lazy"), default="lazy", help="of pictures (default: lazy)")
    parser.add_argument("--join", choices=("exact", "latest"), default="exact", help="of what the cameras see (default: exact)")
    parser.add_argument("--index", type=int, choices=range(CAMERAS), default=0, help="which camera, of `camera` and `detect`")
    parser.add_argument("--run", default="", help="ends the names of the topics")
    parser.add_argument("--at", type=float, default=0.0, help="when the sources begin, seconds since the epoch (default: at once)")
    parser.add_argument("--live", action="store_true", help="the room from above, in the terminal")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser.parse_args()


def one(a: argparse.Namespace) -> None:
    """Runs one stage to its end."""
    if a.room is None or a.node is None:
        sys.exit(f"{a.stage}: give --node and --room")
    setting = stages.Setting(a.node, a.room, a.routing, a.join, a.speed, a.run, a.at)
    if a.stage == "camera":
        stages.camera(setting, a.index)
    elif a.stage == "imu":
        stages.imu(setting)
    elif a.stage == "detect":
        stages.detecting(setting, a.index)
    elif a.stage == "track":
        stages.tracking(setting)
    else:
        stages.sinking(setting, a.out or Path("."), live=a.live)


def every(a: argparse.Namespace, room: Path, out: Path) -> dict[str, Any]:
    """Runs all stages as processes on this machine; the report."""
    if (room / "truth.csv").exists():
        if a.seconds is not None:
            raise SystemExit(f"--seconds: {room} holds a recording already: leave --seconds out, or name another --room")
    else:
        seconds = a.seconds or SECONDS
        if not a.json:
            print(f"recording {seconds:g} s of the room")
        record(room, seconds, a.seed)
    # A broker, and a store that others use, may know earlier runs.
    node, run = (f"local://{out}/store", "") if a.node is None else (a.node, f"-{time.time_ns()}")
    command = [sys.executable, str(Path(__file__).resolve().parent), "--node", node, "--room", str(room), "--out", str(out), "--run", run]
    command += ["--routing", a.routing, "--join", a.join, "--speed", str(a.speed), *(["--live"] if a.live else [])]
    command += ["--at", str(time.time() + _BEFORE_S)]
    env = os.environ | {"EDGESERVE_STATE_DIR": str(out / "state")}
    wanted = [("sink",), ("track",), *(("detect", "--index", str(n)) for n in range(CAMERAS))]
    wanted += [*(("camera", "--index", str(n)) for n in range(CAMERAS)), ("imu",)]
    processes = [subprocess.Popen([*command, *each], env=env) for each in wanted]
    try:
        while None in [each.poll() for each in processes]:
            if any(each.returncode for each in processes):
                raise SystemExit("a stage has failed: what it said is above")
            time.sleep(0.1)
    finally:
        for each in processes:
            if each.poll() is None:
                each.send_signal(signal.SIGTERM)
        for each in processes:
            each.wait(30)
    if any(each.returncode for each in processes):
        raise SystemExit("a stage has failed: what it said is above")
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def main() -> None:
    """Does what the command line says."""
    a = arguments()
    if a.stage == "record":
        record(a.room or Path("."), a.seconds or SECONDS, a.seed)
        return
    if a.stage != "run":
        one(a)
        return
    with tempfile.TemporaryDirectory(prefix="room-ar-") as scratch:
        out = (a.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        report = every(a, (a.room or out / "room").resolve(), out)
    good = report["results"] > 0 and report["median_cm"] <= MOST_CM and report["hz"] >= LEAST_HZ
    if a.json:
        print(json.dumps(report | {"good": good}))
    else:
        print(f"{report['results']} results of {report['asked']}, {report['hz']:.2f} a second")
        print(f"median track error {report['median_cm']} cm, 95 of 100 within {report['p95_cm']} cm")
        if a.out:
            print(f"in {out}: track.jsonl, track.mp4, report.json")
        if not good:
            print(f"that is not good: at most {MOST_CM:g} cm and at least {LEAST_HZ:g} a second are")
    sys.exit(not good)


if __name__ == "__main__":
    main()
