"""placeholder"""

from typing import Any

from edgeserve.stage.base import Stage


class Join(Stage):
    def __init__(self, *a: Any, **k: Any) -> None:
        raise NotImplementedError
