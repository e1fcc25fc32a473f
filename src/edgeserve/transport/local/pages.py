"""LMDB's file read as a heap of pages, for a file whose structure leads astray.

The layout is that of LMDB 0.9 data files (data version 1): pages of the size that the machine uses, leaves with nodes, large values on
runs of overflow pages. Nothing found here is believed by itself: every value carries a checksum that its key is part of.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

_PAGE = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_PGNO = struct.Struct("<Q")
_HEADER = 16
_LEAF = 0x02
_BIG = 0x01
_LARGEST = 1 << 32


def values(content: mmap.mmap) -> Iterator[tuple[bytes, bytes]]:
    """Every (key, value) that lies in something like a leaf, whether it is still in use or not."""
    size = mmap.PAGESIZE
    end = len(content)
    for start in range(0, end - _HEADER, size):
        _, _, flags, lower, _ = _PAGE.unpack_from(content, start)
        if not flags & _LEAF or not _HEADER <= lower <= size or start + size > end:
            continue
        for at in range(start + _HEADER, start + lower - 1, 2):
            node = start + int.from_bytes(content[at : at + 2], "little")
            found = _value(content, node, start + size, end)
            if found is not None:
                yield found


def _value(content: mmap.mmap, node: int, page_end: int, end: int) -> tuple[bytes, bytes] | None:
    if node + _NODE.size > page_end:
        return None
    low, high, flags, key_size = _NODE.unpack_from(content, node)
    key_at = node + _NODE.size
    data_at, length = key_at + key_size, low | high << 16
    key = content[key_at:data_at]
    if flags & _BIG:
        if data_at + _PGNO.size > page_end:
            return None
        data_at = _PGNO.unpack_from(content, data_at)[0] * mmap.PAGESIZE + _HEADER
        page_end = end
    if length > _LARGEST or data_at + length > page_end:
        return None
    return key, content[data_at : data_at + length]


__all__ = ("values",)
