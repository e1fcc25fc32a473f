"""Keys in partitions, and partitions on members: the same for all who ask, and no I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xxhash import xxh3_64_intdigest

from edgeserve.core.message import Header

_OF_A_PARTITION = re.compile(r"(.+)#(\d+)of(\d+)", re.DOTALL)


def partition_of(header: Header, partitions: int) -> int:
    """The partition of a message, a number below `partitions`: by its key, or by its id where it has none."""
    key = header.key
    if key is None:
        data = header.id
    elif isinstance(key, int):
        data = b"i%d" % key
    else:
        data = b"s" + key.encode() if isinstance(key, str) else b"b" + key
    return xxh3_64_intdigest(data) % partitions


def partition_group(group: str, number: int, partitions: int) -> str:
    """The group in which partition `number` of a group's join is held."""
    return f"{group}#{number + 1}of{partitions}"


def whole_of(group: str) -> tuple[str, int]:
    """(the whole group, how many partitions it has) of the group of a partition; any other is whole, and has one."""
    found = _OF_A_PARTITION.fullmatch(group)
    return (group, 1) if found is None else (found[1], int(found[3]))


def assign(before: Sequence[str], members: Sequence[str], partitions: int) -> list[str]:
    """Which member holds which partition: as many each, give or take one, and as few as can be move.

    Args:
        before: who held them until now, as far as is known.
        members: who there is, of whom one comes before another where they hold as many.
        partitions: how many there are.

    Returns:
        The holder of each partition; "" where there is nobody.

    Example:
        >>> assign([], ["a", "b"], 4), assign(["a", "b", "a", "b"], ["a", "b", "c"], 4), assign(["a", "b", "a", "c"], ["b", "c"], 4)
        (['a', 'b', 'a', 'b'], ['a', 'b', 'c', 'b'], ['b', 'b', 'c', 'c'])
    """
    if not members:
        return [""] * partitions
    held: dict[str, list[int]] = {member: [] for member in members}
    free: list[int] = []
    for number in range(partitions):
        holder = before[number] if number < len(before) else ""
        held.get(holder, free).append(number)
    for number in free:
        min(held.values(), key=len).append(number)
    while len(most := max(held.values(), key=len)) - len(least := min(held.values(), key=len)) > 1:
        least.append(most.pop())
    holders = {number: member for member, numbers in held.items() for number in numbers}
    return [holders[number] for number in range(partitions)]


__all__ = ("assign", "partition_group", "partition_of", "whole_of")
