"""What every test gets: a state directory of its own, and the markers' reasons for not running."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tests import servers

# A timed example fails on a machine that is busy with something else, which says nothing of the code.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


# A shell starts background jobs with Ctrl-C ignored, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests start hundreds of processes. Where this is set each of them compiles all that it imports: 2 s in place of 0.7 s.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def _reason_not_to_run(item: pytest.Item) -> str | None:
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        return "takes minutes: run with --slow"
    if item.get_closest_marker("netns") and (os.geteuid() != 0 or shutil.which("ip") is None):
        return "needs root and the ip command"
    return None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for engine in ("pulsar", "nats"):
            if {f"{engine}_url", f"new_{engine}"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(engine)
        reason = _reason_not_to_run(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and servers.given("pulsar") is None:
        if any(item.get_closest_marker("pulsar") and not item.get_closest_marker("skip") for item in session.items):
            servers.fetch("pulsar")


def _shared(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    url = servers.given(engine)
    if url is not None:
        yield url
        return
    server = servers.Server(engine, tmp_path_factory.mktemp(engine))
    try:
        yield server.url
    finally:
        server.stop()


def _own(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.NewServer]:
    made: list[servers.Server] = []

    def make(*, token: str | None = None, plain: bool = False) -> servers.Server:
        made.append(servers.Server(engine, tmp_path_factory.mktemp(engine), token=token, plain=plain))
        return made[-1]

    try:
        yield make
    finally:
        for server in made:
            server.kill()


@pytest.fixture(scope="session")
def pulsar_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Pulsar that the whole run shares: its node URL, with `?admin=`."""
    yield from _shared("pulsar", tmp_path_factory)


@pytest.fixture(scope="session")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A NATS server that the whole run shares."""
    yield from _shared("nats", tmp_path_factory)


@pytest.fixture
def new_pulsar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.NewServer]:
    """`new_pulsar()` starts a Pulsar of the test's own, which it may kill and start again."""
    yield from _own("pulsar", tmp_path_factory)


@pytest.fixture
def new_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.NewServer]:
    """`new_nats()` starts a NATS server of the test's own, which it may kill and start again."""
    yield from _own("nats", tmp_path_factory)


@pytest.fixture(autouse=True)
def _own_state_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the state of the person who runs it."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    for name in ("EDGESERVE_NODE", "EDGESERVE_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 24 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, to mount a small filesystem")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("mounting a filesystem is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
