"""Apache Pulsar, standalone: in a container, or from its distribution."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path

from edgeserve.cli.brokers import distribution, docker
from edgeserve.cli.brokers.engine import HOST, Engine, Launch, Progress, Wish
from edgeserve.cli.brokers.record import Shelf
from edgeserve.cli.output import CommandError

IMAGE = f"apachepulsar/pulsar:{distribution.VERSION}"
_ADMIN_PORT = 8080
_MEMORY = "-Xms512m -Xmx1g -XX:MaxDirectMemorySize=1g"
_SHIPPED_OPTIONS = "-Dpulsar.allocator.exit_on_oom=true -Dio.netty.recycler.maxCapacityPerThread=4096"
_ANSWER_S = 5.0
SUITING = {
    # How long a reader at a topic's end waits before it looks again: most of the latency of a message.
    "managedLedgerNewEntriesCheckDelayInMillis": "1",
    "activeConsumerFailoverDelayTimeMillis": "0",
    "keepAliveIntervalSeconds": "3",
    "acknowledgmentAtBatchIndexLevelEnabled": "true",
    # Without these, what no group has subscribed to yet is deleted at once.
    "defaultRetentionTimeInMinutes": "1440",
    "defaultRetentionSizeInMB": "512",
}
"""What suits edgeserve, by the broker's names."""


def settings(port: int, admin_port: int, *, plain: bool, bind: str = HOST) -> dict[str, str]:
    """What is set, by the broker's names."""
    needed = {"brokerServicePort": str(port), "webServicePort": str(admin_port), "bindAddress": bind, "advertisedAddress": HOST}
    return needed if plain else needed | SUITING


def configuration(shipped: str, changes: dict[str, str]) -> str:
    """A settings file with values changed; names that it lacks come at its end."""
    left = dict(changes)

    def value(match: re.Match[str]) -> str:
        return f"{match[1]}={left.pop(match[1])}" if match[1] in left else match[0]

    text = re.sub(r"^(\w+)=.*$", value, shipped, flags=re.MULTILINE)
    return text.rstrip("\n") + "\n\n" + "".join(f"{name}={text}\n" for name, text in left.items())


def _loopback_options() -> str:
    """Its storage (a bookie) takes no settings from the file, and would listen on all interfaces."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is None:
        return ""
    return f"-Dorg.apache.bookkeeper.conf.readsystemproperties=true -DlisteningInterface={loopback} -DallowLoopback=true"


class Pulsar(Engine):
    """Pulsar on this machine."""

    name, title, port, admin_port, start_s, stop_s = "pulsar", "Pulsar", 6650, _ADMIN_PORT, 120.0, 30.0

    def check(self, wish: Wish) -> None:
        """Refuses what only NATS has."""
        if wish.token is not None:
            to_do = "leave --token out; a Pulsar with tokens is set up by hand"
            raise CommandError("--token is for NATS", "edgeserve broker start pulsar", to_do)

    def prepare(self, wish: Wish, shelf: Shelf, port: int, admin_port: int, data: Path, progress: Progress) -> Launch:
        """Finds Pulsar as the user wished, and writes its settings; the distribution's own file stays as it is."""
        home = self._home(wish, progress)
        if home is None:
            return self._contained(wish, shelf, port, admin_port, data, progress)
        return self._unpacked(home, wish, shelf, port, admin_port, data)

    def _home(self, wish: Wish, progress: Progress) -> Path | None:
        """The distribution to run; None: a container."""
        if wish.home is not None:
            return distribution.checked(wish.home, "--home")
        no_docker = None if wish.source == "maven" else docker.refusal()
        if wish.source != "maven" and no_docker is None:
            return None
        if wish.source == "docker":
            raise CommandError(str(no_docker), "docker version", "start Docker, or take another way: --with maven, or --home DIRECTORY")
        named = os.environ.get("PULSAR_HOME")
        if named and wish.source == "auto":
            return distribution.checked(Path(named), "PULSAR_HOME")
        if shutil.which("mvn") is None and not distribution.is_here():
            reasons = "there is no mvn command" if no_docker is None else f"{no_docker}, and there is no mvn command"
            raise CommandError(
                f"Pulsar cannot be had: {reasons}",
                "edgeserve broker start pulsar",
                "start Docker; or install Maven and Java 17; or name an unpacked distribution by --home or PULSAR_HOME",
            )
        return distribution.by_maven(progress)

    def _unpacked(self, home: Path, wish: Wish, shelf: Shelf, port: int, admin_port: int, data: Path) -> Launch:
        if not distribution.java_is_there():
            raise CommandError("there is no Java for Pulsar", "JAVA_HOME and PATH", "install a Java of version 17 or newer")
        shipped = (home / "conf" / "standalone.conf").read_text(encoding="utf-8")
        file = shelf.write("standalone.conf", configuration(shipped, settings(port, admin_port, plain=wish.plain) | dict(wish.settings)))
        command = (
            *(str(home / "bin" / "pulsar"), "standalone", "-nss", "-nfw"),
            *("--config", str(file)),
            *("--metadata-dir", str(data / "metadata"), "--bookkeeper-dir", str(data / "bookkeeper")),
        )
        environment = {
            "PULSAR_STANDALONE_CONF": str(file),
            "PULSAR_LOG_DIR": str(shelf.directory / "logs"),
            "PULSAR_MEM": os.environ.get("PULSAR_MEM", _MEMORY),
            # Its log has no end otherwise, and each line costs time.
            "PULSAR_LOG_LEVEL": os.environ.get("PULSAR_LOG_LEVEL", "warn"),
            # Else what it says at its end is never written.
            "PULSAR_LOG_IMMEDIATE_FLUSH": os.environ.get("PULSAR_LOG_IMMEDIATE_FLUSH", "true"),
            "PULSAR_GC_LOG": os.environ.get("PULSAR_GC_LOG", " "),
            "PULSAR_EXTRA_OPTS": os.environ.get("PULSAR_EXTRA_OPTS", f"{_SHIPPED_OPTIONS} {_loopback_options()}".strip()),
        }
        return Launch(command, shelf.directory, environment, str(home))

    def _contained(self, wish: Wish, shelf: Shelf, port: int, admin_port: int, data: Path, progress: Progress) -> Launch:
        docker.fetch(IMAGE, progress)
        container = f"edgeserve-pulsar-{hashlib.blake2b(str(shelf.directory).encode(), digest_size=4).hexdigest()}"
        # In the container it listens on all interfaces, else nothing could be handed on to it; outside on the loopback only.
        changes = settings(port, admin_port, plain=wish.plain, bind="0.0.0.0") | dict(wish.settings)
        environment = {"PULSAR_MEM": os.environ.get("PULSAR_MEM", _MEMORY), "PULSAR_LOG_LEVEL": os.environ.get("PULSAR_LOG_LEVEL", "warn")}
        environment |= {f"PULSAR_PREFIX_{name}": value for name, value in changes.items()}
        # Files in the user's directory belong to the user; the image lets any user of group 0 work.
        user = f"{os.getuid()}:0"
        script = "bin/apply-config-from-env.py conf/standalone.conf && exec bin/pulsar standalone -nss -nfw"
        docker.remove(container, 0)
        # Settings may hold secrets, and a command line is for everybody to read.
        variables = shelf.write("container.env", docker.env_file(environment))
        words = docker.command(IMAGE, container, (port, admin_port), {data: "/pulsar/data"}, user, variables, script)
        return Launch(words, shelf.directory, {}, IMAGE, container)

    def url(self, port: int, admin_port: int) -> str:
        """The node URL; it names the admin API where that isn't in its usual place."""
        return f"pulsar://{HOST}:{port}" + ("" if admin_port == _ADMIN_PORT else f"?admin=http://{HOST}:{admin_port}")

    def trouble(self, port: int, admin_port: int) -> str | None:
        """The broker's own health check: it sends itself a message."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{HOST}:{admin_port}/admin/v2/brokers/health", timeout=_ANSWER_S) as answer:
                text = answer.read(100).decode(errors="replace").strip()
        except urllib.error.HTTPError as exc:
            if exc.code == 401:
                return None  # it wants to know who asks, so it is there
            return f"its health check failed with status {exc.code}"
        except (OSError, http.client.HTTPException) as exc:
            return f"admin port {admin_port}: {getattr(exc, 'reason', exc)}"
        return None if text == "ok" else f"its health check says {text!r}"


__all__ = ("IMAGE", "SUITING", "Pulsar", "configuration", "settings")
