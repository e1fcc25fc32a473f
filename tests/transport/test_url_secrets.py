"""A user, a password or a token of a node URL is in no error, wherever it stands and however the URL is broken."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeserve.core.errors import ConfigurationError
from edgeserve.transport import connect
from edgeserve.transport.nats.settings import settings_from as nats_settings
from edgeserve.transport.pulsar.settings import settings_from as pulsar_settings
from edgeserve.transport.url import parse, scrubbed, without_secrets

PIECES = ("Qz7", "Xk9", "Vj3")
# What URLs give a meaning to, what is refused in them, and what a password may be made of otherwise.
between = st.text(st.sampled_from("/?#@:&=%[]\\;,. \t\n\0\ud800é٤") | st.characters(), max_size=4)
secrets = st.tuples(between, between).map(lambda two: f"{PIECES[0]}{two[0]}{PIECES[1]}{two[1]}{PIECES[2]}")
schemes = st.sampled_from(["nats://", "nats+tls://", "pulsar://", "pulsar+ssl://", "NATS://", "carrier-pigeon://", "local://", "memory://"])
RAW = (
    "{scheme}me:{secret}@host:4222",
    "{scheme}{secret}@host",
    "{scheme}{secret}:@host:4222/space",
    "{scheme}me:{secret}@[::1",
    "{scheme}me:{secret}@one:1,two:2/a/b/c?replicas=no",
    "{scheme}me:{secret}@host?x=1&token=abc",
    "nats:me:{secret}@host:4222",
    "nats//me:{secret}@host:4222",
    "me:{secret}@host:4222",
)
# Whoever leaves an '&' as it is in a parameter begins another one.
PARAMETER = (
    "{scheme}host:4222?token={secret}",
    "{scheme}host:4222/a/b/c?replicas=3&Token={secret}&wrong=1",
    "{scheme}host:4222?tok%65n={secret}&deadline_s=no",
    "{scheme}host:4222?pass\tword={secret}#there",
    "{scheme}[::1?OAuth2={secret}",
    "{scheme}me@host?secret={secret}",
    "host:4222&token={secret}",
)


def hides(secret: str, text: str) -> bool:
    return not any(piece in text for piece in PIECES)


def errors_of(url: str) -> str:
    """All that is said when somebody gives this URL, up to where a server would be asked."""
    said = ""
    for use in (parse, lambda text: nats_settings(parse(text), {}), lambda text: pulsar_settings(parse(text)), _connect_to_no_server):
        try:
            use(url)  # type: ignore[operator]
        except ConfigurationError as exc:
            said += "".join(traceback.format_exception(exc))
    return said


def _connect_to_no_server(url: str) -> None:
    if parse(url).scheme not in ("nats", "nats+tls", "pulsar", "pulsar+ssl", "local", "memory"):
        connect(url)


@pytest.mark.parametrize("position", RAW)
@given(scheme=schemes, secret=secrets)
def test_a_user_or_password_is_shown_nowhere(position: str, scheme: str, secret: str) -> None:
    url = position.format(scheme=scheme, secret=secret)
    assert hides(secret, without_secrets(url))
    assert hides(secret, errors_of(url))


@pytest.mark.parametrize("position", PARAMETER)
@given(scheme=schemes, secret=secrets)
def test_a_secret_parameter_is_shown_nowhere(position: str, scheme: str, secret: str) -> None:
    url = position.format(scheme=scheme, secret=secret.replace("&", "%26"))
    assert hides(secret, without_secrets(url))
    assert hides(secret, errors_of(url))


@pytest.mark.parametrize("position", [*RAW, *PARAMETER])
@given(scheme=schemes, secret=secrets)
def test_what_others_say_of_it_is_scrubbed(position: str, scheme: str, secret: str) -> None:
    secret = secret.encode(errors="replace").decode()
    url = position.format(scheme=scheme, secret=quote(secret, safe=""))
    assert hides(secret, scrubbed(f"cannot reach {url} as {secret} or {quote(secret, safe='')}", url))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("local:///data/me@work/store?size_mb=3", "local:///data/me@work/store?size_mb=3"),
        ("nats://host:4222/space?replicas=3&token_file=/run/x", "nats://host:4222/space?replicas=3&token_file=/run/x"),
        ("pulsar://a:1,b:2/t/n?token=x&admin=http://a:8080", "pulsar://a:1,b:2/t/n?token=***&admin=http://a:8080"),
        ("nats://me:x@a:1,b:2", "nats://***@a:1,b:2"),
    ],
)
def test_all_else_is_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == parse(url).shown == shown


@pytest.mark.parametrize("password", ["s3/cret", "s3?cret", "s3#cret", "s3?x=cret"])
def test_who_forgot_to_encode_a_password_is_told_how(password: str) -> None:
    with pytest.raises(ConfigurationError, match="%40, %2F, %3F and %23"):
        connect(f"nats://me:{password}@host:4222")
    encoded = parse(f"nats://me:{quote(password, safe='')}@host:4222")
    assert nats_settings(encoded, {}).options == {"user": "me", "password": password}


@pytest.mark.parametrize("settings", [nats_settings, pulsar_settings])
def test_what_is_read_hides_it_too(settings: Callable[..., object]) -> None:
    url = parse("nats://host:4222?token=s3cret" if settings is nats_settings else "pulsar://host?token=s3cret")
    assert "s3cret" not in repr(settings(url)) + repr(url)


def test_the_admin_api_of_pulsar_takes_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESERVE_PULSAR_ADMIN", "http://me:s3cret@host:8080")
    with pytest.raises(ConfigurationError, match="EDGESERVE_PULSAR_ADMIN take no user") as error:
        connect("pulsar://host")
    assert "s3cret" not in str(error.value)
