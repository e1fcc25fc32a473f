"""The research prototype's own tests, unchanged, on our package: a real Pulsar where they look for one, and a real FTP server.

    curl -LO https://raw.githubusercontent.com/swjz/EdgeServe/pulsar/tests/test_pipeline.py
    python bench/prototype.py test_pipeline.py               three times without the FTP tests, on one broker that is not cleaned up
    python bench/prototype.py test_pipeline.py --ftp         all of them, once, on a fresh broker; needs root for port 21 and /srv/ftp

Exits 1 when a test fails, or when the file has none of those that count. Pulsar is started on its usual port, 6650, and stopped again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
FILES = Path("/srv/ftp/files")
TIMES = 3


def broker(state: str, *arguments: str) -> None:
    """`edgeserve broker`, with data of its own."""
    command = [str(Path(sys.executable).with_name("edgeserve")), "broker", *arguments]
    subprocess.run(command, check=True, env=os.environ | {"EDGESERVE_STATE_DIR": state})


def main() -> None:
    """Runs them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ftp", action="store_true", help="the FTP tests, too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeserve-prototype-") as state, contextlib.ExitStack() as stack:
        if given.ftp:
            sys.path.insert(0, str(HERE))
            from tests.ftp_server import Ftp

            FILES.mkdir(parents=True, exist_ok=True)
            stack.callback(Ftp(FILES.parent, 21).close)
        broker(state, "start", "pulsar")
        stack.callback(broker, state, "stop", "pulsar")
        # Not our settings of pytest, and not our tests' helpers.
        command = [sys.executable, "-m", "pytest", "-qx", "-c", os.devnull, "--rootdir", state, str(given.file.resolve())]
        expected = 6 if given.ftp else 4
        if not given.ftp:
            command += ["-k", "not ftp"]
        for _ in range(1 if given.ftp else TIMES):
            done = subprocess.run(command, cwd=state, stdout=subprocess.PIPE, text=True, check=False)
            print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stdout, flush=True)
            if done.returncode or f"{expected} passed" not in done.stdout:
                sys.exit(f"expected were {expected} tests that pass")


if __name__ == "__main__":
    main()
