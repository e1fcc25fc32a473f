"""A graph to look at: as Mermaid, which many sites draw, and as SVG."""

from __future__ import annotations

from html import escape

from edgeserve.pipeline.graph import Graph, Part, PartKind

_SHAPES: dict[PartKind, tuple[str, str]] = {"source": ("([", "])"), "task": ("[", "]"), "relay": ("((", "))"), "sink": ("[[", "]]")}
_COLOURS: dict[PartKind, str] = {"source": "#dcefe0", "task": "#dbe7f6", "relay": "#eeeeee", "sink": "#f6e7d4"}
_WIDTH, _HEIGHT, _APART, _BELOW, _MARGIN = 170, 44, 70, 24, 20
_CHARACTER = 7.5


def mermaid(graph: Graph) -> str:
    """The graph as a Mermaid flowchart."""
    ids = {part.name: f"n{i}" for i, part in enumerate(graph.parts)}
    lines = ["flowchart LR"]
    for part in graph.parts:
        left, right = _SHAPES[part.kind]
        text = " · ".join(_label(part)).replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;")
        lines.append(f'    {ids[part.name]}{left}"{text}"{right}')
    lines += [f"    {ids[writer.name]} --> {ids[reader.name]}" for writer, reader in graph.edges()]
    return "\n".join(lines) + "\n"


def svg(graph: Graph) -> str:
    """The graph as SVG: each node right of all that feed it."""
    column = _columns(graph)
    rows: dict[int, int] = {}
    at: dict[str, tuple[int, int]] = {}
    width = max(_WIDTH, *(int(len(line) * _CHARACTER) + 24 for part in graph.parts for line in _label(part)))
    for part in graph.parts:
        row = rows[column[part.name]] = rows.get(column[part.name], -1) + 1
        at[part.name] = _MARGIN + column[part.name] * (width + _APART), _MARGIN + row * (_HEIGHT + _BELOW)
    right = max(x for x, _ in at.values()) + width + _MARGIN
    bottom = max(y for _, y in at.values()) + _HEIGHT + _MARGIN
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" width="{right}" height="{bottom}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{escape(graph.pipeline)}</title>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
    ]
    for writer, reader in graph.edges():
        (x, y), (to_x, to_y) = at[writer.name], at[reader.name]
        x, y, to_y, bend = x + width, y + _HEIGHT // 2, to_y + _HEIGHT // 2, _APART // 2
        path = f"M{x} {y}C{x + bend} {y} {to_x - bend} {to_y} {to_x} {to_y}"
        drawn.append(f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#end)"/>')
    for part in graph.parts:
        x, y = at[part.name]
        drawn.append(f'<rect x="{x}" y="{y}" width="{width}" height="{_HEIGHT}" rx="6" fill="{_COLOURS[part.kind]}" stroke="#555"/>')
        lines = _label(part)
        for i, line in enumerate(lines):
            down = y + _HEIGHT // 2 + 5 + (18 * i - 9 * (len(lines) - 1))
            drawn.append(f'<text x="{x + width // 2}" y="{down}" text-anchor="middle">{escape(line)}</text>')
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _label(part: Part) -> list[str]:
    name = f"{part.name} ({' + '.join(part.stages)})" if part.stages else part.name
    if part.replicas > 1:
        name += f" x {part.replicas}"
    places = part.declared.places
    return [name, f"on {', '.join(dict.fromkeys(places))}"] if places else [name]


def _columns(graph: Graph) -> dict[str, int]:
    """How many steps from the first source each part is, at most."""
    feeds = graph.edges()
    found = {part.name: 0 for part in graph.parts}
    for _ in graph.parts:  # no way is longer, because there are no circles
        for writer, reader in feeds:
            found[reader.name] = max(found[reader.name], found[writer.name] + 1)
    return found


__all__ = ("mermaid", "svg")
