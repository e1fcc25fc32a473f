"""What runs: the signature of what a user has given, and the stream, task or function that is made of it in its own process."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import is_dataclass
from typing import Any

import msgspec

from edgeserve.core.errors import ConfigurationError
from edgeserve.pipeline.declared import Declared
from edgeserve.pipeline.errors import BadValue
from edgeserve.stage.fuse import Fused
from edgeserve.stage.task import Task, signature_of

_STREAMS = (Iterator, Iterable, Generator, AsyncIterator, AsyncIterable, AsyncGenerator, list)
# The kinds of plain values. Nothing that is one of them on the wire can be taken as another, except that a Struct may be a sequence.
_KINDS: dict[type, str] = {
    **dict.fromkeys((bool, int, float), "number"),
    **dict.fromkeys((bytes, bytearray, memoryview), "bytes"),
    **dict.fromkeys((list, tuple, set, frozenset), "sequence"),
    str: "text",
    dict: "fields",
}


class Signature:
    """What is known of a task or a sink's function before it is made; of a fused task its first stage says what it takes.

    Args:
        declared: the task or the sink.
        named: its parameters are called as its inputs; else it is called with one value. None: as its kind is.

    Attributes:
        parameters: their names; None: not known before it is made.
        annotations: parameter name to annotation; absent where there is none.
    """

    def __init__(self, declared: Declared, *, named: bool | None = None) -> None:
        declared = declared.stages[0]
        self.parameters: tuple[str, ...] | None = None
        self.annotations: dict[str, Any] = {}
        function, what = declared.function, f"{declared.kind} {declared.name!r}"
        if isinstance(function, type):
            if not any("__call__" in vars(base) for base in function.__mro__):
                reason = f"{what}: what the class {function.__name__} makes cannot be called with a message: it has no __call__"
                raise BadValue(reason, declared.at(declared.kind), f"name a function, or a class that has one: it is the {declared.kind}")
            function = types.MethodType(function.__call__, function)  # as an object of the class would have it
        elif declared.made:
            return
        try:
            task = Task(function, what=what, named=declared.kind == "task" if named is None else named)
        except ConfigurationError as exc:
            raise BadValue(str(exc), declared.at(declared.kind), "correct the parameters of the function") from exc
        self.parameters, self.annotations = task.parameters, task.annotations


class Renamed:
    """A task whose inputs have other names than its parameters."""

    def __init__(self, task: Any, inputs: tuple[str, ...]) -> None:
        work = Task(task, what="the task", named=True)
        self._call = work.call
        for method in ("setup", "close"):
            if not inspect.isroutine(task) and hasattr(task, method):
                setattr(self, method, getattr(task, method))
        taken = zip(inputs, work.parameters, strict=True)
        self.__signature__ = signature_of(inputs, {name: work.annotations[own] for name, own in taken if own in work.annotations})

    def __call__(self, *values: Any) -> Any:
        return self._call(*values)


class Relay:
    """A task that hands on what it takes, to those who take it together with something else."""

    def __init__(self, source: str) -> None:
        self.__signature__ = signature_of((source,), {})

    def __call__(self, value: Any) -> Any:
        return value


def stand_in(inputs: tuple[str, ...]) -> Callable[..., Any]:
    """A task that is never run, for a look at what a node would say to its keywords."""

    def nothing(*values: Any) -> None:
        return None

    nothing.__signature__ = signature_of(inputs, {})  # type: ignore[attr-defined]
    return nothing


def make_stream(declared: Declared, replica: int) -> Any:
    """The stream of one replica of a source."""
    return declared.function(**_args(declared, replica)) if callable(declared.function) else declared.function


def make_task(declared: Declared, inputs: tuple[str, ...], replica: int) -> Any:
    """The task of one replica, or the function of a sink's."""
    stages = [each.function(**_args(each, replica)) if each.made else each.function for each in declared.stages]
    made = Fused(stages, what=f"task {declared.name!r}") if len(stages) > 1 else stages[0]
    if declared.kind == "sink":
        return made
    parameters = Task(made, what=f"task {declared.name!r}", named=True).parameters
    if len(inputs) != len(parameters):
        reason = f"task {declared.name!r} takes {', '.join(inputs)}, and has the parameters {', '.join(parameters)}"
        raise BadValue(reason, declared.at("inputs", "sources"), "name one input for each parameter")
    return made if parameters == inputs else Renamed(made, inputs)


def _args(declared: Declared, replica: int) -> dict[str, Any]:
    """What is called with to make what runs. Who has a parameter `replica` is told which one it is."""
    args = dict(declared.args or {})
    if "replica" in parameters_of(declared.function):
        args.setdefault("replica", replica)
    return args


def check_args(declared: Declared) -> None:
    """Raises what is wrong with the arguments of what is called to make a stream, a task or a sink's function."""
    function = declared.function
    if not (declared.made or (declared.kind == "source" and callable(function))):
        return
    try:
        inspect.signature(function).bind(**_args(declared, 0))
    except TypeError as exc:
        reason = f"{declared.kind} {declared.name!r} cannot be made: {getattr(function, '__qualname__', function)}: {exc}"
        raise BadValue(reason, declared.at("args"), "give it what it is called with as args") from exc
    except ValueError:
        return  # a built-in that does not tell


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of what is called, by name; none of what does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def made_type(declared: Declared) -> type | None:
    """The class of what a source or a task is annotated to send; None: nothing is said, or it is no plain class."""
    function, gate = declared.function, declared.keywords.get("gate" if declared.kind == "source" else "gate_out")
    if gate is not None:
        return plain_class(_returned(gate))
    if declared.kind == "source":
        return None if isinstance(function, type) else _item(_returned(function))
    if declared.made and not isinstance(function, type):
        return None
    called = function if inspect.isroutine(function) else (function if isinstance(function, type) else type(function)).__call__
    generates = inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called)
    return _item(_returned(called)) if generates else plain_class(_returned(called))


def _returned(function: Any) -> Any:
    """The annotation of what a function returns; None where there is none that can be resolved."""
    if not inspect.isroutine(function):
        function = type(function).__call__
    try:
        return typing.get_type_hints(inspect.unwrap(function)).get("return")
    except (NameError, TypeError, SyntaxError, AttributeError):
        return None


def _item(hint: Any) -> type | None:
    """The class of the items of a stream, as its annotation says."""
    items = typing.get_args(hint) if typing.get_origin(hint) in _STREAMS else ()
    return plain_class(items[0]) if items else None


def plain_class(hint: Any) -> type | None:
    """The class that an annotation is, None among its alternatives apart; None: it is anything else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [each for each in typing.get_args(hint) if each is not type(None)]
        hint = rest[0] if len(rest) == 1 else None
    if not isinstance(hint, type) or hint is Any or typing.get_origin(hint) is not None or getattr(hint, "_is_protocol", False):
        return None
    return hint


def contradict(sent: type, taken: type, *, untouched: bool = False) -> bool:
    """Whether nothing that is sent as the one class can be taken as the other. Of all but plain values it is not known before they come.

    Args:
        sent: the one.
        taken: the other.
        untouched: it is handed over as it is, so that no dict and no sequence becomes an object with fields.
    """
    kinds = {_kind(sent), _kind(taken)}
    if untouched and kinds == {"fields"}:
        return _is_dict(sent) != _is_dict(taken)
    return len(kinds) == 2 and None not in kinds and (untouched or kinds != {"sequence", "fields"})


def _is_dict(plain: type) -> bool:
    return plain is dict or typing.is_typeddict(plain)


def _kind(plain: type) -> str | None:
    fields = is_dataclass(plain) or typing.is_typeddict(plain) or issubclass(plain, msgspec.Struct)
    return "fields" if fields else _KINDS.get(plain)


__all__ = (
    "Relay",
    "Renamed",
    "Signature",
    "check_args",
    "contradict",
    "made_type",
    "make_stream",
    "make_task",
    "parameters_of",
    "plain_class",
    "stand_in",
)
