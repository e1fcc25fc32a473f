"""What a person sees of a track: the room from above as a film and in the terminal, and how far it is from the truth."""

from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from room import EVERY, FPS, SIZE, load_cameras, load_truth, summary

_SCALE = 80
_TRAIL = 12
_WALL, _CAMERA, _TRUTH, _TRACK = (90, 90, 90), (80, 160, 250), (70, 200, 90), (250, 130, 20)


class Report:
    """Takes the fixes of a track as they come; `report.json` says how good they were when it is closed."""

    def __init__(self, folder: Path, out: Path, *, live: bool) -> None:
        self._out, self._truth, self._summary, self._live = out, load_truth(folder), summary(folder), live
        self._view = TopView([each.place for each in load_cameras(folder)])
        self._fixes: list[tuple[int, list[float]]] = []
        self._errors: list[float] = []
        self._times: list[float] = []
        self._film: Any = None

    def __enter__(self) -> Report:
        self._film = av.open(str(self._out / "track.mp4"), "w")
        stream = self._film.add_stream("libx264", rate=Fraction(FPS, EVERY))
        stream.height, stream.width = self._view.shape
        stream.pix_fmt = "yuv420p"
        return self

    def add(self, fix: dict[str, Any]) -> None:
        """One point of the track."""
        place = np.array(fix["place"])
        self._times.append(time.monotonic())
        self._fixes = [*self._fixes[-_TRAIL:], (fix["ns"], fix["place"])]
        self._errors.append(100 * float(np.linalg.norm(place - self._truth[fix["ns"]])))
        pairs = [(np.array(at), self._truth[ns]) for ns, at in self._fixes]
        frame = av.VideoFrame.from_ndarray(self._view.picture(pairs), format="rgb24")
        frame.pts, frame.time_base = len(self._errors) - 1, Fraction(EVERY, FPS)
        self._film.mux(self._film.streams.video[0].encode(frame))
        if self._live:
            sys.stdout.write(self._view.text(place, self._errors[-1]))
            sys.stdout.flush()

    def figures(self) -> dict[str, Any]:
        """What the report says."""
        took = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        return {
            "results": len(self._errors),
            "asked": self._summary["asked"],
            "median_cm": round(float(np.median(self._errors)), 3) if self._errors else None,
            "p95_cm": round(float(np.percentile(self._errors, 95)), 3) if self._errors else None,
            "hz": round((len(self._times) - 1) / took, 3) if took else 0.0,
        }

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._errors:
            self._film.mux(self._film.streams.video[0].encode(None))
        self._film.close()
        (self._out / "report.json").write_text(json.dumps(self.figures()) + "\n")


class TopView:
    """The room from above; x to the right, y upwards."""

    def __init__(self, cameras: list[npt.NDArray[np.float64]]) -> None:
        self.shape = (int(SIZE[1] * _SCALE) // 2 * 2, int(SIZE[0] * _SCALE) // 2 * 2)
        self._empty = np.full((*self.shape, 3), 25, np.uint8)
        for edge in (np.s_[:3], np.s_[-3:], np.s_[:, :3], np.s_[:, -3:]):
            self._empty[edge] = _WALL
        for place in cameras:
            self._dot(self._empty, place, 6, _CAMERA)

    def _dot(self, picture: npt.NDArray[np.uint8], place: npt.NDArray[np.float64], radius: int, colour: tuple[int, int, int]) -> None:
        x, y = place[0] * _SCALE, self.shape[0] - place[1] * _SCALE
        rows, columns = np.ogrid[: self.shape[0], : self.shape[1]]
        picture[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = colour

    def picture(self, pairs: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]) -> npt.NDArray[np.uint8]:
        """The newest points of the track, each with the truth under it."""
        made = self._empty.copy()
        for age, (place, truth) in zip(range(len(pairs) - 1, -1, -1), pairs, strict=True):
            self._dot(made, truth, 9 if age == 0 else 4, _TRUTH)
            self._dot(made, place, 6 if age == 0 else 2, _TRACK)
        return made

    def text(self, place: npt.NDArray[np.float64], error_cm: float) -> str:
        """For a terminal: it begins at the top of the screen."""
        columns, rows = 48, 16
        lines = [[" "] * columns for _ in range(rows)]
        x, y = (int(place[axis] / SIZE[axis] * cells) for axis, cells in ((0, columns), (1, rows)))
        lines[rows - 1 - min(max(y, 0), rows - 1)][min(max(x, 0), columns - 1)] = "O"
        drawn = "\n".join(f"|{''.join(line)}|" for line in lines)
        edge = "+" + "-" * columns + "+"
        where = "  ".join(f"{axis} {value:5.2f} m" for axis, value in zip("xyz", place, strict=True))
        return f"\x1b[H\x1b[2J{edge}\n{drawn}\n{edge}\n{where}  off by {error_cm:.1f} cm\n"
