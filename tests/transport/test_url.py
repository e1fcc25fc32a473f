"""Node URLs, and who is behind their schemes."""

from __future__ import annotations

import pytest

from edgeserve import DataSource
from edgeserve.core.errors import ConfigurationError, UnknownScheme
from edgeserve.transport import connect
from edgeserve.transport.url import parse, server_is_here


@pytest.mark.parametrize("text", ["", "local", "local:", "/tmp/x", "localhost:6650", None, 7])
def test_what_is_no_url(text: object) -> None:
    with pytest.raises(ConfigurationError, match="a node is a URL"):
        connect(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["local:///tmp/a\0b", "memory://a\0b", "local:///tmp/\ud800", "local:///tmp/a?durability=\0", "local://[x/y"]
)
def test_what_no_url_can_hold(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        connect(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("nats:/host", "nats://host"),
        ("nats:host:4222", "nats://host:4222"),
        ("NATS//host:4222/space", "nats://host:4222/space"),
        ("nats;//host", "nats://host"),
        ("nats+tls:/host", "nats+tls://host"),
        ("pulsar:/host:6650?token=s3cret", "pulsar://host:6650?token=***"),
        ("nats:/me:s3cret@host", "nats://***@host"),
        ("nats", "nats://"),
        ("local:/tmp/x", "local:///tmp/x"),
        ("local:", "local://"),
        ("memory:x", "memory://x"),
        ("localhost:4222", ""),
        ("nats//me:s3cret@host", ""),
        ("natshost", ""),
        ("/tmp/x", ""),
        ("", ""),
    ],
)
def test_a_url_without_its_slashes_is_told_the_one_that_was_meant(text: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match="a node is a URL such as 'local://' or 'nats://host:4222', not '") as caught:
        parse(text)
    said = str(caught.value)
    assert said.endswith(f": did you mean '{meant}'?" if meant else "'") and "s3cret" not in said


def test_a_node_says_so_when_it_connects() -> None:
    with pytest.raises(ConfigurationError, match="NUL"), DataSource([1], "local:///tmp/a\0b", source_id="a"):
        pass


def test_an_unknown_scheme_is_told_the_known_ones() -> None:
    with pytest.raises(UnknownScheme, match=r"nonsense://.*local://, memory://") as error:
        connect("nonsense://x")
    assert isinstance(error.value, ConfigurationError)


def test_the_parts() -> None:
    url = parse("local:///tmp/x?size_mb=1.5&durability=disk")
    assert (url.scheme, url.path, url.parameters) == ("local", "/tmp/x", {"size_mb": "1.5", "durability": "disk"})
    assert url.number("size_mb", 3) == 1.5
    assert url.number("retention_mb", 3) == 3


def test_a_part_that_would_be_left_out_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="#"):
        connect("memory://a#b")


def test_a_durability_that_is_none() -> None:
    with pytest.raises(ConfigurationError, match="'process' or 'disk'"):
        connect("local:///tmp/x?durability=maybe")


@pytest.mark.parametrize("text", ["nats://h:99999", "nats://u:p@g:1,h:0/space", "pulsar://h:65536?admin=http://h:1"])
def test_a_port_that_there_is_not(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no port \d+: they go from 1 to 65535"):
        connect(text)
    assert parse("memory://a:99999").path == "a:99999"


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("local://", True),
        ("memory://a", True),
        ("nats://127.0.0.1:4222", True),
        ("nats://me:secret@localhost:4222/space?deadline_s=1", True),
        ("pulsar://[::1]", True),
        ("pulsar://192.0.2.1:6650", False),
        ("nats://127.0.0.1:4222,127.0.0.1:4223", False),
        ("nats://no.such.host.invalid", False),
        (f"nats://{'a' * 64}.example", False),
    ],
)
def test_whether_a_server_is_on_this_machine(text: str, here: bool) -> None:
    assert server_is_here(text) is here
