"""`Compute`: runs a task on the messages of its sources, or on the sets that they form, and sends the results on."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

from edgeserve.align import Policy, make_policy, makes_policies
from edgeserve.core.codec import as_parameter, check_source_id
from edgeserve.core.errors import ConfigurationError
from edgeserve.core.message import Key
from edgeserve.stage.assignment import partition_group, whole_of
from edgeserve.stage.base import Options, Steps
from edgeserve.stage.emit import Emitter
from edgeserve.stage.external import FETCH_MAX_BYTES, FETCH_TIMEOUT_MS, external_inputs
from edgeserve.stage.files import Files
from edgeserve.stage.fuse import Fused
from edgeserve.stage.keywords import check_keywords
from edgeserve.stage.node import StageNode
from edgeserve.stage.partitioned import Partitioned, refuse_other_partitions
from edgeserve.stage.payloads import LAZY_BYTES, Durability, Payloads, Routing, in_place
from edgeserve.stage.replicated import Replicated
from edgeserve.stage.runset import RunSet
from edgeserve.stage.sets import SOURCE_ID
from edgeserve.stage.shed import Backlog, Keep, how_many
from edgeserve.stage.single import SingleTask
from edgeserve.stage.steplog import step_log
from edgeserve.stage.task import Task
from edgeserve.stage.wiring import Wiring
from edgeserve.transport import GroupKind, Start, Transport
from edgeserve.transport.checks import MAX_NAME_BYTES, check_name


class Compute(StageNode):
    """Runs `task` on every message of its source, or, with several parameters, on the sets that the join policy forms of them.

    Args:
        task: a function, `async def`, generator (several results) or object with `__call__` (and `setup`, `close`). Its parameter names
            are the ids of the sources; an annotation picks the type that a payload is decoded as. None: `fuse` is given.
        node: URL of the node. `pulsar_node=` is an older name for it.
        worker_id: names this worker; the source id of its results unless `output_id` is given.
        gate_in: maps a payload to the value the task gets; None drops the message, counted as 'gate'.
        gate_out: maps a result to bytes (or to any value that can be sent); None drops it, counted as 'gate'.
        ftp: messages name files, ftp://host/path, on this machine or on a host that the environment variable EDGESERVE_FTP_HOSTS lists; the
            task gets the paths of copies, and its text or bytes become a file whose URL is sent.
        ftp_memory: the task gets what is in the files, as bytes, and what it returns is sent itself.
        ftp_delete: a file is deleted on its server when its message is settled.
        local_ftp_path: the directory that this machine's FTP server serves, where copies and results go.
        topic_in: where the messages come from.
        topic_out: where the results go.
        max_time_diff_ms: the largest spread of the event times in a set.
        no_overlap: every message is used in at most one set.
        min_interval_ms: the least time between the starts of two runs; the newest messages run in the end.
        log_path: directory of logs, `<log_filename>.compute` of every step and `<log_filename>.output` of every result; None: no logs.
        log_filename: default: the worker id.
        drop_if_older_than_ms: drops messages published longer ago than this, counted as 'late'.
        log_verbose: logs each message of a join too, whether it completes a set or not.
        group: members of a group share the work; default: one group per pair of topic_in and topic_out.
        join: 'latest', 'exact', or a Policy made with the parameter names as its sources.
        by: what the join runs per: True: the key in the messages' headers; a function: what it returns (str, int or bytes) for a payload.
            Messages of different keys never meet, and `min_interval_ms` and `no_overlap` hold for each key. None: all messages may meet.
        partitions: with `by`, into how many parts keys are divided. Each part has a join of its own that one replica holds, which also runs
            its sets, in order; replicas hold as many each. 1: one replica holds the join of all keys, and all of them run its sets.
        start: where a new group begins: 'earliest', 'latest' or a publish time in ns.
        timeout_ms: how long `next` waits before it raises ReceiveTimeout; None: for ever.
        on_error: None: inputs whose task keeps failing become a dead letter and the stage goes on; 'raise': raise it as well.
        retries: how often a failed call is repeated.
        retry_backoff_ms: pause before the first repetition; it doubles with each.
        output_id: source id of the results; equal within a group.
        ack_timeout_ms: a message not settled by then goes to another member.
        max_held: the most messages a join holds per source, with `by` over all keys together.
        overflow: what happens to one more: 'drop_oldest' or 'error'.
        routing: 'eager': a result's payload travels with its message; 'lazy': a large one stays in shared memory; 'auto': whichever moves
            less; as those of a `DataSource`. What its inputs do depends on who sends them.
        lazy_bytes: how many bytes make a result's payload a large one, as of a `DataSource`.
        durability: 'origin': a result's payload that stays is lost with this machine's memory; 'broker': it travels with its message all
            the same.
        task_version: which version of the task this is: stands in the results' headers and beside the member's name in `edgeserve groups`.
        backlog: what becomes of what waits while the task is busy. 'all': it waits, and holds back its senders where the engine does
            that; 'block': on every engine. 'drop_oldest': the newest `max_backlog` messages wait, the others are dropped, counted as
            'overflow'. 'latest': the newest of each key waits, the others are dropped, counted as 'superseded'. What will not be run holds
            nobody back. Of a join it is sets that wait, and what is dropped is 'superseded'.
        max_backlog: with 'drop_oldest'; None: 100.
        fuse: in place of `task`: stages that run as one task. Each is what a task may be. The first takes the sources, each other one what
            the one before it returns, or yields, as the same object: nothing is encoded or copied in between. The results of the last are
            sent.
        fetch: what a message may name by its URL, so that the task gets what lies there (bytes, or the path of a copy where the
            annotation is `pathlib.Path`): URLs below which all is allowed, https://host/path/, http://, s3://bucket/, ftp://, file:///path/.
            Empty: URLs are text.
        fetch_max_bytes: a larger file is refused.
        fetch_timeout_ms: how long one may take.

    Example:
        >>> from edgeserve.data_source import DataSource
        >>> with DataSource([1, 2], "memory://docs-compute", source_id="n", topic="n") as source:
        ...     _ = [next(source), next(source)]
        >>> def double(n: int) -> int:
        ...     return 2 * n
        >>> with Compute(double, "memory://docs-compute", topic_in="n", topic_out="doubled") as compute:
        ...     next(compute), next(compute)
        (2, 4)
    """

    def __init__(
        self,
        task: Callable[..., Any] | None = None,
        node: str | None = None,
        worker_id: str = "worker1",
        gate_in: Callable[[Any], Any] | None = None,
        gate_out: Callable[[Any], Any] | None = None,
        ftp: bool = False,
        ftp_memory: bool = False,
        ftp_delete: bool = False,
        local_ftp_path: str | os.PathLike[str] = "/srv/ftp/",
        topic_in: str = "src",
        topic_out: str = "dst",
        max_time_diff_ms: float = 10_000,
        no_overlap: bool = False,
        min_interval_ms: float = 0,
        log_path: str | os.PathLike[str] | None = None,
        log_filename: str | None = None,
        drop_if_older_than_ms: float | None = None,
        log_verbose: bool = False,
        *,
        pulsar_node: str | None = None,
        group: str | None = None,
        join: str | Policy | Callable[..., Any] | Any = "latest",
        by: Literal[True] | Callable[[Any], Key] | None = None,
        partitions: int = 1,
        start: Start = "earliest",
        timeout_ms: float | None = None,
        on_error: Literal["raise"] | None = None,
        retries: int = 3,
        retry_backoff_ms: float = 100,
        output_id: str | None = None,
        ack_timeout_ms: int = 300_000,
        max_held: int = 10_000,
        overflow: str = "drop_oldest",
        task_version: str = "",
        routing: Routing = "eager",
        lazy_bytes: int = LAZY_BYTES,
        durability: Durability = "origin",
        backlog: Backlog = "all",
        max_backlog: int | None = None,
        fuse: Sequence[Callable[..., Any]] | None = None,
        fetch: Sequence[str] = (),
        fetch_max_bytes: int = FETCH_MAX_BYTES,
        fetch_timeout_ms: float = FETCH_TIMEOUT_MS,
    ) -> None:
        super().__init__(node, pulsar_node, what="Compute", name=worker_id)
        check_keywords(
            "Compute",
            worker_id=worker_id,
            topic_in=topic_in,
            topic_out=topic_out,
            group="of the topics" if group is None else group,
            output_id=output_id,
            max_time_diff_ms=max_time_diff_ms,
            no_overlap=no_overlap,
            min_interval_ms=min_interval_ms,
            drop_if_older_than_ms=drop_if_older_than_ms,
            log_verbose=log_verbose,
            ftp=ftp,
            ftp_memory=ftp_memory,
            ftp_delete=ftp_delete,
            local_ftp_path=local_ftp_path,
            join=join,
            by=by,
            partitions=partitions,
            start=start,
            timeout_ms=timeout_ms,
            on_error=on_error,
            retries=retries,
            retry_backoff_ms=retry_backoff_ms,
            ack_timeout_ms=ack_timeout_ms,
            max_held=max_held,
            overflow=overflow,
            task_version=task_version,
            routing=routing,
            durability=durability,
            lazy_bytes=lazy_bytes,
            backlog=backlog,
            max_backlog=max_backlog,
            fuse=fuse,
            fetch=fetch,
            fetch_max_bytes=fetch_max_bytes,
            fetch_timeout_ms=fetch_timeout_ms,
        )
        self._check_callables("Compute", gate_in=gate_in, gate_out=gate_out)
        if topic_in == topic_out:
            raise ConfigurationError(
                f"Compute {worker_id!r}: topic_in and topic_out are both {topic_in!r}, so it would take its own results: "
                "give topic_out another name"
            )
        if durability == "broker" and ftp and not ftp_memory:
            raise ConfigurationError(
                f"Compute {worker_id!r}: durability='broker' with ftp=True: the results are files on this machine's FTP server, and "
                "are lost with it. Add ftp_memory=True, so that results themselves are sent, or leave durability out"
            )
        routing = in_place(routing, durability)
        if (task is None) == (fuse is None):
            found = "neither a task nor fuse=" if fuse is None else "both a task and fuse="
            raise ConfigurationError(f"Compute {worker_id!r} got {found}: give it a task, or fuse=[...] with the stages of one")
        work = Task(task if fuse is None else Fused(fuse, what="Compute"), what="Compute", named=True)
        for parameter in work.parameters:
            check_source_id(parameter)
        joins = len(work.parameters) > 1 or min_interval_ms > 0 or not isinstance(join, str)
        if not joins and join != "latest":
            raise ConfigurationError(
                f"Compute {worker_id!r}: join={join!r} pairs the messages of several sources, and this task takes those of one, "
                f"{work.parameters[0]!r}: leave join out, or give the task a parameter for each source"
            )
        newest = how_many(f"Compute {worker_id!r}", backlog, max_backlog)
        if by is not None and not joins:
            raise ConfigurationError(
                f"Compute {worker_id!r}: by= makes a join run per key, and a task of the one parameter {work.parameters[0]!r} joins "
                "nothing: leave it out, or give min_interval_ms= if each key is to run at most so often"
                + (". backlog='latest' keeps the newest of each key in the headers anyway" if backlog == "latest" else "")
            )
        if inspect.iscoroutinefunction(by):
            raise ConfigurationError(f"Compute {worker_id!r}: by={by!r} is an async def: give it a function that returns a key")
        if partitions > 1 and by is None:
            raise ConfigurationError(
                f"Compute {worker_id!r}: partitions={partitions} divides the keys of a join by key: give it by=, or leave partitions out"
            )
        group = _default_group(worker_id, topic_in, topic_out) if group is None else group
        if whole_of(group) != (group, 1):
            raise ConfigurationError(
                f"Compute {worker_id!r}: group={group!r} is what the group of a partition is called: give it another name"
            )
        if partitions > 1:
            check_name(f"Compute {worker_id!r}: the group of a partition", partition_group(group, partitions - 1, partitions))
        # What only a mistake makes different within a group. Workers have names of their own, and their results are called so by default.
        signature = [f"inputs {','.join(work.parameters)}"]
        if group != f"{topic_in}->{topic_out}":
            signature.append(f"topic_out={topic_out!r}")
        if output_id is not None:
            signature.append(f"output_id={output_id!r}")
        if joins:
            signature.append(_shown_join(join, max_time_diff_ms, no_overlap=no_overlap, min_interval_ms=min_interval_ms))
        if by is not None:
            # Not the function's name: a new version of it may have another, and its members must be able to take over from each other.
            signature.append(f"by={by is True or 'a function'}")
        if partitions > 1:
            signature.append(f"partitions={partitions}")
        if newest and not joins:
            signature.append(f"backlog={backlog!r}")
        source = worker_id if output_id is None else output_id
        check_source_id(source)
        source = as_parameter(source)
        self._payloads = Payloads(
            *(f"Compute {worker_id!r}", routing, topic_out, self._control), source=source, reads=(topic_in, group), lazy_bytes=lazy_bytes
        )
        if ftp:
            if ftp_delete and partitions > 1:
                raise ConfigurationError(
                    f"Compute {worker_id!r}: ftp_delete=True with partitions={partitions}: partitions settle each by itself, so it is not "
                    "known when a file is done with: leave one of them out"
                )
            once = len(work.parameters) == 1 or join == "exact" or no_overlap
            self._files = self._payloads.files = Files(
                f"Compute {worker_id!r}", local_ftp_path, group, memory=ftp_memory, delete=ftp_delete, once=once
            )
            self._files.wrap(work)
        if fetch:
            self._files = external_inputs(f"Compute {worker_id!r}", fetch, fetch_max_bytes, fetch_timeout_ms, ftp=ftp)
            self._files.wrap(work)
        options = Options(
            what="Compute",
            name=worker_id,
            topics=(topic_in,),
            group=group,
            kind=GroupKind.FAILOVER if joins else GroupKind.SHARED,
            signature="; ".join(signature),
            start=start,
            timeout_ms=timeout_ms,
            on_error=on_error,
            retries=retries,
            retry_backoff_ms=retry_backoff_ms,
            ack_timeout_ms=ack_timeout_ms,
            drop_if_older_than_ms=drop_if_older_than_ms,
            version=task_version,
            only_newest=newest if joins else 0,
            keep=Keep(newest, backlog == "latest") if newest and not joins else None,
            # A join does so on every engine.
            holds_senders=None if joins or backlog == "all" else backlog == "block",
            partitions=partitions,
            payloads=self._payloads,
        )
        policy = _policy_maker(
            join,
            work.parameters,
            {"max_held": max_held, "overflow": overflow},
            by=by is not None,
            max_time_diff_ms=max_time_diff_ms,
            no_overlap=no_overlap,
            min_interval_ms=min_interval_ms,
        )
        self.wiring = Wiring(topic_in, work.parameters, topic_out, source, routing != "eager")
        logs = (step_log(log_path, log_filename, worker_id, "compute"), step_log(log_path, log_filename, worker_id, "output"))
        emitter = Emitter(source, group, gate_out, self._counts, payloads=self._payloads, task_version=task_version)
        self._logs = logs
        self._options, self._joins = options, joins
        self._stage: Steps
        if joins:
            run_set = RunSet(
                options,
                self._control,
                task=work,
                emitter=emitter,
                gate_in=gate_in,
                by=None if by is True else by,
                logs=logs,
                topic=topic_out,
                verbose=log_verbose,
            )
            if partitions > 1:
                self._stage = Partitioned(options, self._control, self._counts, run_set=run_set, by_header=by is True, make_policy=policy)
            else:
                sets = Emitter(SOURCE_ID, group, None, self._counts)
                self._stage = Replicated(options, self._control, self._counts, run_set=run_set, make_policy=policy, emitter=sets)
        else:
            self._stage = SingleTask(
                options, self._control, self._counts, task=work, emitter=emitter, topic_out=topic_out, gate_in=gate_in, logs=logs
            )

    def _open(self, transport: Transport) -> None:
        if self._joins:
            refuse_other_partitions(transport, self._options.topics[0], self._options.group, self._options.partitions)
        super()._open(transport)

    def explain(self) -> dict[str, Any]:
        """Why did my join (not) fire? Per source what is held, what was dropped and why, the nearest miss; and the counters."""
        return self._stage.explain() | {"counters": dict(self.counters)}


def _default_group(worker_id: str, topic_in: str, topic_out: str) -> str:
    group = f"{topic_in}->{topic_out}"
    if len(group.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ConfigurationError(
            f"Compute {worker_id!r}: its group would be called {group!r}, and a name has at most {MAX_NAME_BYTES} bytes: give it a group="
        )
    return group


def _shown_join(join: Any, max_time_diff_ms: float, *, no_overlap: bool, min_interval_ms: float) -> str:
    """What makes the sets of a join others: whoever takes it over must make the same ones."""
    name = join if isinstance(join, str) else getattr(join, "__name__", type(join).__name__)
    return f"join={name!r} max_time_diff_ms={max_time_diff_ms:g} no_overlap={bool(no_overlap)} min_interval_ms={min_interval_ms:g}"


def _policy_maker(join: Any, sources: tuple[str, ...], limits: dict[str, Any], *, by: bool, **options: Any) -> Callable[[], Policy]:
    """A function that makes the policy, as often as the join begins anew. Makes it once now: what is wrong with it is said here."""
    defaults = {"max_held": 10_000, "overflow": "drop_oldest"}
    if by:
        options = options | limits | {"by": True}
    if join == "exact":
        # It never overlaps, so asking for that changes nothing.
        options = options | limits | {"no_overlap": False}
    elif join != "latest" and limits != defaults:
        options = options | limits
    if isinstance(join, str) or by:  # by key a policy is made, or copied, for each key
        make_policy(join, sources, **options)
        return lambda: make_policy(join, sources, **options)
    if makes_policies(join):
        made = make_policy(join, sources, **options)
        return lambda: copy.deepcopy(made)
    pristine = copy.deepcopy(join)
    make_policy(copy.deepcopy(pristine), sources, **options)
    return lambda: make_policy(copy.deepcopy(pristine), sources, **options)


__all__ = ("Compute",)
