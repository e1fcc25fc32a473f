"""Which links lead from node to node, and what is to be said of a route as a whole.

A *channel* is what the capacity is of: a link with both of its directions, or one direction of a duplex link. A *field* is a number per
channel (latency, seconds per byte, price per byte...). What the solver needs of a network is the sum of a field over a route and its
slowest channel, for all nodes at once, and the cheapest start of a route for each end. On a tree a sum is a pass to the root and one from
it. Where routes turn around, the nodes below stand in the order of the slowest channel on their way up: the cheapest start for an end is
one of those in front of it, with the end's slowest channel, or one of those behind it, with its own. On any other network there is a table
of all pairs.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeserve.placement.errors import InvalidProblem
from edgeserve.placement.problem import Problem
from edgeserve.placement.queueing import Array

_ROWS = 16

Ints = np.ndarray[Any, np.dtype[np.int64]]
Path = tuple[int, ...]
"""The channels of a route, by number."""


class Routes(ABC):
    """The routes of one network; nodes and channels are numbers.

    Attributes:
        link_of: per channel its link. The first channels are the links themselves; behind them are the directions back of duplex ones.
        slowest_up, slowest_down: per node the seconds per byte of the slowest channel to the broker and from it.
    """

    slowest_up: Array
    slowest_down: Array

    def __init__(self, count: int, link_of: Sequence[int], broker: int) -> None:
        self.count, self.link_of, self.broker = count, list(link_of), broker
        self._paths: dict[tuple[int, int], Path] = {}

    def path(self, a: int, b: int) -> Path:
        """The channels from a to b, in order."""
        found = self._paths.get((a, b))
        if found is None:
            found = self._paths[a, b] = self._path(a, b)
        return found

    @abstractmethod
    def _path(self, a: int, b: int) -> Path: ...

    @abstractmethod
    def sums(self, fields: Array) -> Array:
        """Sums of fields `[K, channels]`, in a form that the methods below take, whose first axis is K."""

    @abstractmethod
    def to_broker(self, sums: Array) -> Array:
        """`[K, nodes]`: the sum from each node to the broker."""

    @abstractmethod
    def from_broker(self, sums: Array) -> Array:
        """`[K, nodes]`: the sum from the broker to each node."""

    @abstractmethod
    def round_trip(self, sums: Array) -> Array:
        """The sum there and back."""

    @abstractmethod
    def rows(self, sums: Array, parts: Array, slow: Array, at: Sequence[int], reverse: bool = False) -> Array:
        """`[len(at), nodes]`: from the k-th node of `at` to each node `parts[k] @ sums` and `slow[k]` times the seconds per byte of the
        slowest channel; `reverse`: from each node to it."""

    @abstractmethod
    def spread(self, first: Array, sums: Array, parts: Array, slow: Array, reverse: bool = False) -> Array:
        """`[K, nodes]`: for each end b the least of `first[k, a]` plus the way from a to b, as `rows` has it; `reverse`: b to a."""


class TreeRoutes(Routes):
    """A tree, with the broker for root: there is one way only between two nodes."""

    def __init__(
        self, count: int, ends: Sequence[tuple[int, int]], back: Sequence[int], link_of: Sequence[int], per_byte: Array, broker: int
    ) -> None:
        super().__init__(count, link_of, broker)
        near = _neighbours(ends)
        self.parent = np.full(count, -1, dtype=np.int64)
        # The root's are of a channel that isn't there.
        self.uplink, self.downlink = np.full(count, len(link_of), dtype=np.int64), np.full(count, len(link_of), dtype=np.int64)
        self._levels: list[tuple[Ints, Ints]] = []
        level = [broker]
        while level:
            below = [(child, node, link) for node in level for child, link in near[node] if link != self._link_above(node)]
            for child, node, link in below:
                self.parent[child] = node
                there = ends[link] == (child, node)
                self.uplink[child], self.downlink[child] = (link, back[link]) if there else (back[link], link)
            if below:
                self._levels.append((np.array([child for child, _, _ in below]), np.array([node for _, node, _ in below])))
            level = [child for child, _, _ in below]
        self._ways = [self.uplink, self.downlink] if len(link_of) > len(ends) else [self.uplink]
        self._meet: dict[int, Ints] = {}
        self._slowest: dict[int, Array] = {}
        self._per_byte = np.append(per_byte, 0.0)
        self.slowest_up = self.slowest_down = self._slowest_from(broker)
        self._turns: list[tuple[Ints, Array, Ints]] | None = None

    def _link_above(self, node: int) -> int:
        return self.link_of[self.uplink[node]] if self.parent[node] >= 0 else -1

    def _path(self, a: int, b: int) -> Path:
        up, down = self._to_root(a), self._to_root(b)
        while up and down and up[-1] == down[-1]:
            up.pop()
            down.pop()
        return (*(int(self.uplink[node]) for node in up), *(int(self.downlink[node]) for node in reversed(down)))

    def _to_root(self, node: int) -> list[int]:
        path = []
        while self.parent[node] >= 0:
            path.append(node)
            node = int(self.parent[node])
        return path

    def sums(self, fields: Array) -> Array:
        """`[K, 2, nodes]`: to the root, and from it; without duplex links once for both, `[K, 1, nodes]`."""
        result = np.zeros((len(fields), len(self._ways), self.count))
        for children, parents in self._levels:
            for way, links in enumerate(self._ways):
                result[:, way, children] = result[:, way, parents] + fields[:, links[children]]
        return result

    def to_broker(self, sums: Array) -> Array:
        return sums[:, 0]

    def from_broker(self, sums: Array) -> Array:
        return sums[:, -1]

    def round_trip(self, sums: Array) -> Array:
        return sums + sums[:, ::-1]

    def _meets(self, node: int) -> Ints:
        """For each node the one nearest to the root on the way to `node`."""
        found = self._meet.get(node)
        if found is None:
            on_way = np.zeros(self.count, dtype=bool)
            on_way[[node, *(int(self.parent[below]) for below in self._to_root(node))]] = True
            found = np.full(self.count, self.broker)
            for children, parents in self._levels:
                found[children] = np.where(on_way[children], children, found[parents])
            self._meet[node] = found
        return found

    def _slowest_from(self, node: int) -> Array:
        """For each node the seconds per byte of the slowest channel between it and `node`."""
        found = self._slowest.get(node)
        if found is None:
            found = np.full(self.count, -1.0)
            found[node] = 0.0
            for below in self._to_root(node):
                found[self.parent[below]] = max(found[below], self._per_byte[self.uplink[below]])
            for children, parents in self._levels:
                there = np.maximum(found[parents], self._per_byte[self.uplink[children]])
                found[children] = np.where(found[children] < 0, there, found[children])
            self._slowest[node] = found
        return found

    def rows(self, sums: Array, parts: Array, slow: Array, at: Sequence[int], reverse: bool = False) -> Array:
        if not at:
            return np.zeros((0, self.count))
        mixed = self._mixed(sums, parts)
        here, there = (mixed[:, -1], mixed[:, 0]) if reverse else (mixed[:, 0], mixed[:, -1])
        each = np.arange(len(at))[:, None]
        both = (here + there)[each, np.array([self._meets(node) for node in at])]
        result: Array = there + here[each, np.array(at)[:, None]] - both
        result += slow[:, None] * np.array([self._slowest_from(node) for node in at])
        return result

    @staticmethod
    def _mixed(sums: Array, parts: Array) -> Array:
        """`[len(parts), ways, nodes]`: like `tensordot`, at a fraction of what that takes for few parts."""
        mixed: Array = (parts @ sums.reshape(len(sums), -1)).reshape(len(parts), *sums.shape[1:])
        return mixed

    def spread(self, first: Array, sums: Array, parts: Array, slow: Array, reverse: bool = False) -> Array:
        if len(first) > _ROWS:  # what is too large for the processor's cache takes longer
            parted = [slice(at, at + _ROWS) for at in range(0, len(first), _ROWS)]
            return np.concatenate([self.spread(first[each], sums, parts[each], slow[each], reverse) for each in parted])
        # Nodes by rows: numbers that are added or compared lie side by side. The last is a node that isn't there.
        mixed = np.zeros((len(self._ways), self.count + 1, len(first)))
        mixed[:, :-1] = (sums.reshape(len(sums), -1).T @ parts.T).reshape(len(self._ways), self.count, len(first))
        start, end = (mixed[-1], mixed[0]) if reverse else (mixed[0], mixed[-1])
        begin, best = np.full((2, self.count + 1, len(first)), np.inf)
        begin[:-1] = first.T + start[:-1]
        for nodes, slowest, turn in self._turning():
            faster = begin[nodes]
            weighed = slowest[:, :, None] * slow
            slower = (faster + weighed)[:, ::-1]
            np.minimum.accumulate(slower, axis=1, out=slower)
            np.minimum.accumulate(faster, axis=1, out=faster)
            faster += weighed
            np.minimum(faster, slower[:, ::-1], out=faster)
            faster -= (start[turn] + end[turn])[:, None]
            best[nodes] = np.minimum(best[nodes], faster, out=faster)
        best += end
        result: Array = np.minimum(first, best[:-1].T)
        return result

    def _turning(self) -> list[tuple[Ints, Array, Ints]]:
        """For all nodes where routes may turn around: those below by the slowest channel on their way up, what that is, and where it is.

        Made of rows that are about as long; no node is in two rows of one entry.
        """
        if self._turns is None:
            below: dict[int, list[tuple[float, int]]] = defaultdict(list)
            depth = np.zeros(self.count, dtype=np.int64)
            for node in range(self.count):
                slowest, above = 0.0, node
                below[node].append((0.0, node))
                while self.parent[above] >= 0:
                    slowest, above = max(slowest, float(self._per_byte[self.uplink[above]])), int(self.parent[above])
                    below[above].append((slowest, node))
                    depth[node] += 1
            alike: dict[tuple[int, int], list[int]] = defaultdict(list)
            for turn, found in below.items():
                if len(found) > 1:
                    alike[int(depth[turn]), len(found).bit_length()].append(turn)
            self._turns = []
            for turns in alike.values():
                longest = max(len(below[turn]) for turn in turns)
                nodes, slowest_of = np.full((len(turns), longest), self.count), np.zeros((len(turns), longest))
                for row, turn in enumerate(turns):
                    for column, (slowest, node) in enumerate(sorted(below[turn])):
                        nodes[row, column], slowest_of[row, column] = node, slowest
                self._turns.append((nodes, slowest_of, np.array(turns)))
        return self._turns


class TableRoutes(Routes):
    """Any network: the channels of all pairs in a table."""

    def __init__(self, count: int, link_of: Sequence[int], per_byte: Array, broker: int, paths: dict[tuple[int, int], Path]) -> None:
        super().__init__(count, link_of, broker)
        self._paths = paths
        longest = max((len(path) for path in paths.values()), default=0)
        self._table = np.full((longest, count, count), len(link_of))
        for (a, b), path in paths.items():
            self._table[: len(path), a, b] = path
        padded = np.append(per_byte, 0.0)
        self._slowest = padded[self._table].max(axis=0, initial=0.0)
        self.slowest_up, self.slowest_down = self._slowest[:, broker], self._slowest[broker, :]

    def _path(self, a: int, b: int) -> Path:
        return ()

    def sums(self, fields: Array) -> Array:
        padded = np.concatenate([fields, np.zeros((len(fields), 1))], axis=1)
        result = np.zeros((len(fields), self.count, self.count))
        for hop in self._table:
            result += padded[:, hop]
        return result

    def to_broker(self, sums: Array) -> Array:
        return sums[:, :, self.broker]

    def from_broker(self, sums: Array) -> Array:
        return sums[:, self.broker, :]

    def round_trip(self, sums: Array) -> Array:
        return sums + sums.transpose(0, 2, 1)

    def rows(self, sums: Array, parts: Array, slow: Array, at: Sequence[int], reverse: bool = False) -> Array:
        rows = [
            np.tensordot(part, sums[:, :, node] if reverse else sums[:, node, :], 1)
            + weight * (self._slowest[:, node] if reverse else self._slowest[node, :])
            for part, weight, node in zip(parts, slow, at, strict=True)
        ]
        return np.stack(rows) if rows else np.zeros((0, self.count))

    def spread(self, first: Array, sums: Array, parts: Array, slow: Array, reverse: bool = False) -> Array:
        ways = (np.tensordot(part, sums, 1) + weight * self._slowest for part, weight in zip(parts, slow, strict=True))
        if reverse:
            return np.stack([(row[None, :] + way).min(axis=1) for row, way in zip(first, ways, strict=True)])
        return np.stack([(row[:, None] + way).min(axis=0) for row, way in zip(first, ways, strict=True)])


def make_routes(problem: Problem) -> Routes:
    """The routes of a problem's network.

    Raises:
        InvalidProblem: there is no way between two nodes.
    """
    index = {node.name: number for number, node in enumerate(problem.nodes)}
    ends = [(index[link.ends[0]], index[link.ends[1]]) for link in problem.links]
    count, broker = len(index), index[problem.broker]
    duplex = [number for number, link in enumerate(problem.links) if link.duplex]
    link_of = [*range(len(ends)), *duplex]
    back = list(range(len(ends)))
    for channel, number in enumerate(duplex, len(ends)):
        back[number] = channel
    per_byte = np.array([1.0 / problem.links[number].bandwidth_bytes_s for number in link_of])
    near = _neighbours(ends)
    given = _given(problem, index)
    if not given and len(ends) == count - 1 and len(_reached(near, broker)) == count:
        return TreeRoutes(count, ends, back, link_of, per_byte, broker)
    paths = {**_shortest(count, near, [link.latency_ms for link in problem.links]), **given}
    if len(paths) < count * (count - 1):
        a, b = next((a, b) for a in range(count) for b in range(count) if a != b and (a, b) not in paths)
        raise InvalidProblem(
            f"links: no way leads from {problem.nodes[a].name!r} to {problem.nodes[b].name!r}; add a link or a route, or take a node out"
        )
    channels = {(a, b): _channels(a, path, ends, back) for (a, b), path in paths.items()}
    return TableRoutes(count, link_of, per_byte, broker, channels)


def _neighbours(ends: Sequence[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Node to its neighbours, each with the link."""
    near: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, (a, b) in enumerate(ends):
        near[a].append((b, number))
        near[b].append((a, number))
    return near


def _channels(node: int, links: Path, ends: Sequence[tuple[int, int]], back: Sequence[int]) -> Path:
    """The channels of a route that begins at a node. A given route may not be a way: of links that do not touch it the first end is one."""
    found = []
    for link in links:
        a, b = ends[link]
        there = node != b
        found.append(link if there else back[link])
        node = b if there else a
    return tuple(found)


def _given(problem: Problem, index: dict[str, int]) -> dict[tuple[int, int], Path]:
    numbers = {link.name: number for number, link in enumerate(problem.links)}
    given = {(index[r.start], index[r.end]): tuple(numbers[name] for name in r.links) for r in problem.routes}
    back = {(b, a): path[::-1] for (a, b), path in given.items()}
    return {**back, **given}


def _reached(near: dict[int, list[tuple[int, int]]], start: int) -> set[int]:
    reached, stack = {start}, [start]
    while stack:
        for other, _ in near[stack.pop()]:
            if other not in reached:
                reached.add(other)
                stack.append(other)
    return reached


def _shortest(count: int, near: dict[int, list[tuple[int, int]]], latency: list[float]) -> dict[tuple[int, int], Path]:
    """Routes of least latency, then fewest links, then lowest numbers (Dijkstra from each node), the same there and back."""
    paths: dict[tuple[int, int], Path] = {}
    for start in range(count):
        heap: list[tuple[float, int, Path, int]] = [(0.0, 0, (), start)]
        done: set[int] = set()
        while heap:
            far, hops, path, node = heapq.heappop(heap)
            if node in done:
                continue
            done.add(node)
            if node > start:
                paths[start, node], paths[node, start] = path, path[::-1]
            for other, number in near[node]:
                if other not in done:
                    heapq.heappush(heap, (far + latency[number], hops + 1, (*path, number), other))
    return paths
