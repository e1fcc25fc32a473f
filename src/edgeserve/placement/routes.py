"""Which links lead from node to node, and sums over them.

A *field* is a number per link (latency, seconds per byte, price per byte...). What the solver needs of a network is always the sum of a
field over a route, for all nodes at once, and the cheapest start of a route for each end. On a tree these are passes from the leaves to the
root and back (distance transform on trees, after Felzenszwalb and Huttenlocher, Distance transforms of sampled functions, Theory of
Computing 8, 2012); on any other network a table of all pairs.
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

Ints = np.ndarray[Any, np.dtype[np.int64]]
Path = tuple[int, ...]
"""The links of a route, by number."""


class Routes(ABC):
    """The routes of one network; nodes and links are numbers."""

    def __init__(self, count: int, links: int, broker: int) -> None:
        self.count, self.links, self.broker = count, links, broker
        self._paths: dict[tuple[int, int], Path] = {}

    def path(self, a: int, b: int) -> Path:
        """The links from a to b, in order."""
        found = self._paths.get((a, b))
        if found is None:
            found = self._paths[a, b] = self._path(a, b)
        return found

    @abstractmethod
    def _path(self, a: int, b: int) -> Path: ...

    @abstractmethod
    def sums(self, fields: Array) -> Array:
        """Sums of fields `[K, links]`, in a form that the methods below take."""

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
    def rows(self, sums: Array, parts: Array, at: Sequence[int], reverse: bool = False) -> Array:
        """`[len(at), nodes]`: from the k-th node of `at` to each node the sum of `parts[k] @ fields`; `reverse`: from each node to it."""

    @abstractmethod
    def spread(self, first: Array, fields: Array, sums: Array, parts: Array, reverse: bool = False) -> Array:
        """`[K, nodes]`: for each end b the least of `first[k, a]` plus the way from a to b by `parts[k] @ fields`; `reverse`: b to a."""


class TreeRoutes(Routes):
    """A tree, with the broker for root: there is one way only between two nodes."""

    def __init__(self, count: int, ends: Sequence[tuple[int, int]], broker: int) -> None:
        super().__init__(count, len(ends), broker)
        near: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, (a, b) in enumerate(ends):
            near[a].append((b, number))
            near[b].append((a, number))
        self.parent = np.full(count, -1, dtype=np.int64)
        self.uplink = np.full(count, len(ends), dtype=np.int64)  # the root's is a link that isn't there
        self._levels: list[tuple[Ints, Ints, Ints]] = []
        level = [broker]
        while level:
            below = [(child, node, link) for node in level for child, link in near[node] if link != self.uplink[node]]
            for child, node, link in below:
                self.parent[child], self.uplink[child] = node, link
            if below:
                parents = np.array([node for _, node, _ in below])
                starts = np.flatnonzero(np.r_[True, parents[1:] != parents[:-1]])
                self._levels.append((np.array([child for child, _, _ in below]), parents, starts))
            level = [child for child, _, _ in below]
        self._meet: dict[int, Ints] = {}

    def _path(self, a: int, b: int) -> Path:
        up, down = self._to_root(a), self._to_root(b)
        while up and down and up[-1] == down[-1]:
            up.pop()
            down.pop()
        return (*up, *reversed(down))

    def _to_root(self, node: int) -> list[int]:
        path = []
        while self.parent[node] >= 0:
            path.append(int(self.uplink[node]))
            node = int(self.parent[node])
        return path

    def sums(self, fields: Array) -> Array:
        result = np.zeros((len(fields), self.count))
        for children, parents, _ in self._levels:
            result[:, children] = result[:, parents] + fields[:, self.uplink[children]]
        return result

    def to_broker(self, sums: Array) -> Array:
        return sums

    def from_broker(self, sums: Array) -> Array:
        return sums

    def _meets(self, node: int) -> Ints:
        """For each node the one nearest to the root on the way to `node`."""
        found = self._meet.get(node)
        if found is None:
            above = {node}
            walk = node
            while self.parent[walk] >= 0:
                walk = int(self.parent[walk])
                above.add(walk)
            on_way = np.zeros(self.count, dtype=bool)
            on_way[list(above)] = True
            found = np.full(self.count, self.broker)
            for children, parents, _ in self._levels:
                found[children] = np.where(on_way[children], children, found[parents])
            self._meet[node] = found
        return found

    def round_trip(self, sums: Array) -> Array:
        return 2.0 * sums

    def rows(self, sums: Array, parts: Array, at: Sequence[int], reverse: bool = False) -> Array:
        if not at:
            return np.zeros((0, self.count))
        mixed = parts @ sums
        meets = np.stack([self._meets(node) for node in at])
        own = mixed[np.arange(len(at)), list(at)][:, None]
        result: Array = mixed + own - 2.0 * np.take_along_axis(mixed, meets, axis=1)
        return result

    def spread(self, first: Array, fields: Array, sums: Array, parts: Array, reverse: bool = False) -> Array:
        best = first.copy()
        mixed = parts @ fields
        for children, parents, starts in reversed(self._levels):
            least = np.minimum.reduceat(best[:, children] + mixed[:, self.uplink[children]], starts, axis=1)
            above = parents[starts]
            best[:, above] = np.minimum(best[:, above], least)
        for children, parents, _ in self._levels:
            best[:, children] = np.minimum(best[:, children], best[:, parents] + mixed[:, self.uplink[children]])
        return best


class TableRoutes(Routes):
    """Any network: the links of all pairs in a table."""

    def __init__(self, count: int, links: int, broker: int, paths: dict[tuple[int, int], Path]) -> None:
        super().__init__(count, links, broker)
        self._paths = paths
        longest = max((len(path) for path in paths.values()), default=0)
        self._table = np.full((longest, count, count), links)
        for (a, b), path in paths.items():
            self._table[: len(path), a, b] = path

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

    def rows(self, sums: Array, parts: Array, at: Sequence[int], reverse: bool = False) -> Array:
        rows = [np.tensordot(part, sums[:, :, node] if reverse else sums[:, node, :], 1) for part, node in zip(parts, at, strict=True)]
        return np.stack(rows) if rows else np.zeros((0, self.count))

    def spread(self, first: Array, fields: Array, sums: Array, parts: Array, reverse: bool = False) -> Array:
        ways = (np.tensordot(part, sums, 1) for part in parts)
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
    near: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, (a, b) in enumerate(ends):
        near[a].append((b, number))
        near[b].append((a, number))
    given = _given(problem, index)
    if not given and len(ends) == count - 1 and len(_reached(near, broker)) == count:
        return TreeRoutes(count, ends, broker)
    paths = {**_shortest(count, near, [link.latency_ms for link in problem.links]), **given}
    if len(paths) < count * (count - 1):
        a, b = next((a, b) for a in range(count) for b in range(count) if a != b and (a, b) not in paths)
        raise InvalidProblem(
            f"links: no way leads from {problem.nodes[a].name!r} to {problem.nodes[b].name!r}; add a link or a route, or take a node out"
        )
    return TableRoutes(count, len(ends), broker, paths)


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
