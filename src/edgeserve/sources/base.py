"""What a `DataSource` can do with a stream beyond taking its items: wake it, tell it how far it has come, close it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self


class Source(Iterator[Any]):
    """A stream with a position. A `DataSource` that was given one wakes it to end its wait, and closes it with itself.

    Attributes:
        resumable: whether `commit` does anything. A `DataSource` calls it every second, or every 10,000 items if that is sooner, when what
            it has taken is durable; and when it ends.
    """

    resumable: bool = True

    @abstractmethod
    def __next__(self) -> Any:
        """The next item. None is none: it says that `wake` was called, or that nothing has come for a second and what came before is not
        committed."""

    @abstractmethod
    def wake(self) -> None:
        """Makes a `next()` that waits in another thread, or else the next one that would wait, return None at once."""

    @abstractmethod
    def commit(self) -> None:
        """All items so far are safe where they went: a new start goes on behind them."""

    @abstractmethod
    def close(self) -> None:
        """Ends the stream, from any thread: a `next()` that waits raises StopIteration, and so do later ones. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


__all__ = ("Source",)
