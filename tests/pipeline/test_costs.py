"""The file of costs, and the figures that are made of what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core.message import Header, TimeKind
from edgeserve.pipeline.costs import Costs, InvalidCosts, LinkCost, SourceCost, TaskCost, UnsupportedCostsVersion, read_costs, write_costs
from edgeserve.pipeline.measure import Report, Sent, source_cost, task_cost

TASK = TaskCost(
    cpu_s=0.004,
    cpu_s_quantiles={"0.5": 0.003, "0.9": 0.006, "0.99": 0.01},
    memory_bytes=9e7,
    output_bytes=480,
    outputs_per_run=1.5,
    runs=90,
)
COSTS = Costs(
    pipeline="yard",
    sources={"camera": SourceCost(rate_hz=25.0, bytes=60_000.0, messages=250)},
    tasks={"détecter": TASK},
    links=[LinkCost(ends=("roof", "cellar"), bandwidth_bytes_s=1.1e8, latency_ms=0.2)],
    host="roof",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "costs.json"
    write_costs(path, COSTS)
    return path


def test_what_was_written_is_read(file: Path) -> None:
    assert read_costs(file) == COSTS
    assert json.loads(file.read_text())["version"] == 1
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_is_cut_off_anywhere_is_refused(file: Path) -> None:
    whole = file.read_bytes().rstrip()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(InvalidCosts, match=r"costs\.json: .*cut off"):
            read_costs(file)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("sources.camera.rate_hz", -1, r"> 0.*\$\.sources\[\.\.\.\]\.rate_hz"),
        ("sources.camera.rate_hz", 0, r"> 0.*\$\.sources\[\.\.\.\]\.rate_hz"),
        ("sources.camera.rate_hz", "25", r"Expected `float`, got `str`"),
        ("sources.camera.bytes", None, r"Expected `float`, got `null`"),
        ("sources.camera.bytes", 1e300, r"<= .*\$\.sources\[\.\.\.\]\.bytes"),
        ("sources.camera.messages", 2.5, r"Expected `int`, got `float`"),
        ("tasks.détecter.cpu_s", -0.1, r">= 0.*\$\.tasks\[\.\.\.\]\.cpu_s"),
        ("tasks.détecter.cpu_s", True, r"Expected `float`, got `bool`"),
        ("tasks.détecter.cpu_s_quantiles", {"1.5": 0.1}, r"regex.*cpu_s_quantiles"),
        ("tasks.détecter.runs", 0, r">= 1"),
        ("tasks.détecter.gpu_s", 1, r"unknown field `gpu_s`"),
        ("tasks", [], r"Expected `object`, got `array` - at `\$\.tasks`"),
        ("links", [{"ends": ["a"], "bandwidth_bytes_s": 1, "latency_ms": 1}], r"length 2.*\$\.links\[0\]\.ends"),
        ("pipeline", "", r"length >= 1 - at `\$\.pipeline`"),
        ("version", 0, r">= 1 - at `\$\.version`"),
    ],
)
def test_what_cannot_be_a_cost_is_refused_with_its_place(file: Path, place: str, value: Any, said: str) -> None:
    document = json.loads(file.read_text())
    *path, last = place.split(".")
    inner = document
    for key in path:
        inner = inner[key]
    inner[last] = value
    file.write_text(json.dumps(document))
    with pytest.raises(InvalidCosts, match=rf"costs\.json: .*{said}.*edgeserve profile"):
        read_costs(file)


def test_a_missing_field_is_named(file: Path) -> None:
    file.write_text('{"pipeline": "yard", "sources": {}}')
    with pytest.raises(InvalidCosts, match="missing required field `tasks`"):
        read_costs(file)


@pytest.mark.parametrize("text", ["", "nonsense", "[1]", '{"pipeline": NaN}', "\xff", '{"a": ' + "[" * 100_000])
def test_what_is_no_such_file_is_refused(file: Path, text: str) -> None:
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidCosts, match=r"costs\.json"):
        read_costs(file)


def test_a_newer_version_is_refused_whatever_else_is_in_it(file: Path) -> None:
    file.write_text('{"version": 2, "whatever": "is new"}')
    with pytest.raises(UnsupportedCostsVersion, match=r"costs\.json: .*version 2 .*reads 1 to 1: upgrade edgeserve"):
        read_costs(file)


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InvalidCosts, match="is it the right file"):
        read_costs(large)


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_costs_that_are_none_are_not_written_and_leave_the_file_that_is_there(file: Path, number: float) -> None:
    wrong = msgspec.structs.replace(COSTS, tasks={"t": msgspec.structs.replace(TASK, cpu_s=number)})
    with pytest.raises(InvalidCosts, match=r"costs\.json: .*cpu_s"):
        write_costs(file, wrong)
    assert read_costs(file) == COSTS
    assert list(file.parent.iterdir()) == [file]


def test_who_reads_while_it_is_written_anew_reads_what_was_there(file: Path) -> None:
    with file.open("rb") as reader:
        write_costs(file, msgspec.structs.replace(COSTS, host="cellar"))
        assert msgspec.json.decode(reader.read(), type=Costs) == COSTS
    assert read_costs(file).host == "cellar"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_costs(tmp_path / "taken", COSTS)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# --- figures ----------------------------------------------------------------------------------------------------------


def sent(*headers: tuple[int, int, int], timed: bool = True) -> Sent:
    """Of (sequence, event time, size)."""
    found = Sent()
    for sequence, event_ns, size in headers:
        kind = TimeKind.DEVICE if timed else TimeKind.ARRIVAL
        found.add(Header(bytes(16), "s", "p", sequence, event_ns, 0, size=size, time_kind=int(kind)))
    return found


def test_a_rate_is_that_of_event_times_and_replicas_add_up() -> None:
    second = 10**9
    one = sent((0, 3 * second, 10), (1, 1 * second, 20), (2, 2 * second, 30))
    # What came before these is not kept any more.
    other = sent((98, 100 * second, 20), (99, 100 * second + second // 2, 20))
    assert source_cost([one], second) == SourceCost(rate_hz=1.0, bytes=20.0, messages=3)
    assert source_cost([one, other], second) == SourceCost(rate_hz=3.0, bytes=20.0, messages=103)


def test_bunches_of_one_time_have_the_rate_of_all_that_came() -> None:
    """Ten at a time, each second."""
    bunches = sent(*((10 * second + n, second * 10**9, 1) for second in range(3) for n in range(10)))
    assert source_cost([bunches], 0) == SourceCost(rate_hz=10.0, bytes=1.0, messages=30)
    assert (bunches.newest, bunches.moments) == (10, 3)
    late = sent((0, 2 * 10**9, 1), (1, 0, 1), (2, 2 * 10**9, 1), (3, 0, 1))
    assert source_cost([late], 0) == SourceCost(rate_hz=1.0, bytes=1.0, messages=4)


def test_a_source_that_keeps_a_pace_has_a_phase() -> None:
    step = 10**8
    paced = sent(*((n, 7 * step + n * step + (n % 2) * step // 20, 1) for n in range(20)))
    found = source_cost([paced], 4 * step)
    assert found is not None and found.phase_ms == 300
    by_chance = sent(*((n, n * step + (n % 3) * step // 2, 1) for n in range(20)))
    for producers in ([by_chance], [paced, paced]):
        other = source_cost(producers, 0)
        assert other is not None and other.phase_ms is None


def test_one_message_or_one_time_tells_no_rate() -> None:
    assert source_cost([], 0) is None
    assert source_cost([sent((0, 5, 1))], 5) is None
    assert source_cost([sent((0, 5, 1), (1, 5, 1))], 5) is None


def test_the_first_runs_of_each_process_are_left_out_and_replicas_taken_together() -> None:
    reports = [Report("t", 4, [900, 10**9, 10**9], 1, 5000), Report("t", 3, [900, 2 * 10**9], 1, 7000), Report("t", 0, [], 0, 1000)]
    results = [sent((1, 0, 100), (2, 0, 300)), sent((1, 0, 200))]
    found = task_cost(reports, results, 1)
    assert found is not None
    assert (found.cpu_s, found.runs, found.memory_bytes) == (pytest.approx(4 / 3), 3, 7000)
    assert (found.output_bytes, found.outputs_per_run) == (200, pytest.approx(3 / 7))
    assert task_cost(reports, results, 3) is None


def test_a_task_without_results_has_size_0() -> None:
    found = task_cost([Report("t", 3, [5, 5], 1, 1)], [], 0)
    assert found is not None and (found.output_bytes, found.outputs_per_run) == (0, 0)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
def test_a_quantile_is_what_that_part_of_the_runs_stayed_within(cpu_ns: list[int]) -> None:
    found = task_cost([Report("t", len(cpu_ns) + 1, cpu_ns, 1, 1)], [], 0)
    assert found is not None
    for quantile, value in found.cpu_s_quantiles.items():
        within = sum(ns / 1e9 <= value for ns in cpu_ns)
        below = sum(ns / 1e9 < value for ns in cpu_ns)
        assert below < float(quantile) * len(cpu_ns) <= within + 1e-9
