"""The few commands of Docker that a broker in a container needs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from edgeserve.cli.brokers.engine import HOST, Progress
from edgeserve.cli.output import CommandError

_ANSWER_S = 10.0
_PULL_S = 1800.0


def _docker(*arguments: str, timeout_s: float = _ANSWER_S) -> tuple[bool, str]:
    try:
        done = subprocess.run(
            ["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return False, str(exc)
    return done.returncode == 0, (done.stdout if done.returncode == 0 else done.stderr).strip()


def refusal() -> str | None:
    """Why no container can be started here; None where a Docker engine answers."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    answered, text = _docker("version", "--format", "{{.Server.Version}}")
    return None if answered and text else f"no Docker engine answers: {(text.splitlines() or ['nothing was said'])[-1]}"


def fetch(image: str, progress: Progress) -> None:
    """Sees that an image is on this machine."""
    if _docker("image", "inspect", "--format", "{{.Id}}", image)[0]:
        return
    progress(f"fetching the image {image}")
    fetched, text = _docker("pull", "--quiet", image, timeout_s=_PULL_S)
    if not fetched:
        raise CommandError(
            f"the image {image} cannot be fetched: {' '.join(text.split())}",
            "docker pull",
            "check the network, or take another way: edgeserve broker start --with maven",
        )


def env_file(variables: Mapping[str, str]) -> str:
    """Variables as Docker reads them from a file: a line each, the value as it is."""
    for name, value in variables.items():
        if value.splitlines() not in ([], [value]):
            raise CommandError(f"the value of {name.removeprefix('PULSAR_PREFIX_')} has more than one line", "--set", "give it one line")
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def command(
    image: str, container: str, ports: tuple[int, ...], volumes: Mapping[Path, str], user: str, variables: Path, script: str
) -> tuple[str, ...]:
    """Runs a script in a new container, in the foreground: what it writes is what the command writes. Ports are of the loopback only."""
    words = ["docker", "run", "--rm", "--name", container, "--user", user]
    for port in ports:
        words += ["--publish", f"{HOST}:{port}:{port}"]
    for path, place in volumes.items():
        words += ["--volume", f"{path}:{place}"]
    return (*words, "--env-file", str(variables), image, "sh", "-c", script)


def runs(container: str) -> bool:
    """Whether a container of this name is up."""
    known, text = _docker("inspect", "--format", "{{.State.Running}}", container)
    return known and text == "true"


def process(container: str) -> int:
    """The number of a container's process on this machine; 0 where that cannot be told."""
    known, text = _docker("inspect", "--format", "{{.State.Pid}}", container)
    return int(text) if known and text.isdigit() else 0


def remove(container: str, grace_s: float) -> None:
    """Ends a container; it goes away with that."""
    _docker("stop", "--time", f"{grace_s:.0f}", container, timeout_s=grace_s + _ANSWER_S)
    _docker("rm", "--force", container)


__all__ = ("command", "env_file", "fetch", "process", "refusal", "remove", "runs")
