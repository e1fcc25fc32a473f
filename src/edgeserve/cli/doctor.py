"""`edgeserve doctor`: is this machine fit, and what to do where it is not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path

import click

from edgeserve import __version__
from edgeserve.cli.checks import Check
from edgeserve.cli.engine_checks import engine_checks
from edgeserve.cli.options import command, with_deadline
from edgeserve.cli.output import CommandError, Output, explain
from edgeserve.core.errors import ConfigurationError, MissingExtra
from edgeserve.core.settings import state_directory
from edgeserve.payload import Origins
from edgeserve.transport.url import parse, scrubbed, without_secrets

DISTRIBUTION = "edgeserve-streams"
_NEEDED = ("click", "lmdb", "msgspec", "numpy", "pulsar", "rich", "xxhash")
_DISTRIBUTED_AS = {"pulsar": "pulsar-client"}
_EXTRAS = {"pyarrow": "arrow", "nats-py": "nats", "obstore": "s3", "zstandard": "pcap"}
_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}
_MIB = 1024 * 1024
_ANSWER_S = 3.0


def _python() -> Iterator[Check]:
    text = f"{platform.python_implementation()} {platform.python_version()}"
    yield Check("PASS", "python", f"{text}, {sys.executable}")


def _platform() -> Iterator[Check]:
    text = f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores"
    if sys.platform.startswith("linux"):
        yield Check("PASS", "platform", text)
    else:
        yield Check("WARN", "platform", text, "edgeserve is tested on Linux; elsewhere use it for development only")


def _dependencies() -> Iterator[Check]:
    for name in _NEEDED:
        try:
            import_module(name)
            yield Check("PASS", name, metadata.version(_DISTRIBUTED_AS.get(name, name)))
        except ImportError as exc:
            to_do = f"pip install --force-reinstall {_DISTRIBUTED_AS.get(name, name)}"
            yield Check("FAIL", name, f"cannot be imported: {exc}", to_do)
    for name, extra in _EXTRAS.items():
        try:
            yield Check("PASS", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Check("WARN", name, "not installed (optional)", f"pip install '{DISTRIBUTION}[{extra}]' where you need it")


def _imported_package() -> Iterator[Check]:
    """The name edgeserve on the Python package index belongs to another project; of two installed, one overwrites the other."""
    foreign = sorted(set(metadata.packages_distributions().get("edgeserve", [])) - {DISTRIBUTION})
    place = Path(__file__).resolve().parent.parent
    if foreign:
        names = " ".join(foreign)
        yield Check(
            "FAIL",
            "package",
            f"another distribution installs a package called edgeserve, too: {names}",
            f"pip uninstall {names}, then pip install --force-reinstall {DISTRIBUTION}",
        )
        return
    try:
        yield Check("PASS", "package", f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)} in {place}")
    except metadata.PackageNotFoundError:
        yield Check("WARN", "package", f"edgeserve {__version__} from {place}, not installed", f"pip install {DISTRIBUTION}")


def _lmdb() -> Iterator[Check]:
    try:
        import lmdb

        with tempfile.TemporaryDirectory() as directory, lmdb.open(directory, map_size=_MIB) as env:
            with env.begin(write=True) as txn:
                txn.put(b"k", b"v")
            with env.begin() as txn:
                good = txn.get(b"k") == b"v"
    except (ImportError, OSError, lmdb.Error) as exc:
        yield Check("FAIL", "store", f"LMDB does not work in {tempfile.gettempdir()}: {exc}", "set TMPDIR to a directory on a local disk")
        return
    yield Check("PASS" if good else "FAIL", "store", "LMDB writes and reads" if good else "LMDB lost what was written")


def _state_directory(directory: Path) -> Iterator[Check]:
    to_do = "make it writable, or set EDGESERVE_STATE_DIR to a directory that is: sinks keep their journals there, wherever the store is"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as exc:
        yield Check("FAIL", "state directory", f"{directory}: {exc.strerror or exc}", to_do)
        return
    yield Check("PASS", "state directory", f"{directory} is writable")
    free = shutil.disk_usage(directory).free
    text = f"{free / 2**30:.1f} GiB free on the disk of {directory}"
    if free < 100 * _MIB:
        yield Check("FAIL", "disk", text, "free some space; a store needs at least 100 MiB")
    elif free < 2**30:
        yield Check("WARN", "disk", text, "free some space, or keep topics short with the retention in the node URL")
    else:
        yield Check("PASS", "disk", text)


def _shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Check]:
    if not path.is_dir():
        yield Check("WARN", "shared memory", f"{path} is not there", "stores on local:// work from a disk instead")
        return
    size = shutil.disk_usage(path).total
    text = f"{path} holds {size // _MIB} MiB"
    if size < 256 * _MIB:
        yield Check("WARN", "shared memory", text, "give the container more: docker run --shm-size=1g")
    else:
        yield Check("PASS", "shared memory", text)


def _payload_origins() -> Iterator[Check]:
    try:
        origins = Origins(os.environ)
    except ConfigurationError as exc:
        yield Check("FAIL", "payload origins", str(exc), "name hosts and networks, with commas in between")
        return
    text = f"payloads of other machines are fetched from {origins}"
    yield Check("PASS", "payload origins", text if origins.listed else f"{text} (EDGESERVE_ORIGINS is not set)")


def _node(url: str) -> Iterator[Check]:
    from edgeserve.transport import connect, disconnect

    try:
        transport = connect(with_deadline(url))
        try:
            count = len(transport.topics())
            silent = _silent_port(url)
        finally:
            disconnect(transport)
    except Exception as exc:
        reason = scrubbed(" ".join(str(exc).split()), url)
        known = isinstance(exc, (MissingExtra, ConfigurationError))
        to_do = explain(exc, "").to_do if known else "start the server, or correct the URL"
        yield Check("FAIL", "node", f"{without_secrets(url)}: {reason}", to_do)
        return
    if silent:
        seen = f"{without_secrets(url)}: {scrubbed(silent, url)}"
        yield Check("FAIL", "node", seen, "start the broker, or correct the host and port in the URL")
    else:
        yield Check("PASS", "node", f"{without_secrets(url)} answers: {count} topics")


def _silent_port(url: str) -> str:
    """Why no message would get through although the topics are known: Pulsar tells them on another port."""
    parsed = parse(url)
    if parsed.scheme not in ("pulsar", "pulsar+ssl"):
        return ""
    from edgeserve.transport.pulsar.probe import greet, silence
    from edgeserve.transport.pulsar.settings import settings_from

    settings = settings_from(parsed)
    if reason := silence(settings):
        return f"the admin API answers, but nobody does at {reason}"
    return greet(settings).refusal or ""


def examine(node: str | None = None) -> Iterator[Check]:
    """Looks at everything; a probe that fails itself is a finding, never a crash."""
    probes: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("platform", _platform),
        ("dependencies", _dependencies),
        ("package", _imported_package),
        ("store", _lmdb),
        ("state directory", lambda: _state_directory(state_directory())),
        ("shared memory", _shared_memory),
        ("payload origins", _payload_origins),
    ]
    if node is not None:
        probes += [("node", lambda: _node(node)), ("broker", lambda: engine_checks(node))]
    for name, probe in probes:
        try:
            yield from probe()
        except Exception as exc:
            seen = f"the check itself failed: {type(exc).__name__}: {scrubbed(str(exc), node or '')}"
            yield Check("FAIL", name, seen, "please report this with the line above")


@command("doctor")
@click.option("--node", metavar="URL", default=None, help="Try to reach this node, too, and look at its broker's settings.")
def doctor(out: Output, node: str | None) -> None:
    """Check this machine: PASS, WARN or FAIL per line, and what to do. Ends with status 1 on any FAIL."""
    checks = []
    for check in examine(node):
        checks.append(check)
        if not out.as_json:
            out.line(f"{check.status}  {check.name}: {check.seen}", _STYLES[check.status])
            if check.to_do:
                out.line(f"      -> {check.to_do}")
    failed = [check.name for check in checks if check.status == "FAIL"]
    if out.as_json:
        out.document({"ok": not failed, "checks": [asdict(check) for check in checks]})
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}", platform.node(), "do what the -> lines say"
        )


__all__ = ("Check", "doctor", "examine")
