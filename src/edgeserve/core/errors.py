"""Every error and warning that edgeserve raises, in one tree under `EdgeServeError`.

A subclass also inherits the built-in that fits it, so that code which knows nothing of edgeserve can catch it.
"""

from __future__ import annotations


class EdgeServeError(Exception):
    """The root of every error that edgeserve raises."""


class ConfigurationError(EdgeServeError, ValueError):
    """An argument, a keyword or a URL parameter that cannot work; the message names it and what is accepted."""


class UsedAfterFork(EdgeServeError, RuntimeError):
    """An object was used in a process other than the one that made it."""


class ClosedError(EdgeServeError, RuntimeError):
    """A node, subscription or publisher was used after it was closed."""


class ReceiveTimeout(EdgeServeError, TimeoutError):
    """`next(node)` with `timeout_ms=` saw no message in time."""


class SendError(EdgeServeError, OSError):
    """An earlier send failed; raised by the next call on the same node."""


class TooLarge(SendError):
    """One message is larger than the node takes at all; it was not sent."""


# --- messages -------------------------------------------------------------------------------------------------


class MessageError(EdgeServeError, ValueError):
    """What arrived cannot be taken as a message; `reason` is the counter it is counted under."""

    reason = "foreign"


class ForeignMessage(MessageError):
    """The frame does not start as an edgeserve frame does: another program wrote it."""


class TruncatedMessage(MessageError):
    """The frame ends before the length that it states."""

    reason = "truncated"


class CorruptMessage(MessageError):
    """The frame's checksum does not match its content."""

    reason = "corrupt"


class NewerFormat(MessageError):
    """The frame was written in a format version newer than this installation reads."""

    reason = "newer"


class PayloadMismatch(MessageError, TypeError):
    """The payload does not fit the type that the consumer's annotation asks for, or the columns of a sink."""

    reason = "schema"


class PayloadGone(MessageError, LookupError):
    """The payload that a message refers to is not where it was."""

    reason = "payload_gone"


class NotAllowed(MessageError):
    """What a message names by a URL, or the host that it says has its payload, is none that this node fetches from; or it is too large."""

    reason = "not_allowed"


class FetchError(EdgeServeError, OSError):
    """What a message names by a URL could not be had: it is not there, not allowed, too large, or did not come in time."""


class BadRow(EdgeServeError, ValueError):
    """A row or a line of a file is no example; the message names the file, the place in it, and what to do."""


class UnsupportedType(EdgeServeError, TypeError):
    """A value of this type cannot be sent without a gate, or not be written by a sink; the message says which types can."""


class MissingExtra(EdgeServeError, ImportError):
    """An optional dependency is not installed; the message names the command that installs it."""


class UnknownSource(MessageError, KeyError):
    """A message names a source id that is not a parameter of the task."""

    reason = "unknown_source"

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class FileBusy(EdgeServeError, BlockingIOError):
    """Another sink, in this process or another one, writes to the file or directory."""


class JoinOverflow(EdgeServeError, BufferError):
    """A join with `overflow='error'` already holds `max_held` items of a source; the refused item was not taken."""


# --- transport ------------------------------------------------------------------------------------------------


class TransportError(EdgeServeError, ConnectionError):
    """The engine behind a node URL could not do what was asked."""


class UnknownTopic(TransportError):
    """There is no topic of this name."""


class UnknownScheme(ConfigurationError):
    """No engine is registered for the URL's scheme; the message lists the known ones."""


class GroupBusy(TransportError):
    """The group is exclusive and has a live member."""


class GroupConflict(TransportError):
    """Live members of one group run tasks with different signatures or subscription kinds."""


class Fenced(TransportError):
    """Another holder has taken over the log; this one may no longer append or settle."""


class StoreFull(TransportError, MemoryError):
    """The store reached its size limit; nothing of the refused batch was written, all acknowledged data is kept."""


class DiskFull(TransportError):
    """The filesystem has no space left; nothing of the refused batch was written, all acknowledged data is kept."""


class StoreDamaged(TransportError):
    """The store's files are damaged beyond what can be opened; the message names the file and what was saved."""


class StoreDamagedWarning(UserWarning):
    """The store's files were damaged; what could be read was saved and the rest is named in the message."""


class StoreVersion(TransportError):
    """The store was written by a version of edgeserve whose disk format this one does not read."""


class SkewWarning(UserWarning):
    """The event times of two sources lie further apart than the join tolerates, so no set can form."""


__all__ = (
    "BadRow",
    "ClosedError",
    "ConfigurationError",
    "CorruptMessage",
    "DiskFull",
    "EdgeServeError",
    "Fenced",
    "FetchError",
    "FileBusy",
    "ForeignMessage",
    "GroupBusy",
    "GroupConflict",
    "JoinOverflow",
    "MessageError",
    "MissingExtra",
    "NewerFormat",
    "NotAllowed",
    "PayloadGone",
    "PayloadMismatch",
    "ReceiveTimeout",
    "SendError",
    "SkewWarning",
    "StoreDamaged",
    "StoreDamagedWarning",
    "StoreFull",
    "StoreVersion",
    "TooLarge",
    "TransportError",
    "TruncatedMessage",
    "UnknownScheme",
    "UnknownSource",
    "UnknownTopic",
    "UnsupportedType",
    "UsedAfterFork",
)
