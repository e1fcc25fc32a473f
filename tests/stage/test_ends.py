"""Ends of sources as a group records them, in whatever order its members say so."""

from __future__ import annotations

import itertools

from edgeserve.stage.ends import Ends
from edgeserve.transport.base import merge_attributes


def test_what_a_member_says_late_takes_nothing_back() -> None:
    said = [Ends({}).recording("a", "t", 40), {}, Ends({}).recording("a", "t", 60)]
    first = Ends(said[0])
    said[1] = first.reopening("a", "t", 50)
    for order in itertools.permutations(said):
        attributes: dict[str, bytes] = {}
        for news in order:
            merge_attributes(attributes, news)
        assert Ends(attributes).ended == {"a": ("t", 60)}


def test_positions_of_any_size_grow() -> None:
    attributes: dict[str, bytes] = {}
    for position in (0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**62):
        merge_attributes(attributes, Ends({}).recording("a", "t", position))
        assert Ends(attributes).ended == {"a": ("t", position)}
