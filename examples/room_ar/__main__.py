"""A ball in a room, seen by three cameras and felt by a motion sensor: one track of it, and how far that is from the truth.

    python examples/room_ar                          # records the room if need be, runs the pipeline, reports; exit 1 if it is not good
    python examples/room_ar --live                   # with the room from above in the terminal
    python examples/room_ar --node nats://HOST:4222 --routing eager --join latest
    python examples/room_ar camera0 --node nats://HOST:4222 --room DIR   # one process of a run over several hosts
    python examples/room_ar report --room DIR --out OUT                  # how good that was

It is good when the median error is at most 5 cm, and there are at least 2 results a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from view import fixes, report, watch

from room import record, summary

MOST_CM, LEAST_HZ = 5.0, 2.0
SECONDS = 20.0
APP = Path(__file__).resolve().with_name("app.py")


def positive(text: str) -> float:
    """A number of at least a hundredth; anything else is the command line's error."""
    number = float(text)
    if not 0.01 <= number < 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0.01 to 100000")
    return number


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="room_ar", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "run (default), record, report, or a process of the pipeline, which runs until its sources have ended"
    parser.add_argument("what", nargs="?", default="run", help=what)
    parser.add_argument("--node", help="where messages go (default: local://, in a store of this run's own)")
    parser.add_argument("--room", type=Path, help="the recording; made if it is not there (default: a new one)")
    parser.add_argument("--out", type=Path, help="where results go (default: they are thrown away, but for the report)")
    parser.add_argument("--seconds", type=positive, help="how long a recording is made, at least one picture (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the recording's noise (default: 1)")
    parser.add_argument("--speed", type=positive, default=1.0, help="how many times faster than recorded (default: 1)")
    parser.add_argument("--routing", choices=("eager", "lazy", "auto"), default="lazy", help="of pictures (default: lazy)")
    parser.add_argument("--join", choices=("exact", "latest"), default="exact", help="of what the cameras see (default: exact)")
    parser.add_argument("--run", default="", help="ends the names of the topics")
    parser.add_argument("--at", type=float, default=0.0, help="when the sources begin, seconds since the epoch (default: at once)")
    parser.add_argument("--live", action="store_true", help="the room from above, in the terminal")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser.parse_args()


def settings(a: argparse.Namespace) -> dict[str, str]:
    """What `app.py` takes from the environment."""
    return {name.upper(): str(getattr(a, name)) for name in ("room", "out", "speed", "routing", "join", "run", "at")}


def one(a: argparse.Namespace) -> None:
    """Runs one process of the pipeline to its end."""
    if a.room is None or a.node is None:
        sys.exit(f"{a.what}: give --node and --room")
    a.out = a.out or Path(".")
    os.environ.update(settings(a))
    from app import app

    if a.what not in (known := app.look(a.node)):
        sys.exit(f"there is no process {a.what!r}: there is {', '.join(known)}")
    with app.node(a.what, a.node) as node:
        node.run(until="end")


def every(a: argparse.Namespace) -> None:
    """Runs the pipeline on this machine, over a recording that is made if it is not there."""
    if (a.out / "track.jsonl").exists():
        raise SystemExit(f"--out: {a.out} holds a track already: name another")
    if not (a.room / "truth.csv").exists():
        seconds = a.seconds or SECONDS
        if not a.json:
            print(f"recording {seconds:g} s of the room")
        record(a.room, seconds, a.seed)
    elif a.seconds is not None:
        raise SystemExit(f"--seconds: {a.room} holds a recording already: leave --seconds out, or name another --room")
    # A broker, and a store that others use, may know earlier runs.
    a.run = a.run or f"-{time.time_ns()}"
    env = os.environ | settings(a) | {"EDGESERVE_STATE_DIR": str(a.out / "state")}
    command = [sys.executable, "-P", "-c", "from edgeserve.cli import main; main()"]
    command += ["run", "--until-end", "--node", a.node or f"local://{a.out}/store", str(APP)]
    # A session of its own: Ctrl-C reaches this program, which ends the others in order.
    process = subprocess.Popen(command, env=env, stdout=sys.stderr, start_new_session=True)
    try:
        if a.live:
            watch(a.room, a.out, lambda: process.poll() is None)
        if process.wait():
            raise SystemExit("a stage has failed: what it said is above")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def main() -> None:
    """Does what the command line says."""
    a = arguments()
    if a.what == "record":
        record(a.room or Path("."), a.seconds or SECONDS, a.seed)
        return
    if a.what not in ("run", "report"):
        one(a)
        return
    if a.what == "report" and None in (a.room, a.out):
        sys.exit("report: give --room and --out")
    with tempfile.TemporaryDirectory(prefix="room-ar-") as scratch:
        kept = a.out
        a.out = (a.out or Path(scratch)).resolve()
        a.out.mkdir(parents=True, exist_ok=True)
        a.room = (a.room or a.out / "room").resolve()
        if a.what == "run":
            every(a)
        elif a.live:
            with contextlib.suppress(KeyboardInterrupt):
                watch(a.room, a.out, lambda: len(fixes(a.out)) < summary(a.room)["asked"])
        figures = report(a.room, a.out)
    good = figures["results"] > 0 and figures["median_cm"] <= MOST_CM and figures["hz"] >= LEAST_HZ
    if a.json:
        print(json.dumps(figures | {"good": good}))
    else:
        print(f"{figures['results']} results of {figures['asked']}, {figures['hz']:.2f} a second")
        print(f"median track error {figures['median_cm']} cm, 95 of 100 within {figures['p95_cm']} cm")
        if kept:
            print(f"in {kept}: track.jsonl, track.mp4, report.json")
        if not good:
            print(f"that is not good: at most {MOST_CM:g} cm and at least {LEAST_HZ:g} a second are")
    sys.exit(not good)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
