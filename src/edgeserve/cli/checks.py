"""A finding of `edgeserve doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was seen, and what to do where it is not well."""

    status: Status
    name: str
    seen: str
    to_do: str = ""


__all__ = ("Check", "Status")
