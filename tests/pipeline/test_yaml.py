"""A pipeline in YAML: the same as in Python, and what is wrong with it named with its line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeserve import pipeline as room
from edgeserve.core.errors import MissingExtra
from edgeserve.pipeline import InvalidPipeline, Pipeline, load_yaml, schema
from edgeserve.pipeline.document import entries_of
from edgeserve.pipeline.yamlfile import MOST_BYTES

PYTHON = """
from edgeserve.align import Exact


def numbers(start=0):
    yield from range(start, start + 3)


def when(number: int) -> int:
    return number


def add(cam1: int, cam2: int) -> int:
    return cam1 + cam2


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, add: int) -> int:
        return add * self.by


def maker(by):
    return Scale(by)


exactly = Exact
kept = []
keep = kept.append
"""

YAML = """\
pipeline: room
node: memory://yaml
sources:
  cam1:
    stream: things.py:numbers
    event_time: things:when
  cam2:
    stream: things.py:numbers
    args: {start: 1}
    event_time: things.py:when
    max_lateness_ms: 5
tasks:
  add:
    task: things.py:add
    join: exact
  scaled:
    task: things.py:Scale
    args: {by: 10}
    inputs: add
    place: [roof, cellar]
sinks:
  keep:
    sink: things.py:kept.append
    of: [scaled]
"""


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's files have imported is not another's."""
    for name in ("things", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def write(tmp_path: Path) -> Any:
    (tmp_path / "things.py").write_text(PYTHON)

    def write(text: str | bytes = YAML) -> Path:
        path = tmp_path / "app.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    yield write
    sys.modules.pop("things", None)


def test_it_is_the_same_pipeline_as_in_python(write: Any) -> None:
    read = load_yaml(write())
    things = sys.modules["things"]
    app = Pipeline("room", node="memory://yaml")
    app.add_source("cam1", things.numbers, event_time=things.when)
    app.add_source("cam2", things.numbers, args={"start": 1}, event_time=things.when, max_lateness_ms=5)
    app.add_task("add", things.add, join="exact")
    app.add_task("scaled", things.Scale, args={"by": 10}, sources="add", place=["roof", "cellar"])
    app.add_sink("keep", things.keep, of="scaled")
    assert read.graph().to_dict() == app.graph().to_dict()
    assert read.url == app.url == "memory://yaml"
    for node in read.nodes().values():
        with node:
            node.run(until="end")
    assert things.kept == [20, 40]


def test_a_function_with_args_is_called_to_make_the_task(write: Any) -> None:
    read = load_yaml(write(YAML.replace("things.py:Scale", "things.py:maker")))
    assert read.graph().parts[3].inputs == ("add",)


def test_a_file_elsewhere_finds_what_is_beside_it(write: Any, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "beside_it.py").write_text("from things import add\n")
    (tmp_path / "deep" / "other.py").write_text("from beside_it import add\n")
    assert load_yaml(write(YAML.replace("things.py:add", "deep/other.py:add"))).graph().parts[2].inputs == ("cam1", "cam2")


def test_a_module_beside_the_file_is_found_before_others(write: Any) -> None:
    path = write(YAML.replace("things.py:", "things:"))
    assert load_yaml(path).graph().pipeline == "room"
    assert Path(sys.modules["things"].__file__ or "").parent == path.parent


def test_what_may_be_fetched_is_a_list_of_text(write: Any) -> None:
    fetch = ["https://data.example.org/frames/", "file:///srv/frames/"]
    read = load_yaml(
        write(YAML.replace("    join: exact\n", f"    join: exact\n    fetch: {json.dumps(fetch)}\n    fetch_max_bytes: 1000\n"))
    )
    (task,) = (each for each in read.declared if each.name == "add")
    assert (task.keywords["fetch"], task.keywords["fetch_max_bytes"]) == (fetch, 1000)
    read.graph()
    with pytest.raises(InvalidPipeline, match="fetch"):
        load_yaml(write(YAML.replace("    join: exact\n", "    fetch: [1]\n")))


def test_keywords_that_take_objects_take_references(write: Any) -> None:
    read = load_yaml(write(YAML.replace("join: exact", "join: things.py:exactly\n    by: things.py:when")))
    keywords = read.graph().parts[2].declared.keywords
    things = sys.modules["things"]
    assert (keywords["join"], keywords["by"]) == (things.Exact, things.when)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\npipeline: room\n"

BROKEN: dict[str, tuple[str, str, type[InvalidPipeline], int, str]] = {
    # what is replaced, by what; the error, its line, what it says
    "unknown source": ("inputs: add\n", "inputs: [ad]\n", room.UnknownName, 19, "takes 'ad', which nothing sends; did you mean 'add'?"),
    "unknown source in a list": ("[scaled]", "\n    - scaled\n    - scald", room.UnknownName, 24, "did you mean 'scaled'?"),
    "cycle": ("inputs: add", "inputs: scaled", room.CyclicPipeline, 19, "in a circle: scaled -> scaled"),
    "duplicate key": ("  cam2:\n", "  cam1:\n", room.DuplicateName, 7, "the key 'cam1' is there twice, first in line 4"),
    "duplicate keyword": ("    join: exact", "    join: exact\n    join: latest", room.DuplicateName, 16, "first in line 15"),
    "one name of two kinds": ("  keep:\n", "  add:\n", room.DuplicateName, 22, "sink 'add' has the name of the task in line 13"),
    "two producers": ("    join: exact", "    output_id: cam1", room.DuplicateName, 15, "both send 'cam1'"),
    "negative replicas": ("    join: exact", "    join: exact\n    replicas: -2", room.BadValue, 16, "replicas: Expected `int` >= 1"),
    "negative": ("    join: exact", "    retries: -2", room.BadValue, 15, "retries=-2: it is how often"),
    "by a key that nobody sends": ("    join: exact", "    by: true", room.BadValue, 15, "source 'cam1' sends none (line 4); give it key="),
    "not a number": ("max_lateness_ms: 5", "max_lateness_ms: soon", room.BadValue, 11, "Expected `float`, got `str`"),
    "unknown keyword": ("    join: exact", "    jion: exact", room.UnknownKeyword, 15, "task 'add' takes no 'jion'; did you mean 'join'?"),
    "unknown section": ("sinks:", "sink:", room.UnknownKeyword, 21, "a pipeline has no 'sink'; did you mean 'sinks'?"),
    "python only": ("sinks:\n", "sinks:\n  more: {final_process: 'things.py:keep'}\n", room.UnknownKeyword, 22, "takes no 'final_process'"),
    "no name": ("pipeline: room\n", "", room.MissingValue, 1, "the pipeline has no name"),
    "nothing to run": ("    task: things.py:add\n", "", room.MissingValue, 13, "task 'add' has no 'task'"),
    "no reference": (
        "task: things.py:add",
        "task: add",
        room.BadValue,
        14,
        "'add' is no reference to something of Python; write 'module:name'",
    ),
    "unknown name": ("things.py:add", "things.py:ad", room.BadReference, 14, "things.py has no 'ad'; did you mean 'add'?"),
    "unknown file": ("things.py:add", "thing.py:add", room.BadReference, 14, "there is no file 'thing.py'; did you mean 'things.py'?"),
    "unknown module": ("things.py:add", "no_such_things:add", room.BadReference, 14, "there is no module 'no_such_things'"),
    "broken file": (
        "things.py:add",
        "broken.py:add",
        room.BadReference,
        14,
        "broken.py cannot be imported: ZeroDivisionError: division by zero",
    ),
    "args that do not fit": ("args: {by: 10}", "args: {bye: 10}", room.BadValue, 18, "'by'"),
    "args in a list": ("args: {by: 10}", "args: [10]", room.BadValue, 18, "got `array`; name each parameter"),
    "args of text": ("args: {by: 10}", "args: by=10", room.BadValue, 18, "as in args: {path: frames.csv}"),
    "args of nothing": (
        "stream: things.py:numbers\n    event_time",
        "stream: things.py:kept\n    args: {}\n    event_time",
        room.BadValue,
        6,
        "is neither",
    ),
    "no mapping": (
        "  keep:\n    sink: things.py:kept.append\n    of: [scaled]",
        "  keep",
        room.InvalidDocument,
        21,
        "sinks are no mapping",
    ),
    "entry of text": (
        "  keep:\n    sink: things.py:kept.append\n    of: [scaled]",
        "  keep: print",
        room.InvalidDocument,
        22,
        "is no mapping",
    ),
    "list of entries": ("sinks:\n", "sinks: []\nmore:\n", room.UnknownKeyword, 22, "a pipeline has no 'more'"),
    "node": ("node: memory://yaml", "node: 3", room.BadValue, 2, "give the URL of a node"),
    "no text": ("  cam1:\n", "  1:\n", room.InvalidDocument, 4, "the key 1 is no text; put quotes around it"),
    "not YAML": ("  cam1:\n", "  cam1: : x\n", room.InvalidDocument, 4, "this is no YAML"),
    "a tab": ("  cam1:\n", "\tcam1:\n", room.InvalidDocument, 4, "this is no YAML"),
    "alias": ("args: {start: 1}", "args: &it {start: 1}", room.UnsafeDocument, 9, "&it: anchors and aliases are not taken"),
    "alias bomb": ("pipeline: room\n", BOMB, room.UnsafeDocument, 1, "&a: anchors and aliases are not taken"),
    "undefined alias": ("args: {start: 1}", "args: *it", room.UnsafeDocument, 9, r"\*it: anchors and aliases are not taken"),
    "tag": ("args: {start: 1}", "args: !!python/object/apply:os.system [ls]", room.UnsafeDocument, 9, "the tag"),
    "own tag": ("args: {start: 1}", "args: !mine {start: 1}", room.UnsafeDocument, 9, "the tag '!mine' is not taken"),
    "date that is none": (
        "args: {start: 1}",
        "args: {start: 2026-02-31}",
        room.InvalidDocument,
        9,
        "'2026-02-31' is no timestamp; put quotes",
    ),
    "second document": ("tasks:\n", "---\ntasks:\n", room.InvalidDocument, 12, "a second document begins"),
    "deep": ("args: {start: 1}", f"args: {{start: {'[' * 900}{']' * 900}}}", room.UnsafeDocument, 9, "more than 20 levels"),
    "many": ("args: {start: 1}", f"args: {{start: [{'1,' * 30_000}]}}", room.UnsafeDocument, 9, "more than 20000 values"),
    "too many inputs": ("inputs: add", "inputs: [add, cam1]", room.BadValue, 19, "has the parameters add; name one input for each"),
    "no inputs": (
        "task: things.py:Scale\n    args: {by: 10}\n    inputs: add",
        "task: things.py:maker\n    args: {by: 10}",
        room.MissingValue,
        16,
        "is not known before it runs; say it: inputs:",
    ),
    "an empty input": ("inputs: add", "inputs: ''", room.BadValue, 16, "task 'scaled': inputs=''"),
    "a class that makes no task": (
        "sink: things.py:kept.append",
        "sink: builtins:str",
        room.BadValue,
        23,
        "what the class str makes cannot be called with a message: it has no __call__; name a function, or a class that has one",
    ),
    "replicas": ("    join: exact", "    join: exact\n    replicas: 1001", room.BadValue, 16, "replicas: Expected `int` <= 1000"),
    "a long text": ("args: {start: 1}", f"args:\n      start: {'x' * 4097}", room.UnsafeDocument, 10, "a value has more than 4096 bytes"),
    "a long key": (
        "args: {start: 1}",
        f"args:\n      ? {'x' * 4097}\n      : 1",
        room.UnsafeDocument,
        10,
        "a value has more than 4096 bytes",
    ),
    "a large number": ("args: {start: 1}", f"args:\n      start: {2**63}", room.UnsafeDocument, 10, "does not fit into 64 bits"),
    "a larger number": ("args: {start: 1}", f"args:\n      start: -0x{'f' * 2000}", room.UnsafeDocument, 10, "does not fit into 64 bits"),
    "gate": ("inputs: add", "inputs: cam1\n    gate_in: things.py:texts", room.BadReference, 20, "has no 'texts'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named_with_its_line(write: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    old, new, kind, line, said = BROKEN[name]
    assert old in YAML
    path = write(YAML.replace(old, new, 1))
    with pytest.raises(InvalidPipeline) as caught:
        load_yaml(path).graph()
    error = caught.value
    assert type(error) is kind, error
    assert (error.where.file, error.where.line) == (str(path), line), error
    assert re.search(said, str(error)) or said in str(error), error
    assert error.suggestion


@pytest.mark.parametrize("size", [MOST_BYTES + 1, 10_000_000])
def test_a_file_that_is_too_large_is_not_read(write: Any, size: int) -> None:
    path = write(YAML + "#" * (size - len(YAML)))
    begin = time.monotonic()
    with pytest.raises(room.UnsafeDocument, match=f"app.yaml: the file has more than {MOST_BYTES} bytes"):
        load_yaml(path)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("data", [b"", b"# nothing\n", b"[]", b"room", b"\xff\xfe\x00", b"a: \x00", bytes(range(256))])
def test_what_is_no_pipeline_at_all(write: Any, data: bytes) -> None:
    with pytest.raises(room.InvalidDocument):
        load_yaml(write(data))


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_in_a_file_it_is_a_pipeline_or_refused_with_a_line_that_it_has(write: Any, data: st.DataObject) -> None:
    lines = YAML.encode().splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        odd = st.sampled_from(
            [b"", b"- x", b"x: y", b"  x:", b"    x: [1, {2: 3}]", b"? [x]", b"&a *a", b"{", b"\t", b"!!set {x}", b"<<: {}"]
        )
        lines[at] = data.draw(odd | st.sampled_from(lines) | st.binary(max_size=12))
    path = write(b"\n".join(lines))
    try:
        load_yaml(path).graph()
    except InvalidPipeline as error:
        assert 0 <= error.where.line <= path.read_bytes().count(b"\n") + 2 and error.suggestion


def test_without_the_extra_its_command_is_named(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edgeserve-streams\[pipeline\]'"):
        load_yaml(write())


def test_a_pipeline_in_python_needs_no_extra() -> None:
    text = "import sys; sys.modules['yaml'] = None; from edgeserve.pipeline import Pipeline; Pipeline('a').add_source('a', [1])"
    subprocess.run([sys.executable, "-c", text], check=True)


def test_the_schema_has_every_keyword_that_is_taken_and_says_what_it_means() -> None:
    found = schema()
    json.dumps(found)
    definitions = found["$defs"]
    for kind, entry in entries_of().items():
        properties = definitions[kind.capitalize()]["properties"]
        assert list(properties) == list(entry.__struct_fields__)
        assert definitions[kind.capitalize()]["additionalProperties"] is False
        for name, one in properties.items():
            assert one.get("description") or name == "log_verbose", f"{kind}: {name} says nothing"
    for name in ("worker_id", "topic_in", "topic_out", "group", "output_id"):
        assert definitions["Task"]["properties"][name]["default"] is None, "it is derived"
    assert definitions["Task"]["oneOf"] == [{"required": ["task"]}, {"required": ["fuse"]}]
    assert definitions["Sink"]["required"] == ["sink"]
    assert definitions["Task"]["properties"]["replicas"]["minimum"] == 1
    assert definitions["Task"]["properties"]["retries"]["type"] == "integer"
    for kind in ("Task", "Sink"):
        assert definitions[kind]["properties"]["backlog"]["enum"] == ["all", "block", "drop_oldest", "latest"]
    for kind in ("Task", "Source"):
        assert definitions[kind]["properties"]["durability"]["enum"] == ["broker", "origin"]
    assert re.match(definitions["Source"]["properties"]["stream"]["pattern"], "vision/camera.py:Camera.open")
    assert not re.match(definitions["Source"]["properties"]["stream"]["pattern"], "camera")
