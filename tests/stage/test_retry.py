"""Trying again, however often."""

from __future__ import annotations

import pytest

from edgeserve.stage.control import Control
from edgeserve.stage.retry import LONGEST_BACKOFF_S, GaveUp, try_again


@pytest.mark.parametrize("backoff_s", [0.0, 0.1])
def test_pauses_double_up_to_the_longest_however_many_there_are(monkeypatch: pytest.MonkeyPatch, backoff_s: float) -> None:
    pauses: list[float] = []

    def pause(_: Control, seconds: float) -> bool:
        pauses.append(seconds)
        return True

    def fail() -> None:
        raise ValueError("no")

    monkeypatch.setattr(Control, "pause", pause)
    with pytest.raises(GaveUp) as gave_up:
        try_again(ValueError("no"), fail, retries=3_000, backoff_s=backoff_s, control=Control())
    assert gave_up.value.attempts == 3_001
    assert pauses[:4] == [backoff_s, 2 * backoff_s, 4 * backoff_s, 8 * backoff_s]
    assert pauses[-1] == (LONGEST_BACKOFF_S if backoff_s else 0.0) and len(pauses) == 3_000
