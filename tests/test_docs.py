"""The documentation is true: its snippets run, and its reference names everything that there is.

In a document, in order:
- a `python` block is executed; the blocks of one document share their names. One that begins with `# file: NAME` is written there instead.
- a `text` block right after it is what it must have printed.
- a `console` block's lines after `$ ` are run in the document's directory and must print what stands below them, where `...` stands for
  anything. After the comment `<!-- not run -->` they are only checked: the command and its options must exist.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import click
import msgspec
import pytest

import edgeserve
from edgeserve.cli.app import root as command_line
from edgeserve.core import errors, metrics
from edgeserve.core._pack import ACCEPTED
from edgeserve.core.message import Header, Kind, TimeKind
from edgeserve.pipeline import InvalidPipeline, Pipeline
from edgeserve.pipeline import errors as pipeline_errors
from edgeserve.sources import Camera, CsvReplay, JsonLinesTail, ParquetReplay, Source, Video
from edgeserve.stage.deadletter import DeadLetter
from edgeserve.transport import connect

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
REFERENCE = DOCS / "reference"
BIN = Path(sys.executable).parent
_FENCE = re.compile(r"^(?P<fence>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NOT_RUN = "<!-- not run -->"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it begins on, and what stands right before it."""

    language: str
    text: str
    line: int
    before: str


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text()
    end = 0
    for match in _FENCE.finditer(text):
        yield Block(match["language"], match["text"], text.count("\n", 0, match.start()) + 2, text[end : match.start()].strip())
        end = match.end()


def same(wanted: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    # Dataclasses look their module up.
    module = types.ModuleType("snippets")
    monkeypatch.setitem(sys.modules, "snippets", module)
    printed: str | None = None
    for block in blocks(path):
        place = f"{path.relative_to(ROOT)}:{block.line}"
        if block.language == "yaml" and (name := written_to(block)):
            Path(name).write_text(block.text)
        elif block.language == "python":
            printed = run_python(block, vars(module), place)
        elif block.language == "console":
            run_console(block, place)
        elif block.language == "text" and printed is not None and not block.before:
            assert same(block.text, printed), f"{place} says\n{block.text}\nbut it prints\n{printed}"
            printed = None


def written_to(block: Block) -> str:
    """The name of the file that a block is; "" where it is none."""
    first = block.text.partition("\n")[0]
    return first.removeprefix("# file: ") if first.startswith("# file: ") else ""


def run_python(block: Block, names: dict[str, object], place: str) -> str:
    if name := written_to(block):
        Path(name).write_text(block.text)
        return ""
    source = "\n" * (block.line - 1) + block.text
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, place.rpartition(":")[0], "exec"), names)
    return out.getvalue()


def run_console(block: Block, place: str) -> None:
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert commands[0] == "" and len(commands) > 1, f"{place}: a console block begins with `$ `"
    for command, _, wanted in (text.partition("\n") for text in commands[1:]):
        if block.before.endswith(_NOT_RUN):
            check_command(command, place)
            continue
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        got = done.stdout + done.stderr
        assert same(wanted, got), f"{place}: `{command}` should print\n{wanted}\nbut prints\n{got}"


def check_command(command: str, place: str) -> None:
    """The command exists as written, as far as that can be told without running it."""
    words = shlex.split(command, comments=True)
    if words[0] == "edgeserve":
        with contextlib.suppress(click.exceptions.Exit):
            resolve(command_line, words[1:], place)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"{place}: no such target: {command}"
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for word in words[2:]:
            name, _, extra = word.rstrip("]").partition("[")
            assert name in (project["name"], "."), f"{place}: {name} is not this package"
            assert not extra or set(extra.split(",")) <= set(project["optional-dependencies"]), f"{place}: {word}"
    else:
        assert words[0] in ("git", "cd", "python"), f"{place}: cannot tell whether this is right: {command}"


def resolve(command: click.Command, words: list[str], place: str) -> None:
    context = command.make_context(command.name, words, resilient_parsing=False)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None and found is not None, place
        resolve(found, rest, place)


def test_the_readme_states_what_the_demo_finds() -> None:
    command = [str(BIN / "edgeserve"), "demo", "--json", "--", "--speed", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    text = (ROOT / "README.md").read_text()
    for view, score in json.loads(done.stdout)["scores"].items():
        row = f"| {view} | {score['precision']:.2f} | {score['recall']:.2f} | {score['f1']:.2f} |"
        assert row in text, f"the README lacks this row: {row}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", path.read_text())):
        if "://" in target or target.startswith("#"):
            continue
        assert (path.parent / target.partition("#")[0]).exists(), f"{path.name}: {target}"


def section(path: Path, heading: str) -> str:
    """The text under a heading, up to the next one of its rank."""
    text = path.read_text()
    match = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^\1 |^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"{path.relative_to(ROOT)} has no section {heading!r}"
    return match[2]


def rows(text: str) -> dict[str, str]:
    """Name to row of the tables in a text; a name stands in backquotes in the first column."""
    return {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", text, re.MULTILINE)}


NODES = [edgeserve.DataSource, edgeserve.Compute, edgeserve.Materialize]
SOURCES = [Camera, CsvReplay, JsonLinesTail, ParquetReplay, Video]


@pytest.mark.parametrize(("page", "node"), [*(("nodes.md", each) for each in NODES), *(("sources.md", each) for each in SOURCES)])
def test_every_keyword_of_a_node_is_documented_with_its_default(page: str, node: type) -> None:
    found = rows(section(REFERENCE / page, node.__name__))
    parameters = {name: p for name, p in inspect.signature(node).parameters.items()}
    assert set(parameters) <= set(found), f"not documented: {sorted(set(parameters) - set(found))}"
    assert set(found) <= set(parameters), f"documented, but not there: {sorted(set(found) - set(parameters))}"
    for name, parameter in parameters.items():
        default = parameter.default
        if default is not inspect.Parameter.empty and not (isinstance(default, type) or callable(default)):
            shown = str(default.value) if isinstance(default, Enum) else repr(default)
            assert f"| `{shown}` |" in found[name].replace('"', "'"), f"{node.__name__}({name}=): the default is {shown}"


@pytest.mark.parametrize("node", NODES)
def test_who_comes_from_the_prototype_finds_every_keyword_of_a_node(node: type) -> None:
    """What may be given by position is what the prototype had, but for the two names that changed."""
    text = section(DOCS / "how-to" / "from-the-prototype.md", node.__name__)
    old = {name for name, p in inspect.signature(node).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    old = old - {"node", "final_process"} | {"pulsar_node"} | ({"materialize"} if node is edgeserve.Materialize else set())
    found = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
    assert found == old


@pytest.mark.parametrize("node", NODES)
def test_every_method_of_a_node_is_documented(node: type) -> None:
    text = section(REFERENCE / "nodes.md", "What all nodes can do")
    for name in dir(node):
        if not name.startswith("_"):
            assert f"`{name}" in text, f"{node.__name__}.{name} is not documented"


@pytest.mark.parametrize("source", [Source, *SOURCES])
def test_every_method_of_a_source_is_documented(source: type) -> None:
    text = section(REFERENCE / "sources.md", "What all of them can do")
    for name in dir(source):
        if not name.startswith("_") and name != "resumable":
            assert f"`{name}" in text, f"{source.__name__}.{name} is not documented"


def test_every_type_that_needs_no_gate_is_documented() -> None:
    text = section(REFERENCE / "nodes.md", "Types")
    found = set(re.findall(r"\w+", " ".join(re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE))))
    wanted = set(re.findall(r"\w+", ACCEPTED.replace("msgspec Structs", "Struct"))) - {"inside", "containers", "and", "data"}
    assert wanted <= found, f"not documented: {sorted(wanted - found)}"


def test_the_urls_of_the_default_store_are_documented_with_what_moves_it() -> None:
    found = [row for row in section(REFERENCE / "node-urls.md", "local://").splitlines() if row.startswith("| `local://`")]
    assert len(found) == 1 and "`local:///`" in found[0] and "`EDGESERVE_STATE_DIR`" in found[0]


def test_everything_that_the_package_exports_is_documented() -> None:
    text = "".join(path.read_text() for path in REFERENCE.glob("*.md"))
    for name in set(edgeserve.__all__) - {"__version__"}:
        assert re.search(rf"\b{name}\b", text), f"edgeserve.{name} is not documented"


def test_every_field_of_the_context_is_documented() -> None:
    from edgeserve.stage.context import TaskContext

    found = rows(section(REFERENCE / "nodes.md", "context()"))
    assert set(TaskContext.__dataclass_fields__) == set(found)


def leaves(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, found in command.commands.items():
            yield from leaves(found, f"{path} {name}")
    else:
        yield path, command


@pytest.mark.parametrize(("path", "command"), [pytest.param(*leaf, id=leaf[0]) for leaf in leaves(command_line, "edgeserve")])
def test_every_option_of_a_command_is_documented(path: str, command: click.Command) -> None:
    text = section(REFERENCE / "cli.md", f"`{path}`")
    found = rows(text)
    shared = set(rows(section(REFERENCE / "cli.md", "What every command has")))
    wanted = {option for p in command.params if isinstance(p, click.Option) for option in p.opts}
    assert wanted <= {*found, *shared}, f"{path}: not documented: {sorted(wanted - {*found, *shared})}"
    assert {name for name in found if name.startswith("-")} <= wanted, f"{path}: documented, but not there"
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            name = (parameter.metavar or parameter.name or "").strip("[].").upper()
            assert f"`{name}`" in text, f"{path}: the argument {name} is not documented"


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_every_url_parameter_is_documented(scheme: str, tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match="unknown parameter") as caught:
        connect(f"{scheme}://{tmp_path}?no_such_parameter=1")
    known = set(str(caught.value).rpartition(" knows ")[2].split(", "))
    documented = rows(section(REFERENCE / "node-urls.md", f"{scheme}://"))
    assert {name for name in documented if "://" not in name} == known


def test_every_error_and_warning_is_documented() -> None:
    assert set(rows((REFERENCE / "errors.md").read_text())) >= {*errors.__all__, *(str(reason) for reason in metrics.Reason)}


def test_every_field_of_the_header_is_documented() -> None:
    path = REFERENCE / "frame-format.md"
    assert list(rows(section(path, "The header"))) == list(Header.__struct_fields__)
    assert list(rows(section(path, "A dead letter"))) == [field.encode_name for field in msgspec.structs.fields(DeadLetter)]
    for kind in (*Kind, *TimeKind):
        assert re.search(rf"{int(kind)} {kind.name.lower().replace('_', ' ')}", path.read_text()), kind


def test_everything_of_a_pipeline_is_documented() -> None:
    page = REFERENCE / "pipeline.md"
    methods = {name.partition("(")[0] for name in rows(section(page, "Pipeline"))}
    assert {name for name in dir(Pipeline) if not name.startswith("_")} <= methods
    given = {p for name in ("source", "task", "sink") for p in inspect.signature(getattr(Pipeline, name)).parameters} - {"self", "keywords"}
    assert given <= methods, f"not documented: {sorted(given - methods)}"
    wanted = {name for name, value in vars(pipeline_errors).items() if isinstance(value, type) and issubclass(value, InvalidPipeline)}
    assert set(rows(section(page, "Errors"))) == wanted - {"InvalidPipeline"}
