"""How a user's task is called: functions, `async def`, generators, objects with `setup`, `__call__`, `close`."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgeserve.core.errors import ConfigurationError
from edgeserve.stage.aio import Coroutines, collect

DEFERRED = frozenset({types.GeneratorType, types.AsyncGeneratorType, types.CoroutineType})
"""Types of a call's return value that still have to be run. A set, so that the loop asks with one look."""


class Several(list[Any]):
    """The results of a generator: each becomes a message of its own. A list that a task returns is one result."""


class Task:
    """A user's callable and what is known of it.

    Attributes:
        call: takes the inputs in the order of `parameters`; what it returns goes through `finish` when its type is in `DEFERRED`.
        parameters: the names of the sources.
        annotations: parameter name to annotation; absent where there is none.

    Args:
        task: what the user has given.
        what: whose it is, for people.
        named: its parameters are called as its sources; else it is called with one value.
        coroutines: run what is async, and are closed by whoever has made them; None: its own.
    """

    def __init__(self, task: Any, *, what: str, named: bool, coroutines: Coroutines | None = None) -> None:
        if not callable(task):
            raise ConfigurationError(f"{what} needs a callable, got {type(task).__name__}: pass a function or an object with __call__")
        if isinstance(task, type):
            raise ConfigurationError(f"{what} got the class {task.__name__}: pass an instance of it")
        self._task = task
        self._coroutines = coroutines or Coroutines("edgeserve-task")
        self._closes_coroutines = coroutines is None
        self.name: str = getattr(task, "__qualname__", type(task).__qualname__)
        plain = inspect.isroutine(task) or isinstance(task, type)
        self._setup = None if plain else getattr(task, "setup", None)
        self._close = None if plain else getattr(task, "close", None)
        self._open = False
        self.call: Callable[..., Any] = task
        parameters = _parameters(task, what) if named else _first_parameter(task, what)
        self.parameters = tuple(p.name for p in parameters)
        self.annotations = {p.name: _annotation(task, p, what) for p in parameters if p.annotation is not p.empty}
        keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if keyword:
            split = len(parameters) - len(keyword)
            names = tuple(keyword)
            self.call = lambda *values: task(*values[:split], **dict(zip(names, values[split:], strict=True)))

    def open(self) -> None:
        """Calls the object's `setup`, in the process that will run it. When that fails, it is called again the next time."""
        if not self._open:
            if self._setup is not None:
                try:
                    self.finish(self._setup())
                except BaseException:
                    if self._closes_coroutines:
                        self._coroutines.close()
                    raise
            self._open = True

    def finish(self, value: Any) -> Any:
        """Runs what a call has returned to its end: a coroutine to its result, a generator to `Several`."""
        if isinstance(value, types.CoroutineType):
            return self.finish(self._coroutines.run(value))
        if isinstance(value, types.GeneratorType):
            return Several(item for item in value if item is not None)
        if isinstance(value, types.AsyncGeneratorType):
            return Several(item for item in collect(value, self._coroutines) if item is not None)
        return value

    def close(self) -> None:
        """Calls the object's `close`, once, if it was set up."""
        if self._open:
            self._open = False
            try:
                if self._close is not None:
                    self.finish(self._close())
            finally:
                if self._closes_coroutines:
                    self._coroutines.close()


def signature_of(names: Sequence[str], annotations: Mapping[str, Any]) -> inspect.Signature:
    """The signature of a task whose parameters are called so: names to annotations, where there are any."""
    plain, nothing = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return inspect.Signature([inspect.Parameter(name, plain, annotation=annotations.get(name, nothing)) for name in names])


def _signature(task: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(task).parameters.values())


def _parameters(task: Any, what: str) -> list[inspect.Parameter]:
    try:
        parameters = _signature(task)
    except (TypeError, ValueError) as exc:
        raise ConfigurationError(
            f"{what} cannot read the parameters of {task!r}: wrap it in a function whose parameter names are the source ids"
        ) from exc
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigurationError(f"{what}: parameter {str(parameter)!r} names no source: give each source id a parameter of its own")
    if not parameters:
        raise ConfigurationError(f"{what}: {task!r} has no parameters: its parameter names are the source ids that it wants")
    return parameters


def _first_parameter(task: Any, what: str) -> list[inspect.Parameter]:
    """A sink's only input may have any name; a built-in without a signature is fine too."""
    try:
        signature = inspect.signature(task)
    except (TypeError, ValueError):
        return []
    try:
        signature.bind(None)
    except TypeError as exc:
        raise ConfigurationError(f"{what}: {task!r} is called with one value, and cannot be: {exc}") from exc
    parameters = list(signature.parameters.values())
    return [p for p in parameters[:1] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _closure(function: Any) -> dict[str, Any]:
    """The names that a function takes from around it, as far as they have a value by now."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _annotation(task: Any, parameter: inspect.Parameter, what: str) -> Any:
    annotation = parameter.annotation
    if not isinstance(annotation, str):
        return annotation
    function = task if inspect.isroutine(task) else type(task).__call__
    function = inspect.unwrap(getattr(function, "__func__", function))
    closure = _closure(function)
    holder = types.SimpleNamespace(__annotations__={parameter.name: annotation})
    try:
        return typing.get_type_hints(holder, getattr(function, "__globals__", {}), closure, include_extras=True)[parameter.name]
    except (NameError, TypeError, SyntaxError, AttributeError) as exc:
        raise ConfigurationError(
            f"{what}: the annotation {annotation!r} of parameter {parameter.name!r} cannot be resolved ({exc}): "
            "import its names at run time, in the module that defines the task"
        ) from exc


__all__ = ("DEFERRED", "Several", "Task", "signature_of")
