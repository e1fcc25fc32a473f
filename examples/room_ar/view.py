"""What a person sees of a track: the room from above as a film and in the terminal, and how far it is from the truth."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from room import EVERY, FPS, SIZE, Array, load_cameras, load_truth, summary

_SCALE = 80
_TRAIL = 12
_WALL, _CAMERA, _TRUTH, _TRACK = (90, 90, 90), (80, 160, 250), (70, 200, 90), (250, 130, 20)


def fixes(out: Path) -> list[dict[str, Any]]:
    """The points of the track that are written so far."""
    path = out / "track.jsonl"
    return [json.loads(line) for line in path.read_text().rpartition("\n")[0].splitlines()] if path.exists() else []


def off_cm(fix: dict[str, Any], truth: dict[int, Array]) -> float:
    """How far a point is from the truth."""
    return 100 * float(np.linalg.norm(np.array(fix["place"]) - truth[fix["ns"]]))


def watch(folder: Path, out: Path, going: Callable[[], bool]) -> None:
    """Draws the room from above in the terminal while it goes on."""
    view, truth = TopView([each.place for each in load_cameras(folder)]), load_truth(folder)
    shown = 0
    while going():
        if len(found := fixes(out)) > shown:
            shown = len(found)
            sys.stdout.write(view.text(np.array(found[-1]["place"]), off_cm(found[-1], truth)))
            sys.stdout.flush()
        time.sleep(0.1)


def report(folder: Path, out: Path) -> dict[str, Any]:
    """How good a track is; writes it to report.json, and the room from above to track.mp4."""
    found, truth = fixes(out), load_truth(folder)
    if found:
        _film(out / "track.mp4", TopView([each.place for each in load_cameras(folder)]), found, truth)
    errors = [off_cm(fix, truth) for fix in found]
    took = (found[-1]["done_ns"] - found[0]["done_ns"]) / 1e9 if found else 0.0
    figures = {
        "results": len(found),
        "asked": summary(folder)["asked"],
        "median_cm": round(float(np.median(errors)), 3) if errors else None,
        "p95_cm": round(float(np.percentile(errors, 95)), 3) if errors else None,
        "hz": round((len(found) - 1) / took, 3) if took else 0.0,
    }
    (out / "report.json").write_text(json.dumps(figures) + "\n")
    return figures


def _film(path: Path, view: TopView, found: list[dict[str, Any]], truth: dict[int, Array]) -> None:
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=Fraction(FPS, EVERY))
        stream.height, stream.width = view.shape
        stream.pix_fmt = "yuv420p"
        for n in range(len(found)):
            pairs = [(np.array(fix["place"]), truth[fix["ns"]]) for fix in found[max(n - _TRAIL, 0) : n + 1]]
            frame = av.VideoFrame.from_ndarray(view.picture(pairs), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(EVERY, FPS)
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))


class TopView:
    """The room from above; x to the right, y upwards."""

    def __init__(self, cameras: list[Array]) -> None:
        self.shape = (int(SIZE[1] * _SCALE) // 2 * 2, int(SIZE[0] * _SCALE) // 2 * 2)
        self._empty = np.full((*self.shape, 3), 25, np.uint8)
        for edge in (np.s_[:3], np.s_[-3:], np.s_[:, :3], np.s_[:, -3:]):
            self._empty[edge] = _WALL
        for place in cameras:
            self._dot(self._empty, place, 6, _CAMERA)

    def _dot(self, picture: npt.NDArray[np.uint8], place: Array, radius: int, colour: tuple[int, int, int]) -> None:
        x, y = place[0] * _SCALE, self.shape[0] - place[1] * _SCALE
        rows, columns = np.ogrid[: self.shape[0], : self.shape[1]]
        picture[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = colour

    def picture(self, pairs: list[tuple[Array, Array]]) -> npt.NDArray[np.uint8]:
        """The newest points of the track, each with the truth under it."""
        made = self._empty.copy()
        for age, (place, truth) in zip(range(len(pairs) - 1, -1, -1), pairs, strict=True):
            self._dot(made, truth, 9 if age == 0 else 4, _TRUTH)
            self._dot(made, place, 6 if age == 0 else 2, _TRACK)
        return made

    def text(self, place: Array, error_cm: float) -> str:
        """For a terminal: it begins at the top of the screen."""
        columns, rows = 48, 16
        lines = [[" "] * columns for _ in range(rows)]
        x, y = (int(place[axis] / SIZE[axis] * cells) for axis, cells in ((0, columns), (1, rows)))
        lines[rows - 1 - min(max(y, 0), rows - 1)][min(max(x, 0), columns - 1)] = "O"
        drawn = "\n".join(f"|{''.join(line)}|" for line in lines)
        edge = "+" + "-" * columns + "+"
        where = "  ".join(f"{axis} {value:5.2f} m" for axis, value in zip("xyz", place, strict=True))
        return f"\x1b[H\x1b[2J{edge}\n{drawn}\n{edge}\n{where}  off by {error_cm:.1f} cm\n"
