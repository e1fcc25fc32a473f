"""Bars, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_COLOURS = ("#8aa8c8", "#c26a2c", "#6aa37a", "#9a7ab8")
_WIDTH, _BAR, _GAP, _HEAD, _NAME, _NUMBER = 720, 14, 10, 46, 150, 90


def chart(title: str, unit: str, rows: Mapping[str, Mapping[str, float | None]], y: int) -> tuple[list[str], int]:
    """A bar for each figure of each row, the longest over the whole width; and where it ends. None: there is no figure."""
    figures = [value for row in rows.values() for value in row.values() if value is not None]
    most = max(figures, default=0.0) or 1.0
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    drawn = [_text(10, y + 16, f"{title}, {unit}", bold=True)]
    x = 10
    for name in names if len(names) > 1 else ():
        drawn += [_rect(x, y + 26, 12, 12, _COLOURS[names.index(name)]), _text(x + 17, y + 37, name)]
        x += 32 + 8 * len(name)
    y += _HEAD if len(names) > 1 else _HEAD - 20
    for label, row in rows.items():
        drawn.append(_text(_NAME - 8, y + len(row) * _BAR // 2 + 4, label, anchor="end"))
        for name, value in row.items():
            if value is not None:
                drawn.append(
                    _rect(_NAME, y, max(1, round((_WIDTH - _NAME - _NUMBER) * value / most)), _BAR - 2, _COLOURS[names.index(name)])
                )
            end = _NAME + (0 if value is None else round((_WIDTH - _NAME - _NUMBER) * value / most))
            drawn.append(_text(end + 6, y + _BAR - 3, "none" if value is None else f"{value:.3g}"))
            y += _BAR
        y += _GAP
    return drawn, y + _GAP


def page(title: str, charts: list[tuple[str, str, Mapping[str, Mapping[str, float | None]]]]) -> str:
    """Charts under each other: (title, unit, rows)."""
    drawn, y = [_text(10, 22, title, size=16, bold=True)], 40
    for name, unit, rows in charts:
        more, y = chart(name, unit, rows, y)
        drawn += more
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}" font-family="sans-serif">'
    return "\n".join([head, _rect(0, 0, _WIDTH, y, "#ffffff"), *drawn, "</svg>"]) + "\n"


def _rect(x: int, y: int, width: int, height: int, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"/>'


def _text(x: int, y: int, text: str, *, anchor: str = "start", size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{weight}>{escape(text)}</text>'
