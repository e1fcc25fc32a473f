"""What a Pulsar with tokens and TLS refuses is said by name and within seconds; secrets are never shown."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.servers import Server

from edgeserve.cli.brokers.manage import free_port
from edgeserve.core.errors import ConfigurationError, TransportError
from edgeserve.transport import connect, disconnect
from edgeserve.transport.pulsar.admin import Admin
from edgeserve.transport.pulsar.settings import settings_from
from edgeserve.transport.url import parse

KEY = b"a key of 32 bytes, for tests only"


def token_of(who: str, key: bytes = KEY) -> str:
    """A JSON web token, as `pulsar tokens create` makes them."""

    def text(raw: bytes) -> bytes:
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    head = text(json.dumps({"alg": "HS256"}).encode()) + b"." + text(json.dumps({"sub": who}).encode())
    return (head + b"." + text(hmac.new(key, head, hashlib.sha256).digest())).decode()


@dataclass
class Secured:
    """A broker that wants to know who one is; `user` may write to public/mine and to nothing else."""

    plain: str
    tls: str
    admin: str
    certificate: Path
    other_certificate: Path
    user: str

    def url(self, space: str = "public/mine", **parameters: str) -> str:
        """A node URL without TLS."""
        return f"{self.plain}/{space}?admin={self.admin}" + "".join(f"&{k}={v}" for k, v in parameters.items())

    def tls_url(self, **parameters: str) -> str:
        """A node URL with TLS."""
        return f"{self.tls}/public/mine?token={self.user}&admin={self.admin}" + "".join(f"&{k}={v}" for k, v in parameters.items())


def certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) of `localhost`, signed by itself."""
    paths = directory / f"{name}.pem", directory / f"{name}-key.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(words, check=True, capture_output=True)
    return paths


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, pulsar_url: str) -> Iterator[Secured]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make certificates")
    directory = tmp_path_factory.mktemp("secured")
    (cert, key), (other, _) = certificate(directory, "own"), certificate(directory, "other")
    tls_port, admin_token = free_port(), token_of("admin")
    settings = {
        "authenticationEnabled": "true",
        "authorizationEnabled": "true",
        "superUserRoles": "admin",
        "authenticationProviders": "org.apache.pulsar.broker.authentication.AuthenticationProviderToken",
        "tokenSecretKey": "data:;base64," + base64.b64encode(KEY).decode(),
        "brokerClientAuthenticationPlugin": "org.apache.pulsar.client.impl.auth.AuthenticationToken",
        "brokerClientAuthenticationParameters": json.dumps({"token": admin_token}),
        "brokerServicePortTls": str(tls_port),
        "tlsCertificateFilePath": str(cert),
        "tlsKeyFilePath": str(key),
    }
    server = Server("pulsar", directory / "server", settings=settings)
    plain, _, rest = server.url.partition("?admin=")
    admin = Admin(settings_from(parse(f"{server.url}&token={admin_token}")))
    # Who is not known to it is told so before the broker is ready.
    deadline = time.monotonic() + 60
    while "public/default" not in (admin.call("namespaces/public") or ()) and time.monotonic() < deadline:
        time.sleep(0.2)
    admin.call("namespaces/public/mine", "PUT", {})
    admin.call("namespaces/public/mine/permissions/user", "POST", ["produce", "consume"])
    plain = plain.replace("127.0.0.1", "localhost")
    yield Secured(plain, f"pulsar+ssl://localhost:{tls_port}", rest, cert, other, token_of("user"))
    server.stop()


def publish(url: str) -> None:
    """Sends one message, or raises what keeps it from being sent."""
    transport = connect(url)
    try:
        publisher = transport.publisher("a")
        publisher.publish([b"x"])
        publisher.flush()
    finally:
        disconnect(transport)


def refusal(url: str, match: str) -> str:
    """The text of the error that sending raises; without secrets."""
    with pytest.raises(TransportError, match=match) as error:
        publish(url)
    assert "eyJ" not in str(error.value)
    return str(error.value)


@pytest.mark.timeout(30, func_only=True)
class TestSecured:
    def test_who_may_sends(self, secured: Secured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        publish(secured.url(token=secured.user))
        publish(secured.tls_url(tls_ca=str(secured.certificate)))
        (tmp_path / "token").write_text(secured.user + "\n")
        publish(secured.url(token_file=str(tmp_path / "token")))
        monkeypatch.setenv("EDGESERVE_PULSAR_TOKEN", secured.user)
        publish(secured.url())

    @pytest.mark.parametrize(
        "token", [None, "abc", token_of("user", b"another key, also of 32 bytes....")], ids=["none", "none such", "forged"]
    )
    def test_a_wrong_token(self, secured: Secured, token: str | None) -> None:
        refusal(secured.url(**({"token": token} if token else {})), "does not know this client")

    def test_a_namespace_that_is_somebody_elses(self, secured: Secured) -> None:
        assert "'a'" in refusal(secured.url("public/default", token=secured.user), "no right to write to")

    def test_a_namespace_that_is_missing(self, secured: Secured) -> None:
        refusal(secured.url("nobody/nothing", token=token_of("admin")), "pulsar-admin namespaces create nobody/nothing")

    def test_a_certificate_that_is_not_trusted(self, secured: Secured) -> None:
        refusal(secured.tls_url(), "certificate is refused")
        refusal(secured.tls_url(tls_ca=str(secured.other_certificate)), "certificate is refused")

    def test_no_tls_where_tls_is_expected(self, secured: Secured) -> None:
        refusal(secured.plain.replace("pulsar://", "pulsar+ssl://") + f"/public/mine?token={secured.user}", "speaks no TLS")

    def test_no_pulsar(self, secured: Secured) -> None:
        refusal(secured.admin.replace("http", "pulsar") + "?deadline_s=4", "no Pulsar broker")

    def test_nobody_there_within_the_deadline(self, secured: Secured) -> None:
        refusal(f"pulsar://localhost:{free_port()}?deadline_s=1", "deadline_s=1")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("pulsar://", "needs a host"),
        ("pulsar://user:secret@host", "no user names"),
        ("pulsar://host/only-a-tenant", "a tenant and a namespace"),
        ("pulsar://host?tls_ca=/no/such/file", "tls_ca"),
        ("pulsar://host?token_file=/no/such/file", "token_file"),
        ("pulsar://host?wrong=1", "wrong"),
        ("pulsar://host?admin=host:8080", "write admin=http://host:8080"),
    ],
)
def test_urls_that_cannot_work_are_refused(url: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match) as error:
        connect(url)
    assert "secret" not in str(error.value)


def test_without_tls_ca_all_that_speaks_tls_trusts_the_systems_authorities(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an organization adds to a system's authorities the client does not look at by itself.
    monkeypatch.setenv("SSL_CERT_FILE", str(secured.certificate))
    publish(secured.tls_url())
