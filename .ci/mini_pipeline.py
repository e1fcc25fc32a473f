"""The smallest whole pipeline, run with an installed wheel: two sources, a join, a sink."""

import sys

from edgeserve import Compute, DataSource, Materialize

node = sys.argv[1]
seen: list[int] = []

with (
    DataSource([1, 2, 3], node, source_id="left", topic="in", event_time=lambda v: v) as left,
    DataSource([10, 20, 30], node, source_id="right", topic="in", event_time=lambda v: v // 10) as right,
):
    left.run()
    right.run()


def add(left: int, right: int) -> int:
    return left + right


with Compute(add, node, topic_in="in", topic_out="out", join="exact") as compute:
    compute.run(until="end")
with Materialize(seen.append, node, topic="out") as sink:
    sink.run(until="end")
if seen != [11, 22, 33]:
    sys.exit(f"expected [11, 22, 33], got {seen}")
print("mini pipeline: two sources joined, three results, in order")
