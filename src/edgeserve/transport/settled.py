"""The ids that a group has settled: the newest few in its state, the others in chunks of their own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

from xxhash import xxh3_64_intdigest

from edgeserve.transport.groups import GroupState
from edgeserve.transport.kv import Space, Txn
from edgeserve.transport.records import Head, checked, group_key, unchecked

IDS_KEPT = 131_072
ID_BYTES = 16
_RECENT_BYTES = 32 * ID_BYTES
_KEY = struct.Struct(">IQQ")
_CHUNK = struct.Struct("<QQ")

Seen: TypeAlias = tuple[int, int]
"""How far a member has read: the number of chunks, and how many bytes of ids after them (`ids_next` and the length of `recent_ids`)."""

NOTHING: Seen = (0, 0)


def keep_ids(txn: Txn, number: int, group: str, state: GroupState, ids: Sequence[bytes]) -> None:
    """Appends settled ids; lets old ones go that no unsettled message can be a duplicate of. The caller saves the state."""
    state.recent_ids += b"".join(ids)
    if len(state.recent_ids) < _RECENT_BYTES:
        return  # a record of its own for each message would be a third of what a settlement writes
    count = len(state.recent_ids) // ID_BYTES
    tag = xxh3_64_intdigest(group.encode())
    at = _KEY.pack(number, tag, state.ids_next)
    txn.put(Space.IDS, at, checked(at, _CHUNK.pack(state.cursor, count) + state.recent_ids))
    state.recent_ids = b""
    state.ids_next += 1
    state.ids_kept += count
    if state.ids_next % 64 or state.ids_kept <= IDS_KEPT:
        return
    floor, doomed = state.floor(), []
    for key, value in txn.scan(Space.IDS, _KEY.pack(number, tag, 0), _KEY.pack(number, tag, state.ids_next)):
        cursor, count = _CHUNK.unpack_from(value, 8)
        if state.ids_kept - count < IDS_KEPT or cursor > floor:
            break
        doomed.append(bytes(key))
        state.ids_kept -= count
    for key in doomed:
        txn.delete(Space.IDS, key)


def read_ids(txn: Txn, number: int, group: str, state: GroupState, seen: Seen) -> list[bytes]:
    """The settled ids that came after `seen`, oldest first."""
    tag, parts, skip = xxh3_64_intdigest(group.encode()), list[bytes](), 0
    for key, value in txn.scan(Space.IDS, _KEY.pack(number, tag, seen[0]), _KEY.pack(number, tag, state.ids_next)):
        if _KEY.unpack(key)[2] == seen[0]:
            skip = seen[1]  # what stood in the state when it was looked at stands at the start of this chunk by now
        parts.append(bytes(unchecked(f"the settled ids of group {group!r}", bytes(key), value))[_CHUNK.size :])
    if state.ids_next == seen[0]:
        skip = seen[1]
    parts.append(state.recent_ids)
    body = b"".join(parts)
    return [body[at : at + ID_BYTES] for at in range(skip, len(body), ID_BYTES)]


def forget_group(txn: Txn, topic: str, head: Head, group: str) -> None:
    """Deletes all that is kept for a group. The caller saves the head."""
    head.groups.remove(group)
    head.listeners = {a: g for a, g in head.listeners.items() if g != group}
    txn.delete(Space.STATE, group_key(topic, group))
    tag = xxh3_64_intdigest(group.encode())
    for key, _ in list(txn.scan(Space.IDS, _KEY.pack(head.number, tag, 0), _KEY.pack(head.number, tag, 2**63))):
        txn.delete(Space.IDS, bytes(key))


__all__ = ("NOTHING", "Seen", "forget_group", "keep_ids", "read_ids")
