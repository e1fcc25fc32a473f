"""A program that ends without closing its nodes ends as any other."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.servers import with_namespace

SOURCE = """
import sys
from edgeserve.data_source import DataSource
source = DataSource([1, 2, 3], sys.argv[1], source_id="a", topic="left")
print(next(source))
"""

SINK = """
import sys
from edgeserve.compute import Compute
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
DataSource([1], sys.argv[1], source_id="a", topic="left").run()
compute = Compute(lambda a: a, sys.argv[1], topic_in="left", topic_out="result")
join = Compute(lambda a, b: a, sys.argv[1], topic_in="left", topic_out="none", timeout_ms=1)
sink = Materialize(lambda value: value, sys.argv[1], topic="result")
next(compute)
try:
    next(join)
except TimeoutError:
    pass
print(next(sink))
"""


@pytest.mark.pulsar
@pytest.mark.parametrize("program", [SOURCE, SINK], ids=["source", "sink"])
def test_nodes_that_are_left_open_do_not_abort_the_program(pulsar_url: str, program: str) -> None:
    url = with_namespace(pulsar_url)
    done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
