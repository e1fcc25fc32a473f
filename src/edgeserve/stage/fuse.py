"""`fuse=[decode, detect]`: tasks that run as one, each of which hands its results to the next one as the objects that they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import AsyncGeneratorType, CoroutineType, GeneratorType, TracebackType
from typing import Any

from edgeserve.stage.aio import Coroutines, InOneTask
from edgeserve.stage.task import DEFERRED, Several, Task, signature_of

_END: Any = object()
_OF_SEVERAL = frozenset({GeneratorType, Several})


class Fused:
    """A task made of stages: the first one takes the task's inputs, the results of the last one are the task's.

    An object that a stage yields goes through the rest before the next one is asked for, so that no more than one is there at a time.

    Args:
        stages: functions and objects, as tasks are. All but the first are called with one value.
        what: whose they are, for people.
    """

    def __init__(self, stages: Sequence[Any], *, what: str) -> None:
        # One loop for all: what a stage has made on it, the next one may await.
        self._coroutines = Coroutines("edgeserve-task")
        made = [_Stage(stage, number, len(stages), what, self._coroutines) for number, stage in enumerate(stages)]
        self._before, self._last = made[:-1], made[-1]
        self._set_up = ExitStack()
        self.__signature__ = signature_of(made[0].parameters, made[0].annotations)

    def setup(self) -> None:
        """Sets the stages up, in order. When one cannot be, those before it are closed."""
        with ExitStack() as stack:
            stack.callback(self._coroutines.close)
            for stage in (*self._before, self._last):
                stage.open()
                stack.callback(stage.close)
            self._set_up = stack.pop_all()

    def __call__(self, *values: Any) -> Any:
        return self._from(0, values)

    def close(self) -> None:
        """Closes the stages that are set up, the last one first; all of them, whatever one raises."""
        self._set_up.close()

    def _from(self, begin: int, values: tuple[Any, ...]) -> Any:
        """What the stages from this one on make of its inputs: a result, None, `Several` or a generator of results."""
        for number in range(begin, len(self._before)):
            stage = self._before[number]
            with stage:
                result = stage.call(*values)
                if type(result) in DEFERRED:
                    result = self._begun(result)
            if result is None:
                return None
            if type(result) is GeneratorType or type(result) is InOneTask:
                return self._each(number, result)
            values = (result,)
        with self._last:
            return self._last.finish(self._last.call(*values))

    def _begun(self, made: Any) -> Any:
        """What a call has returned, as far as it can be had without keeping several objects: a coroutine's result, or a generator."""
        while type(made) is CoroutineType:
            made = self._coroutines.run(made)
        return InOneTask(made, self._coroutines) if type(made) is AsyncGeneratorType else made

    def _each(self, number: int, items: Any) -> Iterator[Any]:
        """What the stages behind this one make of what it yields. Nothing is referred to longer than it is needed."""
        stage = self._before[number]
        try:
            while True:
                with stage:
                    item = next(items, _END)
                if item is _END:
                    return
                result: Any = None if item is None else self._from(number + 1, (item,))
                del item
                if type(result) in _OF_SEVERAL:
                    yield from result
                elif result is not None:
                    yield result
                del result
        finally:
            with stage:
                items.close()


class _Stage(Task):
    """One of them. As a context manager it says in what is raised that it was this one."""

    def __init__(self, task: Any, number: int, of: int, what: str, coroutines: Coroutines) -> None:
        super().__init__(task, what=f"{what}: fuse[{number}]", named=number == 0, coroutines=coroutines)
        self._note = f"in stage {number + 1} of {of}, {name_of(task)}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and self._note not in getattr(error, "__notes__", ()):
            error.add_note(self._note)

    def open(self) -> None:
        with self:
            super().open()

    def close(self) -> None:
        with self:
            super().close()


def name_of(stage: Any) -> str:
    """What a stage is called where it is shown: as the function, or as the class of the object."""
    return str(getattr(stage, "__name__", type(stage).__name__))


__all__ = ("Fused", "name_of")
