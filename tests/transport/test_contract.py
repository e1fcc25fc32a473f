"""The engines that come with edgeserve, held to the contract that they ship."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from edgeserve.testing.transport import SettlingCases, TransportContract


class TestMemory(TransportContract):
    @pytest.fixture
    def url(self) -> str:
        return f"memory://{uuid.uuid4().hex}"


class TestLocal(TransportContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"local://{tmp_path}/store"


class TestLocalOnDisk(SettlingCases):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"local://{tmp_path}/store?durability=disk"
