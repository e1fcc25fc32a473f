"""Runs the example as four processes on this machine, shows its progress, and says how good the joint decision is and what it cost.

    make demo                                   # the recordings that come with this example, 15 times faster than recorded
    edgeserve demo --speed 0                 # as fast as this machine can
    edgeserve demo --node nats://127.0.0.1:4222   # over a broker
    edgeserve demo --tap-a A.pcap --tap-b B.pcap --out somewhere

Ends with status 1 when a window was lost, or when two taps were not clearly better than one. On a node that was named, by --node or by
EDGESERVE_NODE, the run's topics are removed in the end, unless there is an --out for what is to be kept.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import score
from detect import Alert
from flows import windows
from pcap import CaptureError, packets
from rich.console import Console
from rich.live import Live
from rich.table import Table

from edgeserve.cli.options import with_deadline
from edgeserve.core.errors import ConfigurationError, EdgeServeError
from edgeserve.transport import connect, disconnect
from edgeserve.transport.local.engine import directory_of
from edgeserve.transport.url import parse

HERE = Path(__file__).resolve().parent
JUDGE = HERE / "data" / "judge"
ADVANTAGE = 0.2
"""How much better in F1 the joint decision has to be than that of either tap."""

RATES = {"windows_per_s": "windows", "flows_per_s": "flow records", "packets_per_s": "packets"}


class Files:
    """What the functions of `app.py` have written so far."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def lines(self, name: str) -> list[str]:
        """The complete lines of one file."""
        path = self.out / name
        return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []

    def sent(self, tap: str) -> set[int]:
        return {int(line) for line in self.lines(f"sent-{tap}.txt")}

    def verdicts(self) -> list[dict[str, int]]:
        return [json.loads(line) for line in self.lines("verdicts.jsonl")]

    def alerts(self) -> list[Alert]:
        return [msgspec.json.decode(line, type=Alert) for line in self.lines("alerts.jsonl")]


class Place:
    """Where the messages go: a node that was named, on topics of this run's own, or else a store in `out`."""

    def __init__(self, node: str | None, out: Path) -> None:
        self.named = node is not None
        self.node = node or f"local://{out}/store"
        # A broker, and a store that others use, may know earlier runs.
        self.run = f"-{time.time_ns()}" if self.named else ""

    def topics(self, *, remove: bool) -> list[str]:
        """The topics of this run that are there, and stay there."""
        mine = (f"flows{self.run}", f"alerts{self.run}")
        transport = connect(with_deadline(self.node))
        try:
            while remove and (some := [topic for topic in transport.topics() if topic.startswith(mine)]):
                transport.delete_topic(some[0])
            return [topic for topic in transport.topics() if topic.startswith(mine)]
        finally:
            disconnect(transport)


def leave(place: Place, *, keep: bool) -> list[str]:
    """Removes what a run has left on a node that was named, unless they are to be kept; returns what stays."""
    if not place.named:
        return []
    try:
        return place.topics(remove=not keep)
    except (EdgeServeError, OSError) as error:
        sys.stderr.write(f"demo.py: the topics of this run, flows{place.run}..., may still be there: {error}\n")
        return []


def start(tap_a: Path, tap_b: Path, speed: float, out: Path, place: Place) -> subprocess.Popen[bytes]:
    """Starts `edgeserve run app.py`: the four nodes, each its own process."""
    settings = {"TAP_A": str(tap_a.resolve()), "TAP_B": str(tap_b.resolve()), "SPEED": str(speed), "OUT": str(out)}
    settings |= {"EDGESERVE_NODE": place.node, "EDGESERVE_STATE_DIR": str(out / "state"), "RUN": place.run}
    command = [sys.executable, "-P", "-c", "from edgeserve.cli import main; main()", "run", "--until-end", str(HERE / "app.py")]
    with (out / "run.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches this program, which ends the others in order.
        return subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=15)


class Progress:
    """What a person sees meanwhile: a live table on a terminal, a plain line every two seconds elsewhere, nothing with `--json`."""

    def __init__(self, console: Console, files: Files, quiet: bool) -> None:
        self.console, self.files, self.quiet = console, files, quiet
        self.begin = self.last_line = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[Live | None]:
        if self.quiet or not self.console.is_terminal:
            yield None
            return
        with Live(self._table(), console=self.console, transient=True, refresh_per_second=8) as live:
            yield live

    def update(self, live: Live | None) -> None:
        if live:
            live.update(self._table())
        elif not self.quiet and time.monotonic() - self.last_line >= 2:
            self.last_line = time.monotonic()
            counts = ", ".join(f"{what} {count}" for what, count in self._counts().items())
            self.console.print(f"{self.last_line - self.begin:5.1f} s   {counts}", soft_wrap=True)

    def _counts(self) -> dict[str, int]:
        sent = {f"windows of {tap[:3]} {tap[-1].upper()}": len(self.files.lines(f"sent-{tap}.txt")) for tap in ("tap_a", "tap_b")}
        return sent | {"joined and judged": len(self.files.lines("verdicts.jsonl")), "alerts": len(self.files.lines("alerts.jsonl"))}

    def _table(self) -> Table:
        table = Table(title=f"two taps, one decision: {time.monotonic() - self.begin:.0f} s", title_justify="left", show_header=False)
        for what, count in self._counts().items():
            table.add_row(what, f"{count:,}")
        newest: dict[tuple[str, str], Alert] = {(a.src, a.dst): a for a in self.files.alerts()[-60:]}
        for alert in list(newest.values())[-5:]:
            table.add_row("[red]scan", f"{alert.src} -> {alert.dst}: {alert.ports} ports in {alert.horizon} s ({alert.why})")
        return table


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(files: Files) -> dict[str, Any]:
    """Rates, latency, and whether every window that both taps sent was judged exactly once."""
    verdicts, both = files.verdicts(), files.sent("tap_a") & files.sent("tap_b")
    judged = [verdict["start_ns"] for verdict in verdicts]
    report: dict[str, Any] = {"windows_sent": len(both), "windows_judged": len(judged)}
    report |= {"lost": len(both - set(judged)), "doubled": len(judged) - len(set(judged)), "alerts": len(files.alerts())}
    if verdicts:
        seconds = (max(v["done_ns"] for v in verdicts) - min(v["handed_ns"] for v in verdicts)) / 1e9
        late_ms = [(v["done_ns"] - v["handed_ns"]) / 1e6 for v in verdicts]
        report |= {"seconds": seconds, "windows_per_s": len(judged) / seconds}
        report |= {f"{what}_per_s": sum(v[what] for v in verdicts) / seconds for what in ("flows", "packets")}
        report |= {"latency_p50_ms": percentile(late_ms, 0.5), "latency_p99_ms": percentile(late_ms, 0.99)}
    return report


def score_single_taps() -> dict[str, score.Score]:
    """Each tap alone: the same detector on the same recording without the other tap, with thresholds chosen for it."""
    tap_a, tap_b = (list(windows(JUDGE / f"tap_{tap}.pcap.zst")) for tap in "ab")
    results = {}
    for view, fed in list(score.VIEWS.items())[1:]:
        found = score.alerted(score.judged(score.evidence(tap_a, tap_b, fed), score.load_thresholds(view)))
        results[view] = score.score(found, score.truth(JUDGE))
    return results


def show(console: Console, report: dict[str, Any]) -> None:
    """The report for people."""
    print_line = console.print
    print_line(f"node       {report['node']}", soft_wrap=True)
    print_line(f"{report['windows_judged']} of {report['windows_sent']} windows joined and judged, {report['lost']} lost, ", end="")
    print_line(f"{report['doubled']} doubled, {report['alerts']} alerts")
    if "seconds" in report:
        rates = ", ".join(f"{report[key]:,.0f} {what}/s" for key, what in RATES.items())
        print_line(f"rates      {rates}, over {report['seconds']:.1f} s")
        print_line(f"latency    hand-over to alert file p50 {report['latency_p50_ms']:.1f} ms, p99 {report['latency_p99_ms']:.1f} ms")
    if "scores" in report:
        print_line(f"\n{'which host scans which, in blocks of 10 s':42} precision  recall    F1")
        for view, result in report["scores"].items():
            print_line(f"{view:42} {result['precision']:9.2f} {result['recall']:7.2f} {result['f1']:5.2f}")
    if report["topics_left"]:
        print_line(f"\nleft there, because of --out: {', '.join(report['topics_left'])}; to remove them", soft_wrap=True)
        print_line(f"  {shlex.join(['edgeserve', 'topic', 'delete', *report['topics_left'], '--node', report['node']])}", soft_wrap=True)
    print_line("\ntry next")
    for command in report["try_next"]:
        print_line(f"  {command}", soft_wrap=True)


def next_commands() -> list[str]:
    program = Path(sys.executable).with_name("edgeserve")
    edgeserve = os.path.relpath(program) if program.exists() else "edgeserve"
    return [
        f"{edgeserve} demo --speed 0",
        f"{edgeserve} demo --tap-a REQUESTS.pcap --tap-b REPLIES.pcap",
        f"{edgeserve} demo --out demo-out && {edgeserve} topic list --node local://$PWD/demo-out/store",
    ]


def for_processes(node: str) -> str:
    """The node as other processes find it, whatever state directory they have."""
    url = parse(node)
    if url.scheme == "memory":
        raise ConfigurationError(f"{node} is the memory of one process, and the demo is four: name another node")
    return node.replace(f"local://{url.path}", f"local://{directory_of(url)}", 1) if url.scheme == "local" else node


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tap-a", type=Path, default=JUDGE / "tap_a.pcap.zst", help="capture of what clients ask")
    parser.add_argument("--tap-b", type=Path, default=JUDGE / "tap_b.pcap.zst", help="capture of what servers answer")
    node = os.environ.get("EDGESERVE_NODE") or None
    parser.add_argument(
        "--node", default=node, help="URL of a node, as in pulsar://broker:6650; default: EDGESERVE_NODE, else a store of its own"
    )
    parser.add_argument("--speed", type=float, default=15.0, help="times faster than recorded; 0: as fast as possible (default 15)")
    parser.add_argument("--out", type=Path, help="keep alerts, logs and the message store in this new directory")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    args = parser.parse_args(argv)
    if args.speed < 0:
        parser.error(f"--speed {args.speed}: give a factor above 0, or 0 for as fast as possible")
    if args.out and args.out.exists():
        parser.error(f"--out {args.out} exists: name a directory that does not")
    try:
        args.node = args.node and for_processes(args.node)
    except ConfigurationError as error:
        parser.error(str(error))
    own = (args.tap_a, args.tap_b) != (parser.get_default("tap_a"), parser.get_default("tap_b"))
    try:
        for path in (args.tap_a, args.tap_b):
            next(packets(path), None)
    except (CaptureError, OSError) as error:
        parser.exit(2, f"demo.py: {error}\n")
    with tempfile.TemporaryDirectory(prefix="edgeserve-demo-") as temporary:
        out = Path(temporary)
        if args.out:
            args.out.mkdir(parents=True)
            out = args.out.resolve()
        return demo(args, out, scored=not own)


def demo(args: argparse.Namespace, out: Path, *, scored: bool) -> int:
    console = Console(highlight=False)
    place = Place(args.node, out)
    files, process = Files(out), start(args.tap_a, args.tap_b, args.speed, out, place)
    left: list[str] = []
    try:
        progress = Progress(console, files, quiet=args.json)
        single = score_single_taps() if scored else {}
        with progress.shown() as live:
            while process.poll() is None:
                progress.update(live)
                time.sleep(0.1)
    except KeyboardInterrupt:
        return 130
    finally:
        stop(process)
        left = leave(place, keep=args.out is not None)
    if process.returncode:
        sys.stderr.write((out / "run.log").read_text())
        return 1
    report = measure(files) | {"node": parse(place.node).shown, "topics_left": left}
    good = bool(report["windows_judged"]) and not report["lost"] and not report["doubled"]
    if scored:
        good &= files.sent("tap_a") == files.sent("tap_b")
        scores = {"both taps": score.score(score.alerted(files.alerts()), score.truth(JUDGE))} | single
        report["scores"] = {view: result._asdict() for view, result in scores.items()}
        good &= all(scores["both taps"].f1 - result.f1 >= ADVANTAGE for result in single.values())
    report["try_next"] = next_commands()
    if args.json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        show(console, report)
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
