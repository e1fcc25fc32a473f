"""The examples are programs, not a package: their modules are imported as their own programs import them."""

from __future__ import annotations

import sys
from pathlib import Path

NETWORK_SECURITY = Path(__file__).resolve().parents[2] / "examples" / "network_security"
ROOM_AR = NETWORK_SECURITY.parent / "room_ar"
sys.path[:0] = [str(NETWORK_SECURITY), str(ROOM_AR)]
