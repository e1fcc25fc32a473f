"""`Materialize`: hands the results of a topic to a destination."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from edgeserve.stage.base import Options
from edgeserve.stage.external import FETCH_MAX_BYTES, FETCH_TIMEOUT_MS, external_inputs
from edgeserve.stage.files import Files
from edgeserve.stage.keywords import check_keywords
from edgeserve.stage.node import StageNode
from edgeserve.stage.payloads import Payloads
from edgeserve.stage.shed import Backlog, Keep, how_many
from edgeserve.stage.sink import Sink
from edgeserve.stage.steplog import step_log
from edgeserve.stage.task import Task
from edgeserve.stage.wiring import Wiring
from edgeserve.transport import GroupKind, Start


class Materialize(StageNode):
    """Hands every message of a topic to a function.

    Members of one `group` share the messages, different groups each see all. On one host, what the function has done is not done again
    after a crash; only the message that was in its hands may come again, with `edgeserve.context().redelivered` set.

    Args:
        final_process: a function, `async def`, generator or object with `__call__` (and `setup`, `close`); takes one value.
        node: URL of the node. `pulsar_node=` is an older name for it.
        gate: maps a payload to the value the function gets; None drops the message, counted as 'gate'.
        ftp: messages name files, ftp://host/path: the function gets the path of a copy, and `next` returns that one's URL.
        ftp_delete: a file is deleted on its server when its message is settled.
        local_ftp_path: the directory that this machine's FTP server serves, where copies go.
        topic: where the messages come from.
        log_path: directory of a log of every step, `<log_filename>.destination`; None: no log.
        log_filename: default: the topic's name.
        group: the group's name.
        start: where a new group begins: 'earliest', 'latest' or a publish time in ns.
        timeout_ms: how long `next` waits before it raises ReceiveTimeout; None: for ever.
        on_error: None: a message whose function keeps failing becomes a dead letter and the stage goes on; 'raise': raise it as well.
        retries: how often a failed call is repeated.
        retry_backoff_ms: pause before the first repetition; it doubles with each.
        ack_timeout_ms: a message not settled by then goes to another member.
        fetch: what a message may name by its URL, so that the function gets what lies there (bytes, or the path of a copy where the
            annotation is `pathlib.Path`): URLs below which all is allowed, https://host/path/, http://, s3://bucket/, ftp://, file:///path/.
            Empty: URLs are text.
        fetch_max_bytes: a larger file is refused.
        fetch_timeout_ms: how long one may take.
        backlog: what becomes of messages that wait while the function is busy. 'all': they wait, and hold back their senders where the
            engine does that; 'block': on every engine. 'drop_oldest': the newest `max_backlog` of
            each source wait, the others are dropped, counted as 'overflow'. 'latest': the newest of each source and key waits, the others
            are dropped, counted as 'superseded'. What is dropped holds nobody back.
        max_backlog: with 'drop_oldest'; None: 100.

    Example:
        >>> from edgeserve.data_source import DataSource
        >>> with DataSource([1, 2], "memory://docs-sink", source_id="n", topic="n") as source:
        ...     _ = [next(source), next(source)]
        >>> with Materialize(lambda n: n * 10, "memory://docs-sink", topic="n") as sink:
        ...     next(sink), next(sink)
        (10, 20)
    """

    def __init__(
        self,
        final_process: Callable[..., Any],
        node: str | None = None,
        gate: Callable[[Any], Any] | None = None,
        ftp: bool = False,
        ftp_delete: bool = False,
        local_ftp_path: str | os.PathLike[str] = "/srv/ftp/",
        topic: str = "dst",
        log_path: str | os.PathLike[str] | None = None,
        log_filename: str | None = None,
        *,
        pulsar_node: str | None = None,
        group: str = "materialize",
        start: Start = "earliest",
        timeout_ms: float | None = None,
        on_error: Literal["raise"] | None = None,
        retries: int = 3,
        retry_backoff_ms: float = 100,
        ack_timeout_ms: int = 300_000,
        fetch: Sequence[str] = (),
        fetch_max_bytes: int = FETCH_MAX_BYTES,
        fetch_timeout_ms: float = FETCH_TIMEOUT_MS,
        backlog: Backlog = "all",
        max_backlog: int | None = None,
    ) -> None:
        super().__init__(node, pulsar_node, what="Materialize", name=topic)
        check_keywords(
            "Materialize",
            topic=topic,
            ftp=ftp,
            ftp_delete=ftp_delete,
            local_ftp_path=local_ftp_path,
            group=group,
            start=start,
            timeout_ms=timeout_ms,
            on_error=on_error,
            retries=retries,
            retry_backoff_ms=retry_backoff_ms,
            ack_timeout_ms=ack_timeout_ms,
            fetch=fetch,
            fetch_max_bytes=fetch_max_bytes,
            fetch_timeout_ms=fetch_timeout_ms,
            backlog=backlog,
            max_backlog=max_backlog,
        )
        newest = how_many(f"Materialize {topic!r}", backlog, max_backlog)
        self._check_callables("Materialize", gate=gate)
        self._payloads = Payloads(f"Materialize {topic!r}", "eager", None, self._control, reads=(topic, group))
        options = Options(
            what="Materialize",
            name=topic,
            topics=(topic,),
            group=group,
            kind=GroupKind.SHARED,
            signature=f"backlog={backlog!r}" if newest else "",
            start=start,
            timeout_ms=timeout_ms,
            on_error=on_error,
            retries=retries,
            retry_backoff_ms=retry_backoff_ms,
            ack_timeout_ms=ack_timeout_ms,
            keep=Keep(newest, backlog == "latest") if newest else None,
            holds_senders=None if backlog == "all" else backlog == "block",
            payloads=self._payloads,
        )
        task = Task(final_process, what="Materialize", named=False)
        if ftp:
            self._files = self._payloads.files = Files(f"Materialize {topic!r}", local_ftp_path, group, delete=ftp_delete, sink=True)
            self._files.wrap(task)
        if fetch:
            self._files = external_inputs(f"Materialize {topic!r}", fetch, fetch_max_bytes, fetch_timeout_ms, ftp=ftp)
            self._files.wrap(task)
        log = step_log(log_path, log_filename, topic, "destination")
        self._logs = (log,)
        self.wiring = Wiring(topic_in=topic)
        self._stage = Sink(options, self._control, self._counts, task=task, gate=gate, url=self.url, log=log)


__all__ = ("Materialize",)
