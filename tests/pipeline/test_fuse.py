"""Fused tasks in a pipeline: declared in Python and in YAML, checked between their stages, one task wherever they are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import pytest

from edgeserve import pipeline as room
from edgeserve.pipeline import Pipeline, load_yaml
from edgeserve.pipeline.measure import Report, measured
from edgeserve.pipeline.picture import mermaid, svg


@dataclass
class Picture:
    number: int


def decode(film: int) -> Iterator[Picture]:
    yield from (Picture(film), Picture(film + 1))


def detect(picture: Picture) -> int:
    assert type(picture) is Picture
    return 10 * picture.number


class Count:
    def setup(self) -> None:
        self.seen = 0

    def __call__(self, number: int) -> int:
        self.seen += 1
        return number + self.seen


def films() -> Pipeline:
    app = Pipeline("films")
    app.add_source("film", lambda: iter(range(2)), event_time=int)
    return app


def run(app: Pipeline, node: str) -> None:
    for made in app.nodes(node).values():
        with made:
            made.run(until="end")


@pytest.mark.parametrize("engine", ["memory", "local"])
def test_a_fused_task_runs_and_is_shown_as_one(tmp_path: Path, engine: str) -> None:
    app, got = films(), list[Any]()
    app.add_task("ball", fuse=[decode, detect, Count], place="roof")
    app.add_sink("keep", got.append, of="ball")
    node = f"{engine}://{tmp_path}/store" if engine == "local" else "memory://fused-pipeline"
    run(app, node)
    assert sorted(got) == [1, 12, 13, 24]
    graph = app.graph()
    assert [part.name for part in graph.parts] == ["film", "ball", "keep"]
    assert [each["stages"] for each in graph.to_dict()["nodes"]] == [[], ["decode", "detect", "Count"], []]
    assert 'n1["ball (decode + detect + Count) · on roof"]' in mermaid(graph)
    assert "ball (decode + detect + Count)" in svg(graph)


def test_the_decorated_function_is_the_last_stage() -> None:
    app, got = films(), list[Any]()

    @app.task(fuse=[decode], sources="film")
    def ball(picture: Picture) -> int:
        return picture.number

    app.add_sink("keep", got.append, of="ball")
    run(app, "memory://fused-decorated")
    assert (got, ball(Picture(3))) == ([0, 1, 1, 2], 3)


def test_its_inputs_may_have_other_names_and_a_relay_is_not_it() -> None:
    app, got = films(), list[Any]()
    app.add_source("more", lambda: iter(range(2)), event_time=int)
    app.add_source("most", lambda: iter(range(2)), event_time=int)
    app.add_task("pair", fuse=[lambda a, b: [a, b], sum], sources=["more", "most"], join="exact")
    app.add_task("ball", fuse=[decode, detect])
    app.add_task("both", fuse=[lambda pair, ball: pair + ball, lambda both: -both])
    app.add_sink("keep", got.append, of="pair")
    run(app, "memory://fused-renamed")
    assert got == [0, 2]
    relays = [part for part in app.graph().parts if part.kind == "relay"]
    assert relays and not any(part.stages for part in relays)
    assert "#lt;lambda>" in mermaid(app.graph())


def test_a_profile_measures_it_as_one_task(tmp_path: Path) -> None:
    import msgspec

    app = films()
    app.add_task("ball", fuse=[decode, detect, Count])
    run(measured(app, {}, tmp_path), "memory://fused-measured")
    (written,) = tmp_path.iterdir()
    report = msgspec.msgpack.decode(written.read_bytes(), type=Report)
    assert (report.task, report.runs) == ("ball", 2)


# --- what is refused ------------------------------------------------------------------------------------------------


def as_text(picture: str) -> str:
    return picture


def as_fields(picture: dict) -> int:  # type: ignore[type-arg]
    return int(picture["number"])


def rows(film: int) -> list:  # type: ignore[type-arg]
    return [film]


class Columns(TypedDict):
    number: int


def columns(film: int) -> Columns:
    return {"number": film}


REFUSED: list[tuple[type, str, Callable[[Pipeline], Any]]] = [
    (room.MissingValue, "task 't' has no 'task' and no 'fuse'; give it a task", lambda a: a.add_task("t")),
    (room.BadValue, "task 't' has both a task and fuse; leave one of them out", lambda a: a.add_task("t", detect, fuse=[decode])),
    (room.BadValue, r"fuse=\[\]; give a list", lambda a: a.add_task("t", fuse=[])),
    (room.BadValue, "fuse='decode'; give a list", lambda a: a.add_task("t", fuse="decode")),
    (room.BadValue, "fuse='decode'; give a list", lambda a: a.task(fuse="decode")(detect)),
    (room.BadValue, "is int 3, and nothing that can be called", lambda a: a.add_task("t", fuse=[3, detect])),
    (room.BadValue, "has several stages, and args= are what one", lambda a: a.add_task("t", fuse=[decode, Count], args={})),
    (
        room.BadValue,
        "cannot be made: Picture: missing a required argument",
        lambda a: a.add_task("t", fuse=[Picture, detect], sources="film"),
    ),
    (room.BadValue, "is called with one value, and cannot be", lambda a: a.add_task("t", fuse=[decode, lambda a, b: a])),
    (room.BadValue, "is called with one value, and cannot be", lambda a: a.add_task("t", fuse=[decode, lambda: 0, detect])),
    (room.UnknownName, "takes 'picture', which nothing sends", lambda a: a.add_task("t", fuse=[detect, decode])),
    (room.UnknownKeyword, "source 's' takes no 'fuse'", lambda a: a.add_source("s", [1], fuse=[decode])),
    (room.UnknownKeyword, "sink 's' takes no 'fuse'", lambda a: a.add_sink("s", fuse=[decode], final_process=print)),
    (
        room.TypeConflict,
        "stage 'as_text' of task 't' takes str, and 'decode' before it makes Picture, which is handed over as it is",
        lambda a: a.add_task("t", fuse=[decode, as_text]),
    ),
    (room.TypeConflict, "takes dict, and 'decode' before it makes Picture", lambda a: a.add_task("t", fuse=[decode, as_fields])),
    (room.TypeConflict, "takes Picture, and 'rows' before it makes list", lambda a: a.add_task("t", fuse=[rows, detect])),
    (room.TypeConflict, "takes Picture, and 'columns' before it makes Columns", lambda a: a.add_task("t", fuse=[columns, detect])),
]


@pytest.mark.parametrize(("kind", "said", "declare"), REFUSED, ids=[f"{kind.__name__}-{i}" for i, (kind, _, _) in enumerate(REFUSED)])
def test_what_cannot_run_is_refused(kind: type, said: str, declare: Callable[[Pipeline], Any]) -> None:
    app = films()
    with pytest.raises(kind, match=said) as caught:
        declare(app)
        app.graph()
    assert caught.value.where.file == __file__  # type: ignore[attr-defined]


def test_what_the_last_stage_makes_is_what_is_sent() -> None:
    app = films()
    app.add_task("ball", fuse=[decode, detect], gate_in=lambda film: film)
    app.add_task("text", as_text, sources="ball")
    with pytest.raises(room.TypeConflict, match="task 'text' takes 'ball' as str, and task 'ball' sends int"):
        app.graph()


def test_stages_that_fit_are_let_through() -> None:
    app = films()
    app.add_task("t", fuse=[columns, as_fields, lambda number: str(number), as_text, len])
    assert app.graph().parts[1].stages == ("columns", "as_fields", "<lambda>", "as_text", "len")


# --- in YAML --------------------------------------------------------------------------------------------------------

PYTHON = """
class Picture:
    def __init__(self, number):
        self.number = number


def film():
    yield from range(2)


def decode(film: int) -> "Picture":
    return Picture(film)


class Detect:
    def setup(self):
        self.added = 5

    def __call__(self, picture: Picture) -> int:
        return picture.number + self.added


def as_text(number: str) -> str:
    return number


kept = []
keep = kept.append
"""

YAML = """\
pipeline: films
sources:
  film: {stream: "seen.py:film"}
tasks:
  ball:
    fuse:
      - seen.py:decode
      - seen.py:Detect
    retries: 1
sinks:
  keep: {sink: "seen.py:keep", of: ball}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "seen.py").write_text(PYTHON)

    def write(text: str) -> Path:
        path = tmp_path / "films.yaml"
        path.write_text(text)
        return path

    yield write
    sys.modules.pop("seen", None)


def test_stages_in_yaml(write: Callable[[str], Path]) -> None:
    app = load_yaml(write(YAML))
    run(app, "memory://fused-yaml")
    assert sys.modules["seen"].kept == [5, 6]
    assert app.graph().parts[1].stages == ("decode", "Detect")


BROKEN: dict[str, tuple[str, str, type, int, str]] = {
    "both": ("    retries: 1", "    task: seen.py:decode", room.BadValue, 6, "has both a task and fuse"),
    "no list": (
        "    fuse:\n      - seen.py:decode\n      - seen.py:Detect",
        "    fuse: seen.py:decode",
        room.BadValue,
        6,
        "fuse: Expected `array`",
    ),
    "empty": (
        "    fuse:\n      - seen.py:decode\n      - seen.py:Detect",
        "    fuse: []",
        room.BadValue,
        6,
        "fuse: Expected `array` of length >= 1",
    ),
    "null": ("    fuse:\n      - seen.py:decode\n      - seen.py:Detect", "    fuse:", room.BadValue, 6, "fuse: Expected `array`"),
    "none": (
        "    fuse:\n      - seen.py:decode\n      - seen.py:Detect\n",
        "",
        room.MissingValue,
        5,
        "task 'ball' has no 'task' and no 'fuse'",
    ),
    "a mapping": ("- seen.py:Detect", "- {task: seen.py:Detect}", room.BadValue, 8, r"fuse\[1\]: Expected `str`"),
    "no reference": ("- seen.py:Detect", "- Detect", room.BadValue, 8, r"fuse\[1\]: 'Detect' is no reference to something of Python"),
    "not there": ("- seen.py:Detect", "- seen.py:Detekt", room.BadReference, 8, "has no 'Detekt'; did you mean 'Detect'"),
    "no stage": ("- seen.py:Detect", "- seen.py:kept", room.BadValue, 8, "nothing that can be called"),
    "of two parameters": ("- seen.py:Detect", "- builtins:divmod", room.BadValue, 8, "is called with one value, and cannot be"),
    "types": ("    retries: 1", "      - seen.py:as_text", room.TypeConflict, 9, "takes str, and 'Detect' before it makes int"),
    "args": ("    retries: 1", "    args: {a: 1}", room.BadValue, 9, "has several stages"),
    "inputs": ("    retries: 1", "    inputs: [film, more]", room.BadValue, 9, "has the parameters film"),
    "first": ("- seen.py:decode", "- seen.py:Picture", room.BadValue, 7, "cannot be made: Picture: missing a required argument"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_in_yaml_is_named_with_its_line(write: Callable[[str], Path], name: str) -> None:
    old, new, kind, line, said = BROKEN[name]
    assert old in YAML
    with pytest.raises(kind, match=said) as caught:
        load_yaml(write(YAML.replace(old, new))).graph()
    assert caught.value.where.line == line  # type: ignore[attr-defined]
