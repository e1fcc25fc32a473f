"""Pulsar's distribution: an unpacked one that is named, or the one that Maven fetches, unpacked once into the user's cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from edgeserve.cli.brokers.engine import Progress
from edgeserve.cli.output import CommandError

VERSION = "4.0.8"
ARTIFACT = f"org.apache.pulsar:pulsar-server-distribution:{VERSION}:tar.gz:bin"
_ARCHIVE = f"org/apache/pulsar/pulsar-server-distribution/{VERSION}/pulsar-server-distribution-{VERSION}-bin.tar.gz"
_FETCH_S = 1800.0


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/edgeserve`, else `~/.cache/edgeserve`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "edgeserve"


def checked(home: Path, said_by: str) -> Path:
    """A directory that somebody named, if it holds Pulsar."""
    if not (home / "bin" / "pulsar").is_file() or not (home / "conf" / "standalone.conf").is_file():
        raise CommandError(
            f"{home} holds no Pulsar: bin/pulsar or conf/standalone.conf is missing", said_by, "name an unpacked distribution"
        )
    return home.absolute()


def java_is_there() -> bool:
    """Whether there is a Java that Pulsar's scripts would use."""
    given = os.environ.get("JAVA_HOME")
    return (Path(given) / "bin" / "java").is_file() if given else shutil.which("java") is not None


def is_here() -> bool:
    """Whether Maven has fetched it before, to its usual place."""
    return (_unpacked_here() / "bin" / "pulsar").is_file() or (Path.home() / ".m2" / "repository" / _ARCHIVE).is_file()


def _unpacked_here() -> Path:
    return cache_directory() / f"apache-pulsar-{VERSION}"


def by_maven(progress: Progress) -> Path:
    """The unpacked distribution; fetched and unpacked where that hasn't been done yet."""
    home = _unpacked_here()
    if (home / "bin" / "pulsar").is_file():
        return home
    archive = Path.home() / ".m2" / "repository" / _ARCHIVE
    if not archive.is_file():
        archive = _fetch(progress)
    progress(f"unpacking {archive.name} to {home}")
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix="unpacking-") as place:
        try:
            with tarfile.open(archive) as tar:
                if hasattr(tarfile, "data_filter"):
                    tar.extractall(place, filter="data")
                else:
                    tar.extractall(place)
        except (tarfile.TarError, EOFError, OSError) as exc:
            raise CommandError(f"the distribution cannot be unpacked: {exc}", str(archive), "remove that file, and try again") from exc
        unpacked = checked(Path(place) / home.name, str(archive))
        try:
            unpacked.rename(home)
        except OSError:
            # Another process was faster.
            checked(home, str(archive))
    return home


def _maven(*arguments: str) -> tuple[bool, str]:
    try:
        done = subprocess.run(
            ["mvn", "-B", "-q", *arguments], capture_output=True, text=True, timeout=_FETCH_S, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return False, str(exc)
    # It writes codes for colours where there is no terminal, too.
    return done.returncode == 0, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr).strip()


def _fetch(progress: Progress) -> Path:
    progress(f"fetching Pulsar {VERSION} by Maven: 245 MB, once")
    goal = ("dependency:get", "-Dtransitive=false", f"-Dartifact={ARTIFACT}")
    fetched, text = _maven(*goal)
    where = f"mvn -B -q {' '.join(goal)}"
    to_do = "check the network and Maven's settings; or name an unpacked distribution by --home"
    if not fetched:
        raise CommandError(f"Maven could not fetch Pulsar: {(text.splitlines() or ['it said nothing'])[0]}", where, to_do)
    # The settings of whoever runs this may have the repository elsewhere.
    places = [Path.home() / ".m2" / "repository"]
    told, text = _maven("help:evaluate", "-Dexpression=settings.localRepository", "-DforceStdout")
    if told and text:
        places.append(Path(text.splitlines()[-1]))
    for place in places:
        if (place / _ARCHIVE).is_file():
            return place / _ARCHIVE
    raise CommandError(f"Maven fetched Pulsar to another place than {' or '.join(map(str, places))}", where, to_do)


__all__ = ("ARTIFACT", "VERSION", "by_maven", "cache_directory", "checked", "is_here", "java_is_there")
