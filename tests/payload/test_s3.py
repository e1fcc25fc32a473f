"""Objects of S3 that messages name by a URL, from a server that speaks S3: moto's."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from tests.payload.origins import MB, payload
from tests.relays import Relay
from tests.waiting import until

from edgeserve import External
from edgeserve.cli.brokers.manage import free_port
from edgeserve.core.errors import CorruptMessage, FetchError, MissingExtra, NotAllowed, PayloadGone
from edgeserve.payload import ExternalFiles

obstore = pytest.importorskip("obstore", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto, an S3 server: it is in the group dev")

KEYS = {"frames/1.bin": payload(1, MB), "frames/a b/\u00e9+~%25#&=?.bin": b"odd", "other/x": b"x"}
SECRET = "do-not-show-this"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Its URL. It lets nobody have the bucket's objects who does not sign his requests."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], env=environment, stderr=subprocess.DEVNULL) as process:
        try:

            def answers() -> bool:
                assert process.poll() is None
                try:
                    return urlopen(f"{url}/moto-api/").status == 200
                except OSError:
                    return False

            until(answers)
            urlopen(Request(f"{url}/bucket", method="PUT")).close()
            store = obstore.store.S3Store(
                "bucket", endpoint=url, access_key_id="a", secret_access_key="b", client_options={"allow_http": True}
            )
            for key, content in KEYS.items():
                obstore.put(store, key, content)
            yield url
        finally:
            process.terminate()


@pytest.fixture(autouse=True)
def environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-west-1",
    }.items():
        monkeypatch.setenv(name, value)


def got(url: str | External, *allowed: str, most_bytes: int = 2 * MB) -> bytes:
    files = ExternalFiles(allowed, most_bytes=most_bytes, timeout_s=60)
    file = io.BytesIO()
    try:
        files.fetch(External(url) if isinstance(url, str) else url, file)
    finally:
        files.close()
    return file.getvalue()


def test_an_object_is_fetched_by_a_signed_request(server: str) -> None:
    with pytest.raises(HTTPError, match="403"):
        urlopen(f"{server}/bucket/frames/1.bin")
    etag = hashlib.md5(KEYS["frames/1.bin"]).hexdigest()
    assert got(External("s3://bucket/frames/1.bin", size=MB, checksum=f"md5:{etag}"), "s3://bucket/frames/") == payload(1, MB)
    assert got("s3://bucket/frames/a%20b/%C3%A9%2B%7E%2525%23%26%3D%3F.bin", "s3://bucket/") == b"odd"


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("s3://bucket/frames/none", PayloadGone, "404"),
        ("s3://none/frames/1.bin", PayloadGone, "404"),
        ("s3://bucket/frames/", NotAllowed, "names no object"),
        ("s3://bucket/other/x", NotAllowed, "is not allowed"),
        ("s3://bucket/frames/../other/x", NotAllowed, "not plain"),
        ("s3://bucket/frames/%FF", NotAllowed, "UTF-8"),
        (External("s3://bucket/frames/1.bin", size=5), CorruptMessage, "its message says 5"),
    ],
)
def test_what_is_not_given_is_named_without_the_signature(url: str | External, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        got(url, "s3://bucket/frames/", "s3://none/")
    assert SECRET not in str(caught.value) and "Signature" not in str(caught.value) and str(caught.value).startswith("s3://")
    with pytest.raises(NotAllowed, match="fetch_max_bytes"):
        got("s3://bucket/frames/1.bin", "s3://bucket/", most_bytes=100)


def test_a_broken_connection_goes_on_where_it_was(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    relay = Relay(int(server.rpartition(":")[2]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
    relay.cuts = [300_000]
    try:
        assert got("s3://bucket/frames/1.bin", "s3://bucket/") == payload(1, MB)
    finally:
        relay.close()
    assert len(relay.heads) == 2 and b"Range: bytes=" in relay.heads[1]


def test_without_credentials_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(FetchError, match="cannot be signed"):
        got("s3://bucket/frames/1.bin", "s3://bucket/")


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(MissingExtra, match=r"edgeserve-streams\[s3\]"):
        ExternalFiles(["s3://bucket/"], most_bytes=1, timeout_s=1)
