"""What can come of asking a server, and who wants to know about the connection."""

from __future__ import annotations

from typing import Any, Protocol

from edgeserve.core.errors import TransportError


class User(Protocol):
    """Who is told about the connection. Both are called in the loop and must not wait."""

    def up(self) -> None:
        """There is a new connection."""

    def tick(self, away_s: float) -> None:
        """A second has passed; there has been no server for `away_s`."""

    def forbidden(self, subject: str, error: TransportError) -> None:
        """The server refused to let this connection publish or subscribe to a subject, given in lower case."""


class ApiError(TransportError):
    """What JetStream answers instead of what was asked for."""

    def __init__(self, what: str, error: dict[str, Any]) -> None:
        self.code, self.err_code = int(error.get("code", 0)), int(error.get("err_code", 0))
        super().__init__(f"{what}: {error.get('description', 'no reason given')} (JetStream error {self.err_code})")

    @property
    def missing(self) -> bool:
        """Whether what was asked about does not exist."""
        return self.code == 404


class Lost(TransportError):
    """The connection ended before the answer came."""


__all__ = ("ApiError", "Lost", "User")
