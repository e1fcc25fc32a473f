"""Disjoint sets: a forest in which each member has a parent, and a root, which is its own, stands for its set."""

from __future__ import annotations

from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Parents(Protocol[_T]):
    """A dict, or a list of numbers."""

    def __getitem__(self, member: _T, /) -> _T: ...
    def __setitem__(self, member: _T, parent: _T, /) -> None: ...


def set_of(parent: Parents[_T], member: _T) -> _T:
    """The root of its set; halves the way there (Tarjan and van Leeuwen, 1984)."""
    while parent[member] != member:
        parent[member] = parent[parent[member]]
        member = parent[member]
    return member
