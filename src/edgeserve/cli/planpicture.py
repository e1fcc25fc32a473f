"""A plan to look at: the cluster's nodes with what runs on each, how streams travel between them, and how full links are. As SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from edgeserve.cli.planinputs import maker
from edgeserve.cli.planning import Case
from edgeserve.placement import Problem

_COLOURS = {"source": "#dcefe0", "task": "#dbe7f6", "relay": "#eeeeee", "sink": "#f6e7d4"}
_EAGER, _LAZY, _FULL = "#c26a2c", "#2c6ac2", "#b03030"
_HEIGHT, _GAP, _HEAD, _PAD, _APART, _MARGIN = 30, 14, 48, 14, 120, 24
_CHARACTER, _BAR = 7.5, 160


def picture(graph: Mapping[str, Any], problem: Problem, case: Case) -> str:
    """The plan as SVG: a box for each node that runs something, in the order of flow; streams as arrows; a bar for each link."""
    places = _places(graph, problem, case)
    steps = _steps(graph)
    boxes: dict[str, list[str]] = {}
    for name in sorted(steps, key=lambda name: steps[name]):
        for node in places[name]:
            boxes.setdefault(node, []).append(name)
    kinds = {part["name"]: part["kind"] for part in graph["nodes"]}
    longest = max(len(text) for text in (*boxes, *steps))
    width = max(170, int(longest * _CHARACTER) + 2 * _PAD)
    drawn, at = list[str](), dict[tuple[str, str], tuple[int, int]]()
    for column, (node, names) in enumerate(boxes.items()):
        x = _MARGIN + column * (width + 2 * _PAD + _APART)
        drawn += _box(x, node, len(names), width, case, broker=node == problem.broker)
        for row, name in enumerate(names):
            y = _MARGIN + _HEAD + row * (_HEIGHT + _GAP)
            at[node, name] = x + _PAD, y
            drawn.append(_rect(x + _PAD, y, width, _HEIGHT, _COLOURS[kinds[name]]))
            drawn.append(_text(x + _PAD + width // 2, y + 20, name, anchor="middle"))
    for edge in graph["edges"]:
        for start in places[edge["from"]]:
            for end in places[edge["to"]]:
                drawn.append(_arrow(at[start, edge["from"]], at[end, edge["to"]], width, case.routing[maker(edge["from"])]))
    bottom = _MARGIN + _HEAD + max(len(names) for names in boxes.values()) * (_HEIGHT + _GAP) + _PAD
    links, height = _links(problem, case, bottom + 2 * _MARGIN)
    right = max(_MARGIN + len(boxes) * (width + 2 * _PAD + _APART), 560)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {height}" width="{right}" height="{height}" '
        'font-family="sans-serif" font-size="13">'
    )
    marks = "".join(
        f'<marker id="{mode}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{colour}"/></marker>'
        for mode, colour in (("eager", _EAGER), ("lazy", _LAZY))
    )
    title = f"<title>{escape(graph['pipeline'])}</title><defs>{marks}</defs>"
    return "\n".join([head, title, *drawn, *links, "</svg>"]) + "\n"


def _places(graph: Mapping[str, Any], problem: Problem, case: Case) -> dict[str, tuple[str, ...]]:
    sinks = {sink.name.partition(" of ")[0]: (sink.node,) for sink in problem.sinks}
    ends = {source.name: (source.node,) for source in problem.sources} | sinks
    return {part["name"]: ends.get(part["name"]) or case.assignment[part["name"]] for part in graph["nodes"]}


def _steps(graph: Mapping[str, Any]) -> dict[str, int]:
    """How many steps from the first source each part is, at most."""
    found = {part["name"]: 0 for part in graph["nodes"]}
    for _ in found:  # no way is longer, because there are no circles
        for edge in graph["edges"]:
            found[edge["to"]] = max(found[edge["to"]], found[edge["from"]] + 1)
    return found


def _box(x: int, node: str, count: int, width: int, case: Case, *, broker: bool) -> list[str]:
    load = case.evaluation.nodes[node]
    tall = _HEAD + count * (_HEIGHT + _GAP)
    busy = f"{100 * load.utilisation:.0f} % of its cores{', and the broker' if broker else ''}"
    broken = any(each.where.partition(" ")[0] == node for each in case.evaluation.violations)
    return [
        _rect(x, _MARGIN, width + 2 * _PAD, tall, "#fafafa", stroke=_FULL if broken else "#999"),
        _text(x + _PAD, _MARGIN + 19, node, bold=True),
        _text(x + _PAD, _MARGIN + 36, busy, size=11),
    ]


def _arrow(start: tuple[int, int], end: tuple[int, int], width: int, mode: str) -> str:
    (x, y), (to_x, to_y) = start, end
    y, to_y = y + _HEIGHT // 2, to_y + _HEIGHT // 2
    if x == to_x:  # within a node, along its right side
        x, to_x = x + width, to_x + width
        bend, to_bend = x + _APART // 3, to_x + _APART // 3
    elif x < to_x:
        x = x + width
        bend, to_bend = x + _APART // 2, to_x - _APART // 2
    else:  # back to a node further left
        to_x = to_x + width
        bend, to_bend = x - _APART // 2, to_x + _APART // 2
    look = f'stroke="{_LAZY}" stroke-dasharray="6 4"' if mode == "lazy" else f'stroke="{_EAGER}"'
    return f'<path d="M{x} {y}C{bend} {y} {to_bend} {to_y} {to_x} {to_y}" fill="none" stroke-width="1.5" {look} marker-end="url(#{mode})"/>'


def _links(problem: Problem, case: Case, top: int) -> tuple[list[str], int]:
    """A bar for each link that carries something, fullest first, what the colours mean, and where all that ends."""
    used = case.evaluation.link_utilisation
    drawn, y = list[str](), top
    for link in sorted((link for link in problem.links if used[link.name]), key=lambda link: -used[link.name]):
        full = used[link.name] > link.max_utilisation * (1 + 1e-9)
        drawn.append(_rect(_MARGIN, y, _BAR, 14, "#f0f0f0"))
        drawn.append(_rect(_MARGIN, y, max(round(_BAR * min(used[link.name], 1)), 1), 14, _FULL if full else "#8aa8c8"))
        text = f"{link.name} ({' - '.join(link.ends)}): {100 * used[link.name]:.2g} % of {link.bandwidth_bytes_s / 1e6:.3g} MB/s"
        drawn.append(_text(_MARGIN + _BAR + 10, y + 12, text))
        y += 24
    for x, mode, colour in ((_MARGIN, "eager: through the broker", _EAGER), (_MARGIN + 220, "lazy: straight, when it is used", _LAZY)):
        dashes = ' stroke-dasharray="6 4"' if mode.startswith("lazy") else ""
        drawn.append(f'<path d="M{x} {y + 10}h30" fill="none" stroke-width="1.5" stroke="{colour}"{dashes}/>')
        drawn.append(_text(x + 38, y + 14, mode))
    return drawn, y + 24 + _MARGIN


def _rect(x: int, y: int, width: int, height: int, fill: str, stroke: str = "#777") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"/>'


def _text(x: int, y: int, text: str, *, anchor: str = "start", size: int = 13, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{weight}>{escape(text)}</text>'


__all__ = ("picture",)
