"""The command and a store of the test's own, as the tests of the command line have them."""

from __future__ import annotations

from tests.cli.conftest import edgeserve, node

__all__ = ("edgeserve", "node")
