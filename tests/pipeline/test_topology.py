"""A cluster in YAML: what is read of it, and what is wrong with it named with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeserve import pipeline as room
from edgeserve.pipeline import InvalidPipeline
from edgeserve.pipeline.topology import Topology, read_topology
from edgeserve.pipeline.yamlfile import MOST_BYTES

CLUSTER = """\
nodes:
  roof: {cores: 4, memory: 8 GB, speed: 0.5, zone: site, accelerators: {gpu: 1}}
  switch: {cores: 0}
  cellar:
    cores: 16
    memory: 64 GiB
    max_utilisation: 0.9
    cost_per_core_s: 0.1
links:
  wifi: {ends: [roof, switch], bandwidth: 100 Mbit/s, latency: 5 ms}
  cable: {ends: [switch, cellar], bandwidth: 2.5 MB/s, latency: 0.1 s, max_utilisation: 0.7, cost_per_byte: 1, duplex: true}
broker: cellar
sources:
  frame: {node: roof, stays_in: site}
  sound: roof
tasks:
  detect: {accelerators: {gpu: 1}}
sinks:
  show: {node: cellar, weight: 2}
routes:
  - {start: roof, end: cellar, links: [wifi, cable]}
pins: {detect: [roof, cellar], track: cellar}
colocate:
  - [detect, track]
separate:
  - [detect, judge]
header: 300 B
weights: {latency: 2, bytes: 0.5}
settle: 900 B
hop: 1.5 ms
variability: 0.5
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write


def test_all_of_it_is_read_in_the_units_of_a_placement(write: Write) -> None:
    found = read_topology(write(CLUSTER))
    assert found.nodes["roof"] == {"cores": 4, "memory_bytes": 8e9, "speed": 0.5, "zone": "site", "accelerators": {"gpu": 1}}
    assert found.nodes["switch"] == {"cores": 0}
    assert found.nodes["cellar"] == {"cores": 16, "memory_bytes": 64 * 2**30, "max_utilisation": 0.9, "cost_per_core_s": 0.1}
    assert found.links["wifi"] == {"ends": ("roof", "switch"), "bandwidth_bytes_s": 12.5e6, "latency_ms": 5.0}
    assert found.links["cable"]["bandwidth_bytes_s"] == 2.5e6 and found.links["cable"]["latency_ms"] == 100.0
    assert found.links["cable"]["duplex"] is True
    assert found.broker == "cellar" and found.header_bytes == 300 and found.hop_ms == 1.5 and found.variability == 0.5
    assert (found.reference_bytes, found.fetch_bytes, found.settle_bytes) == (160, 500, 900)
    assert found.sources == {"frame": {"node": "roof", "stays_in": "site"}, "sound": {"node": "roof"}}
    assert found.tasks == {"detect": {"accelerators": {"gpu": 1}}}
    assert found.sinks == {"show": {"node": "cellar", "weight": 2}}
    assert found.routes == ({"start": "roof", "end": "cellar", "links": ("wifi", "cable")},)
    assert found.pins == {"detect": ("roof", "cellar"), "track": ("cellar",)}
    assert (found.colocate, found.separate) == ((("detect", "track"),), (("detect", "judge"),))
    assert found.weights == {"latency": 2, "bytes": 0.5}


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("nodes", "cellar", "memory_bytes"), 6),
        (("nodes", "cellar", "speed"), 4),
        (("links", "cable"), 11),
        (("routes", "roof' to 'cellar"), 21),
        (("colocate", "0"), 24),
        (("pins", "track"), 22),
        (("tasks", "none"), 16),
        (("nothing",), 0),
    ],
)
def test_the_line_of_a_field_or_of_what_it_would_be_in(write: Write, path: tuple[str, ...], line: int) -> None:
    assert read_topology(write(CLUSTER)).at(*path).line == line


@pytest.mark.parametrize(
    ("quantity", "bytes_s"),
    [("8 bit/s", 1), ("8 kbit/s", 1e3), ("8Mbit/s", 1e6), ("1 Gbit/s", 1.25e8), ("3 kB/s", 3e3), ("1 KiB/s", 1024), ("1.5e3 B/s", 1500)],
)
def test_bandwidths(write: Write, quantity: str, bytes_s: float) -> None:
    assert read_topology(write(CLUSTER.replace("100 Mbit/s", quantity))).links["wifi"]["bandwidth_bytes_s"] == pytest.approx(bytes_s)


WRONG = [
    ("100 Mbit/s", "100", "BadValue", 10, "link 'wifi': bandwidth: 100 has no unit", "100 Mbit/s or 12.5 MB/s"),
    ("100 Mbit/s", "100 Mbps", "BadValue", 10, "has the unit 'Mbps', which is none of", "100 Mbit/s or 12.5 MB/s"),
    ("100 Mbit/s", "-5 Mbit/s", "BadValue", 10, "is negative", "from 0 on"),
    ("100 Mbit/s", "fast", "BadValue", 10, "is no number with a unit", "100 Mbit/s"),
    ("100 Mbit/s", "1.2.3 Mbit/s", "BadValue", 10, "is no number with a unit", "100 Mbit/s"),
    ("100 Mbit/s", "1e999 Mbit/s", "BadValue", 10, "is no number", "plain number"),
    ("duplex: true", "duplex: 1", "BadValue", 11, "link 'cable': duplex: 1 is neither true nor false", "write one of these"),
    ("latency: 5 ms", "latency: 5", "BadValue", 10, "link 'wifi': latency: 5 has no unit", "5 ms"),
    ("64 GiB", "64", "BadValue", 6, "node 'cellar': memory: 64 has no unit", "8 GB"),
    ("    memory: 64 GiB\n", "", "MissingValue", 4, "node 'cellar' has no memory", "memory: 8 GB"),
    ("    cores: 16\n", "", "MissingValue", 4, "node 'cellar' has no cores", "cores:"),
    ("cores: 16", "cores: -1", "BadValue", 5, "node 'cellar': cores: -1 is negative", "from 0 on"),
    ("cores: 16", "cores: 1.5", "BadValue", 5, "is no whole number", "such as 4"),
    ("cores: 16", "cores: yes", "BadValue", 5, "is no whole number", "such as 4"),
    ("cores: 16", "cores: 16\n    cores: 8", "DuplicateName", 6, "the key 'cores' is there twice", "rename it"),
    ("0.9", ".nan", "BadValue", 7, "is no number", "plain number"),
    ("cost_per_core_s", "cost_per_core", "UnknownKeyword", 8, "node 'cellar' has no 'cost_per_core'", "'cost_per_core_s'"),
    ("links:\n", "linked:\n", "UnknownKeyword", 9, "a topology has no 'linked'", "'links'"),
    ("[roof, switch]", "[roof]", "BadValue", 10, "link 'wifi': ends: ['roof'] is no pair", "[roof, cellar]"),
    ("ends: [roof, switch], ", "", "MissingValue", 10, "link 'wifi' has no ends", "ends:"),
    ("broker: cellar\n", "", "MissingValue", 1, "the topology has no broker", "name the node"),
    ("[wifi, cable]", "wifi", "BadValue", 21, "is no list", "[a, b]"),
    ("start: roof, ", "", "MissingValue", 21, "route '0' has no start", "start:"),
    ("  - [detect, track]", "  - detect", "BadValue", 24, "colocate '0': 'detect' is no list", "[a, b]"),
    ("{gpu: 1}}\n  switch", "[gpu]}\n  switch", "BadValue", 2, "is no mapping", "{gpu: 1}"),
    ("sound: roof", "sound: 5", "InvalidDocument", 15, "source 'sound' is no mapping", "node, stays_in"),
    ("weights: {latency: 2, bytes: 0.5}", "weights: 5", "InvalidDocument", 28, "weights are no mapping", "under weights:"),
    ("  roof: {", "  roof: &a {", "UnsafeDocument", 2, "&a: anchors and aliases are not taken", "write out"),
    ("zone: site", "zone: !!python/object:os.system x", "UnsafeDocument", 2, "the tag", "plain value"),
    ("nodes:", "nodes: [", "InvalidDocument", 3, "this is no YAML", "correct the line"),
]


@pytest.mark.parametrize(("old", "new", "error", "line", "reason", "suggestion"), WRONG, ids=[f"{w[2]}-{w[4][:40]}" for w in WRONG])
def test_what_is_wrong_is_named_with_its_line(
    write: Write, old: str, new: str, error: str, line: int, reason: str, suggestion: str
) -> None:
    assert old in CLUSTER
    path = write(CLUSTER.replace(old, new, 1))
    with pytest.raises(InvalidPipeline) as caught:
        read_topology(path)
    assert type(caught.value) is getattr(room, error)
    assert (caught.value.where.file, caught.value.where.line) == (str(path), line), str(caught.value)
    assert reason in caught.value.reason and suggestion in caught.value.suggestion, str(caught.value)


def test_an_empty_file_and_a_list_are_no_topology(write: Write) -> None:
    for text in ("", "- a\n"):
        with pytest.raises(room.InvalidDocument, match="this is no mapping; begin it with `nodes:`"):
            read_topology(write(text))


def test_ten_megabytes_and_a_bomb_of_aliases_are_refused_before_they_are_read(write: Write) -> None:
    with pytest.raises(room.UnsafeDocument, match=f"more than {MOST_BYTES} bytes; a topology has far fewer"):
        read_topology(write(CLUSTER + "#" + "x" * 10_000_000))
    levels = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(room.UnsafeDocument, match=r"cluster\.yaml:1: &a: anchors and aliases"):
        read_topology(write("a: &a [x, x, x]\n" + levels + "nodes: *i\n"))
    with pytest.raises(room.UnsafeDocument, match="a topology has far fewer"):
        read_topology(write("nodes:\n" + "".join(f"  n{i}: {{cores: 1, memory: 1 GB}}\n" for i in range(8_000))))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(["roof", "5 ms", "1 GB", "", "100 Mbit/s"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["roof", "cores", "memory", "ends", "a"]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    st.sampled_from(["nodes", "links", "broker", "sources", "tasks", "sinks", "routes", "pins", "colocate", "weights", "header"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_is_read_or_is_a_named_error(tmp_path: Path, value: object, section: str) -> None:
    import yaml

    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CLUSTER) | {section: value}))
    try:
        found = read_topology(path)
    except InvalidPipeline as exc:
        assert exc.where.file == str(path) and exc.suggestion
    else:
        assert isinstance(found, Topology)
