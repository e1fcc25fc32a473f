"""What every test gets: a state directory of its own, and the markers' reasons for not running."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A timed example fails on a machine that is busy with something else, which says nothing of the code.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


# A shell starts background jobs with Ctrl-C ignored, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def _reason_not_to_run(item: pytest.Item) -> str | None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        return "takes minutes: run with --slow"
    if item.get_closest_marker("pulsar") and not os.environ.get("EDGESERVE_TEST_PULSAR"):
        return "no broker: set EDGESERVE_TEST_PULSAR=pulsar://host:6650"
    if item.get_closest_marker("netns") and (os.geteuid() != 0 or shutil.which("ip") is None):
        return "needs root and the ip command"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _reason_not_to_run(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _own_state_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the state of the person who runs it."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    for name in ("EDGESERVE_NODE", "EDGESERVE_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return home
