"""What an app's file declares: nodes at its top level, or one pipeline. A YAML file is a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeserve.cli.wiring import Drawn, Listed
from edgeserve.compute import Compute
from edgeserve.core.errors import ConfigurationError
from edgeserve.data_source import DataSource
from edgeserve.materialize import Materialize
from edgeserve.pipeline import Pipeline, load_yaml
from edgeserve.pipeline.assignment import apply, read_assignment
from edgeserve.pipeline.backfill import backfill
from edgeserve.pipeline.measure import measured
from edgeserve.pipeline.picture import mermaid, svg
from edgeserve.pipeline.references import load_file

NODES = (DataSource, Compute, Materialize)
YAML = (".yaml", ".yml")


class App:
    """An app's file, which is run or read now.

    Args:
        path: the file.
        node: URL of the node that its pipeline runs on; None: the one that it says.
        host: only what runs there, of a pipeline; None: all.
        recorded: files in place of sources, to run a pipeline over; None: it runs as it is.
        out: files in place of sinks.
        live: sources that have none, and run as they are.
        measure: where it leaves what its tasks take, if it is to be measured.
        messages: how many each source sends then; None: all.
        assignment: a file that says where everything of a pipeline runs; None: it says so itself.

    Attributes:
        pipeline: the one that it declares; None: it has nodes at its top level.
    """

    def __init__(
        self,
        path: Path,
        node: str | None = None,
        host: str | None = None,
        *,
        recorded: Mapping[str, Path] | None = None,
        out: Mapping[str, Path] | None = None,
        live: Collection[str] = (),
        measure: Path | None = None,
        messages: int | None = None,
        assignment: Path | None = None,
    ) -> None:
        self._node, self._host = node, host
        self._module = None if path.suffix in YAML else load_file(path)
        self.pipeline = load_yaml(path) if self._module is None else _pipeline(self._module, path)
        if self.pipeline is None and any(given is not None for given in (node, host, assignment)):
            raise ConfigurationError(
                f"{path.name} declares no pipeline, and its nodes say themselves where they run: leave out --node, --host and --assignment"
            )
        if self.pipeline is not None and assignment is not None:
            self.pipeline = apply(self.pipeline, read_assignment(assignment), str(assignment))
        if self.pipeline is not None and out is not None:
            self.pipeline = backfill(self.pipeline, recorded or {}, out, live)
        if self.pipeline is not None and measure is not None:
            self.pipeline = measured(self.pipeline, recorded or {}, measure, messages)

    def listed(self) -> list[Listed]:
        """Its nodes, in the order of their definition."""
        found = self._nodes() if self.pipeline is None else self.pipeline.look(self._node, host=self._host)
        return [Listed(name, type(node).__name__, node.url, node.wiring) for name, node in found.items()]

    def drawn(self) -> Drawn | None:
        """Its pipeline, in every form that it can be shown in."""
        if self.pipeline is None:
            return None
        graph = self.pipeline.graph()
        return Drawn(graph.to_dict(), mermaid(graph), svg(graph))

    def make(self, name: str) -> Any:
        """One of its nodes, to be run."""
        return self._nodes()[name] if self.pipeline is None else self.pipeline.node(name, self._node)

    def _nodes(self) -> dict[str, Any]:
        """The nodes at the top level of the module; those in a list as `name[index]`."""
        found: dict[str, Any] = {}
        seen: set[int] = set()
        for name, node in _candidates(self._module):
            if isinstance(node, NODES) and id(node) not in seen:
                seen.add(id(node))
                found[name] = node
        return found


def _pipeline(module: ModuleType, path: Path) -> Pipeline | None:
    found = {id(value): (name, value) for name, value in vars(module).items() if isinstance(value, Pipeline)}
    if not found:
        return None
    nodes = [name for name, value in _candidates(module) if isinstance(value, NODES)]
    names = [name for name, _ in found.values()]
    if len(found) > 1 or nodes:
        raise ConfigurationError(f"{path.name} declares {', '.join([*names, *nodes])}: a file has one pipeline, or nodes at its top level")
    return next(iter(found.values()))[1]


def _candidates(module: ModuleType | None) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        if isinstance(value, list | tuple):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        else:
            yield name, value


__all__ = ("NODES", "YAML", "App")
