"""The detector, the recordings and the scores that the README of the example states."""

from __future__ import annotations

import functools
import json

import pytest
import score
from detect import HORIZONS, Evidence, judge
from flows import SECOND, Flow, Window, windows
from pcap import TCP, UDP, packets

DATA = score.HERE / "data"
CLIENT, SERVER = "10.1.0.5", "10.2.0.9"
RECORDINGS = ("train", "judge")


def ask(port: int, proto: int = TCP, sport: int = 40_000, **seen: int) -> Flow:
    return Flow(CLIENT, SERVER, proto, sport, port, 0, 0, **({"packets": 1} | seen))


def reply(port: int, proto: int = TCP, sport: int = 40_000, **seen: int) -> Flow:
    return Flow(SERVER, CLIENT, proto, port, sport, 0, 0, **({"packets": 1} | seen))


def count(steps: list[tuple[list[Flow], list[Flow]]], kind: str, horizon: int = 30) -> int:
    """The highest count of one counter while these windows, and an empty one, go by."""
    evidence = Evidence()
    seen = [evidence.observe(*step) for step in [*steps, ([], [])]]
    return max(counts.get((CLIENT, SERVER), {}).get((kind, horizon), 0) for counts in seen)


def test_unanswered_and_refused_probes_fail_and_answered_ones_do_not() -> None:
    probes = [ask(1, syn=1), ask(2, syn=1), ask(3, UDP), ask(4, UDP), ask(5)]
    replies = [reply(2, rst=1), reply(4, UDP, bytes=90), reply(5)]
    assert count([(probes, replies)], "probe_failed") == 3
    assert count([(probes, replies)], "probe_refused") == 1
    assert count([(probes, [])], "probe") == 5


def test_an_icmp_unreachable_is_a_refusal() -> None:
    assert count([([ask(1, UDP)], [reply(1, UDP, unreachable=1)])], "probe_refused") == 1


def test_an_answer_in_the_next_window_is_in_time() -> None:
    assert count([([ask(1, UDP)], []), ([], [reply(1, UDP)])], "probe_failed") == 0
    assert count([([ask(1, UDP)], []), ([], []), ([], [reply(1, UDP)])], "probe_failed") == 1


def test_a_connection_that_goes_on_is_no_probe() -> None:
    assert count([([ask(1, syn=1)], []), ([ask(1, packets=3, payload_bytes=80)], [])], "probe") == 0


def test_resets_that_nobody_asked_for_are_no_failed_probes() -> None:
    resets = [reply(port, rst=1, sport=50_000 + port) for port in range(40)]
    assert count([([], resets)], "refused") == 40
    assert count([([], resets)], "probe_failed") == 0


def test_a_slow_scan_adds_up_in_the_long_horizon_only() -> None:
    steps: list[tuple[list[Flow], list[Flow]]] = []
    for port in range(20):
        steps += [([ask(port, syn=1)], []), ([], [])]
    assert [count(steps, "probe_failed", horizon) for horizon in HORIZONS] == [2, 5, 15]
    evidence = Evidence()
    alerts = [alert for step in steps for alert in judge(7, evidence.observe(*step), {("probe_failed", 30): 10})]
    assert [(a.src, a.dst, a.start_ns, a.why, a.ports) for a in alerts[:1]] == [(CLIENT, SERVER, 7, "probe_failed", 10)]


def test_what_is_idle_is_forgotten() -> None:
    evidence = Evidence()
    for number in range(2_000):
        evidence.observe([ask(number % 60_000, syn=1)] if number < 600 else [], [])
    assert not evidence.talks
    assert not evidence.ports


@functools.cache
def taps(name: str) -> tuple[list[Window], list[Window]]:
    first, second = (list(windows(DATA / name / f"tap_{tap}.pcap.zst")) for tap in "ab")
    return first, second


@pytest.mark.parametrize("name", RECORDINGS)
def test_each_tap_sees_one_direction_and_both_the_same_windows(name: str) -> None:
    tap_a, tap_b = taps(name)
    assert [w.start_ns for w in tap_a] == [w.start_ns for w in tap_b]
    assert {(f.src[:5], f.dst[:5]) for w in tap_a for f in w.flows} == {("10.1.", "10.2.")}
    assert {(f.src[:5], f.dst[:5]) for w in tap_b for f in w.flows} == {("10.2.", "10.1.")}


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_truth_is_in_the_capture(name: str) -> None:
    truth = json.loads((DATA / name / "truth.json").read_text())
    tap_a, tap_b = taps(name)
    assert (tap_a[0].start_ns, tap_a[-1].start_ns + SECOND) == (truth["start_ns"], truth["end_ns"])
    assert (sum(w.packets for w in tap_a), sum(w.packets for w in tap_b)) == tuple(truth["packets"].values())
    assert {attack["kind"] for attack in truth["attacks"]} == {
        f"{how}-{speed}" for how in ("syn", "udp", "ack") for speed in ("slow", "fast")
    }
    ports: list[set[int]] = [set() for _ in truth["attacks"]]
    for packet in packets(DATA / name / "tap_a.pcap.zst"):
        for attack, asked in zip(truth["attacks"], ports, strict=True):
            if (packet.src, packet.dst) == (attack["src"], attack["dst"]) and attack["start_ns"] <= packet.time_ns <= attack["end_ns"]:
                asked.add(packet.dport)
    assert min(map(len, ports)) >= 20
    assert score.truth(DATA / name)


def test_the_recordings_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 3_000_000


def f1(name: str, view: str) -> float:
    rows = score.evidence(*taps(name), score.VIEWS[view])
    return score.score(score.alerted(score.judged(rows, score.load_thresholds(view))), score.truth(DATA / name)).f1


def test_two_taps_are_clearly_better_than_one() -> None:
    joint = f1("judge", "both taps")
    assert joint >= 0.9
    assert joint - f1("judge", "tap A alone") >= 0.2
    assert joint - f1("judge", "tap B alone") >= 0.2


@pytest.mark.parametrize("view", list(score.VIEWS))
def test_the_thresholds_are_those_that_the_train_recording_gives(view: str) -> None:
    rows = list(score.evidence(*taps("train"), score.VIEWS[view]))
    assert score.choose(rows, score.truth(DATA / "train")) == score.load_thresholds(view)


def test_score_counts_units() -> None:
    attacked = {("a", "b", 1), ("a", "b", 2), ("c", "d", 1), ("c", "d", 2)}
    assert score.score({("a", "b", 1), ("a", "b", 2), ("x", "y", 1)}, attacked) == pytest.approx((2 / 3, 0.5, 4 / 7))
    assert score.score(set(), attacked) == (0, 0, 0)
