"""Real encoded videos for tests: each frame has its number in it, as 16 large squares, light or dark, so that any codec keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")

WIDTH, HEIGHT, SQUARE = 64, 48, 16
RATE = 25


def picture(number: int) -> np.ndarray[Any, Any]:
    """Gray, uint8, of shape (HEIGHT, WIDTH): bits of the number in the upper two rows of squares, the lower row is gray."""
    bits = np.array([number >> n & 1 for n in range(8)], np.uint8).reshape(2, 4)
    squares = np.concatenate([40 + 160 * bits, np.full((1, 4), 128, np.uint8)])
    return np.kron(squares, np.ones((SQUARE, SQUARE), np.uint8)).astype(np.uint8)


def number(seen: np.ndarray[Any, Any]) -> int:
    """The number in a picture, whatever its format and size."""
    gray = seen if seen.ndim == 2 else seen[..., 1]
    height, width = gray.shape
    rows, columns = (np.arange(2) * 2 + 1) * height // 6, (np.arange(4) * 2 + 1) * width // 8
    bits = (gray[np.ix_(rows, columns)] > 120).ravel()
    return int(sum(1 << n for n, bit in enumerate(bits) if bit))


def encode(
    path: Path | str | Any,
    numbers: Iterable[int],
    *,
    codec: str = "libx264",
    format: str | None = None,
    rate: int = RATE,
    times: Iterable[int] | None = None,
    metadata: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    gop: int = 10,
) -> Any:
    """Writes a video. `times`: of the frames, in units of 1/1000 s; None: `rate` a second."""
    with av.open(str(path) if isinstance(path, Path) else path, "w", format=format, options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate)
        kind = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, kind
        stream.codec_context.gop_size = gop
        base = Fraction(1, rate) if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = base
        if options:
            stream.codec_context.options = options
        stamps = iter(times) if times is not None else None
        for index, each in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(picture(each), format="gray").reformat(format=kind)
            frame.pts, frame.time_base = (index if stamps is None else next(stamps)), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
