"""What the keywords of the nodes take: one table, so that each is refused by name, with its value, and before anything is connected."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from edgeserve.core.errors import ConfigurationError
from edgeserve.stage.shed import MOST_WAITING
from edgeserve.transport.checks import MAX_NAME_BYTES


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _milliseconds(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and float(value) >= 0


def _name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value and len(value.encode(errors="replace")) <= MAX_NAME_BYTES


def _one_of(value: Any, *words: str) -> bool:
    return isinstance(value, str) and value in words


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_Check = tuple[Callable[[Any], bool], str]
_MILLISECONDS: _Check = (_milliseconds, "a number of milliseconds, 0 or more")
_MILLISECONDS_OR_NONE: _Check = (_or_none(_milliseconds), "a number of milliseconds, 0 or more, or None")
_NAME: _Check = (_name, f"a name, a str of 1 to {MAX_NAME_BYTES} bytes without NUL")
_NAME_OR_NONE: _Check = (_or_none(_name), f"a name, a str of 1 to {MAX_NAME_BYTES} bytes without NUL, or None for the default")
_FLAG: _Check = (lambda value: isinstance(value, bool), "True or False")
_MESSAGES: _Check = (lambda value: _whole(value, 1), "a number of messages, an int of at least 1")

MOST_PARTITIONS = 256

_CHECKS: dict[str, _Check] = {
    "ack_timeout_ms": (lambda value: value is None or (_milliseconds(value) and value > 0), "a number of milliseconds above 0, or None"),
    "backlog": (lambda value: _one_of(value, "all", "block", "drop_oldest", "latest"), "'all', 'block', 'drop_oldest' or 'latest'"),
    "by": (
        lambda value: value is None or value is True or callable(value),
        "None, True for the key in the messages' headers, or a function of a payload that returns one",
    ),
    "drop_if_older_than_ms": _MILLISECONDS_OR_NONE,
    "fetch": (
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(url, str) for url in value),
        "a list of the URLs below which may be fetched, such as ['https://data.example.org/frames/', 's3://bucket/']",
    ),
    "fetch_max_bytes": (lambda value: _whole(value, 1), "a number of bytes, an int of at least 1"),
    "fetch_timeout_ms": (lambda value: _milliseconds(value) and value > 0, "a number of milliseconds above 0"),
    "durability": (
        lambda value: _one_of(value, "origin", "broker"),
        "'origin' or 'broker' (how safe a local:// store itself is, is said in the node URL: ?durability=disk)",
    ),
    "ftp": _FLAG,
    "ftp_delete": _FLAG,
    "ftp_memory": _FLAG,
    "fuse": (
        lambda value: value is None or (isinstance(value, (list, tuple)) and len(value) > 0),
        "a list of the task's stages, the first of which takes its inputs, or None",
    ),
    "group": _NAME,
    "join": (lambda value: value is not None, "'latest', 'exact' or a policy"),
    "lazy_bytes": (lambda value: _whole(value, 1), "the size from which payloads stay, an int of bytes, 1 or more"),
    "local_ftp_path": (
        lambda value: isinstance(value, (str, os.PathLike)) and "\0" not in (path := str(value)) and path != "",
        "the path of a directory",
    ),
    "log_verbose": _FLAG,
    "max_backlog": (
        lambda value: value is None or (_whole(value, 1) and int(value) <= MOST_WAITING),
        f"how many messages of a source may wait, an int from 1 to {MOST_WAITING}, or None for the default",
    ),
    "max_held": _MESSAGES,
    "max_lateness_ms": _MILLISECONDS,
    "max_time_diff_ms": _MILLISECONDS,
    "min_interval_ms": _MILLISECONDS,
    "no_overlap": _FLAG,
    "on_error": (lambda value: value is None or _one_of(value, "raise"), "None (dead letter, go on) or 'raise'"),
    "output_id": _NAME_OR_NONE,
    "overflow": (lambda value: _one_of(value, "drop_oldest", "error"), "'drop_oldest' or 'error'"),
    "partitions": (
        lambda value: _whole(value, 1) and int(value) <= MOST_PARTITIONS,
        f"into how many parts keys are divided, an int from 1 to {MOST_PARTITIONS}: each costs its holder some threads",
    ),
    "retries": (lambda value: _whole(value, 0), "how often a failed call is repeated, an int of 0 or more"),
    "retry_backoff_ms": _MILLISECONDS,
    "routing": (lambda value: _one_of(value, "eager", "lazy", "auto"), "'eager', 'lazy' or 'auto'"),
    "send_window": _MESSAGES,
    "start": (
        lambda value: _one_of(value, "earliest", "latest") or _whole(value, 0),
        "'earliest', 'latest' or a publish time in integer ns",
    ),
    "task_version": (
        lambda value: isinstance(value, str) and value.isprintable() and len(value.encode(errors="replace")) <= 100,
        "a word of at most 100 bytes, such as '2.1', or '' for none",
    ),
    "timeout_ms": _MILLISECONDS_OR_NONE,
    "topic": _NAME,
    "topic_in": _NAME,
    "topic_out": _NAME,
    "worker_id": _NAME,
}


def check_keywords(node: str, **given: Any) -> None:
    """Raises `ConfigurationError` for the first keyword of a node whose value cannot work."""
    for name, value in given.items():
        fits, must_be = _CHECKS[name]
        if not fits(value):
            raise ConfigurationError(f"{node}: {name}={reprlib.repr(value)}: it is {must_be}")


__all__ = ("check_keywords",)
