"""A set on its way to whichever replica runs it: one message with the frames of its members."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence

import msgspec

from edgeserve.align import JoinSet
from edgeserve.align.base import Member
from edgeserve.core.codec import decode_frame, encode_frame
from edgeserve.core.errors import CorruptMessage
from edgeserve.core.message import Key, set_id
from edgeserve.core.payload import encode_sized
from edgeserve.payload import is_lazy
from edgeserve.stage.emit import Emitter
from edgeserve.stage.payloads import LAZY_BYTES, Payloads
from edgeserve.stage.retry import GaveUp, GoesBack
from edgeserve.stage.runset import GiveUp, Input, Outcome
from edgeserve.transport import Buffer, Frame

SOURCE_ID = "sets"
"""The source id of sets, whichever replica has made them."""

_LENGTH_BYTES = 4


class _Member(msgspec.Struct, array_like=True, gc=False):
    """One member: of which parameter, how long its frame is, how often it was delivered before, and the key that it was joined by."""

    name: str
    size: int
    deliveries: int
    key: Key = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Member]).decode


class Packer:
    """Makes a message of each set, in place of a result.

    Args:
        topic: of the work.
        parameters: in their order.
        emitter: makes the headers.
        gated: whether inputs have passed a gate.
        payloads: the node's. Those that frames refer to are put into them: when the set is run, its messages may be settled.
    """

    def __init__(self, topic: str, parameters: Sequence[str], emitter: Emitter, *, gated: bool, payloads: Payloads) -> None:
        self.topic, self._parameters, self._emitter, self._gated, self._payloads = topic, parameters, emitter, gated, payloads

    def end_frames(self, _position: int, of: bytes) -> list[Frame]:
        """What says that no sets will follow. Who sends it on keeps its id, which is also that of the end that a lone replica sends."""
        return [self._emitter.end(self._emitter.end_id(of))]

    def make(self, give_up: GiveUp) -> Callable[[JoinSet, int | None], Outcome]:
        """The function that packs a set. A closure: it runs for every set."""
        parameters, emit, gated = self._parameters, self._emitter.set_frame, self._gated
        inline, used = self._payloads.inline, self._payloads.used

        def pack(joined: JoinSet, _promise_ns: int | None) -> Outcome:
            inputs = [(name, member[1]) for name in parameters if (member := joined[0].get(name)) is not None]
            ids = [item.header.id for _, item in inputs]
            of = set_id(ids)
            members: list[_Member] = []
            frames: list[Buffer] = []
            try:
                for name, item in inputs:
                    if item.header.size >= LAZY_BYTES:
                        used(item.header)
                    parts = _gated(item) if gated else [inline(item.frame) if is_lazy(item.header.schema) else item.frame]
                    members.append(_Member(name, sum(map(len, parts)), item.deliveries, item.header.key))
                    frames += parts
                head = _encode(members)
                event_ns = max(item.header.event_ns for _, item in inputs)
                frame = emit(of, event_ns, [len(head).to_bytes(_LENGTH_BYTES, "little") + head, *frames])
            except GoesBack:
                raise
            except Exception as error:  # a value of a gate that cannot travel, a set that is too large
                aside, raised = give_up([item for _, item in inputs], GaveUp(error, 1))
                return raised, of, ids, None, aside
            return None, of, ids, frame, None

        return pack


def _gated(item: Input) -> list[Buffer]:
    """The frame of what a gate has made of an input."""
    schema, payload, size = encode_sized(item.value)
    frame = encode_frame(msgspec.structs.replace(item.header, schema=schema, size=size), payload)
    return [frame] if isinstance(frame, bytes) else frame


def read_set(payload: bytes | memoryview, parameters: Sequence[str]) -> dict[str, Member]:
    """The members of a set, by the names of their parameters, as a policy would hand them over.

    Raises:
        MessageError: the payload is no set of these parameters.
    """
    view = memoryview(payload)
    at = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    try:
        members = _decode(view[_LENGTH_BYTES:at])
    except Exception as exc:  # a crafted one also reaches RecursionError
        raise CorruptMessage(f"a set cannot be read: {exc}") from exc
    names = [member.name for member in members]
    if not names or not set(names) <= set(parameters):
        # With None in place of what is missing it would run all the same.
        raise CorruptMessage(f"a set has {reprlib.repr(names)}, and the task takes {', '.join(parameters)}")
    found: dict[str, Member] = {}
    for member in members:
        frame = view[at : at + member.size]
        at += member.size
        header, body = decode_frame(frame)
        if member.key is not None:
            header.key = member.key  # a function of by= may have given it another than its sender
        item = Input(header, body, -1, frame, member.deliveries)
        found[member.name] = Member(header.event_ns, item)
    return found


__all__ = ("SOURCE_ID", "Packer", "read_set")
