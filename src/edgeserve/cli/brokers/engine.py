"""What a broker's engine tells the code that starts, watches and stops it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgeserve.cli.brokers.record import Shelf

HOST = "127.0.0.1"
Progress = Callable[[str], None]
"""Takes a line that says what is being done."""


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Attributes:
        port: where clients connect; None: the engine's usual one.
        admin_port: Pulsar's HTTP port; None: the usual one.
        data: where the broker keeps its data; None: in its directory.
        source: 'maven', 'docker' or 'auto': where Pulsar comes from.
        home: an unpacked Pulsar distribution.
        plain: leave the broker's settings as they ship.
        token: clients must show it; never on a command line, never in the record.
        settings: Pulsar's own, by its names, beside those that edgeserve sets.
        only_at_start: the options asked for that one which runs already cannot take, as the user wrote them.
    """

    port: int | None = None
    admin_port: int | None = None
    data: Path | None = None
    source: Literal["auto", "docker", "maven"] = "auto"
    home: Path | None = None
    plain: bool = False
    token: str | None = field(default=None, repr=False)
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    only_at_start: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A server ready to be started: the command, where it runs, what is added to its environment, and what it is."""

    command: tuple[str, ...]
    directory: Path
    environment: Mapping[str, str]
    source: str
    container: str = ""


class Engine(ABC):
    """A kind of broker."""

    name: str
    title: str
    port: int
    admin_port: int = 0
    start_s: float
    stop_s: float

    @abstractmethod
    def check(self, wish: Wish) -> None:
        """Refuses what cannot apply to a broker of this kind, whether one runs or not."""

    @abstractmethod
    def prepare(self, wish: Wish, shelf: Shelf, port: int, admin_port: int, data: Path, progress: Progress) -> Launch:
        """Finds the server, brings it to this machine where it comes from elsewhere, and writes its settings."""

    @abstractmethod
    def url(self, port: int, admin_port: int) -> str:
        """The node URL."""

    @abstractmethod
    def trouble(self, port: int, admin_port: int) -> str | None:
        """None where the server answers and can be used; else what is wrong."""


__all__ = ("HOST", "Engine", "Launch", "Progress", "Wish")
