"""A disk that fills up under a running local:// store, for real: a small filesystem of its own, and a commit that fails half-way."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from tests.disks import fill_up
from tests.transport.children import Child

from edgeserve.core.errors import DiskFull
from edgeserve.testing.transport.cases import drain, frames_of, numbered, opening, publish
from edgeserve.transport import connect, disconnect

PUBLISH = """
from edgeserve.core.errors import DiskFull
p = connect(url).publisher("a", send_window=10**9)
full = False
for n in range(400):
    while True:
        try:
            p.publish([n.to_bytes(4, "big") + bytes(20_000)])
            break
        except DiskFull:
            if not full: say("full")
            full = True
            time.sleep(0.01)
    if n == 100:
        say("running")
        sys.stdin.readline()
say("done")
"""
SETTLE = """
from edgeserve.core.errors import DiskFull
s = connect(url).subscribe(["a"], "g")
n, full, told = 0, False, False
while n < 400:
    found = s.receive(5, 20000)
    while True:
        try:
            s.settle({"a": [d[1] for d in found]}, {"out": [bytes(d[0][:4]) + bytes(8_000) for d in found]},
                     ids=[d[1].to_bytes(16, "big") for d in found])
            break
        except DiskFull:
            if not full: say("full")
            full = True
            time.sleep(0.01)
    n += len(found)
    if n >= 50 and not told:
        say("running")
        told = True
say("done")
"""


def test_processes_go_on_when_the_disk_was_full(small_disk: Path) -> None:
    url = f"local://{small_disk}/store?retention_mb=100"
    with Child(PUBLISH, url) as publisher, Child(SETTLE, url) as settler:
        assert publisher.line() == settler.line() == "running"
        ballast = fill_up(small_disk)
        publisher.tell()
        assert publisher.line() == "full"
        # Who comes new while it is full is told, or works with the room that is left in the file.
        try:
            disconnect(connect(url))
        except DiskFull as exc:
            assert "no space left" in str(exc)
        ballast.unlink()
        assert publisher.line() == "done"
        said = settler.line()
        assert (settler.line() if said == "full" else said) == "done"
        for child in (publisher, settler):
            child.end()
    transport = connect(url)
    expected = [n.to_bytes(4, "big") for n in range(400)]
    assert [f[:4] for f, _, _ in transport.read("a")] == expected
    assert [f[:4] for f, _, _ in transport.read("out")] == expected
    disconnect(transport)


def test_what_was_acknowledged_survives_a_kill_on_a_full_disk(small_disk: Path) -> None:
    url = f"local://{small_disk}/store?retention_mb=100"
    with Child(PUBLISH, url) as publisher:
        assert publisher.line() == "running"
        ballast = fill_up(small_disk)
        publisher.tell()
        assert publisher.line() == "full"
        publisher.kill()
    # There is no room to look through what was not closed: that is told, and nothing is touched.
    with pytest.raises(DiskFull):
        connect(url)
    ballast.unlink()
    transport = connect(url)
    found = [f[:4] for f, _, _ in transport.read("a")]
    assert len(found) > 100
    assert found == [n.to_bytes(4, "big") for n in range(len(found))]
    disconnect(transport)


def test_everything_that_can_be_refused_on_a_full_disk_is_named(small_disk: Path) -> None:
    url = f"local://{small_disk}/store?retention_mb=100"
    with opening(lambda: url) as open_it:
        transport = open_it()
        subscription, fence = transport.subscribe(["a"], "g"), transport.fence("log", "one")
        publish(transport, "a", numbered(4))
        found = subscription.receive(4, 1000)
        ballast = fill_up(small_disk)
        big = bytes(500_000)
        for _ in range(3):
            with pytest.raises(DiskFull, match="nothing of this was written"):
                publish(transport, "a", [big])
            with pytest.raises(DiskFull):
                fence.append([big])
            with pytest.raises(DiskFull):
                subscription.settle({"a": [d[1] for d in found]}, {"out": [big]}, ids=[b"i" * 16], decisions=[b"d"], fence=fence)
        assert [f for f, _, _ in transport.read("a")] == numbered(4)
        assert list(transport.read("out")) == list(transport.read("log")) == []
        assert subscription.floor("a") == 0
        ballast.unlink()
        subscription.settle({"a": [d[1] for d in found]}, {"out": [big]}, ids=[b"i" * 16], decisions=[b"d"], fence=fence)
        publish(transport, "a", [big])
        assert frames_of(drain(subscription, 1)) == [big]


def test_closing_on_a_full_disk(small_disk: Path) -> None:
    url = f"local://{small_disk}/store"
    transport = connect(url)
    publish(transport, "a", numbered(4))
    subscription = transport.subscribe(["a"], "g")
    ballast = fill_up(small_disk)
    subscription.close()
    disconnect(transport)
    ballast.unlink()
    transport = connect(url)
    assert [f for f, _, _ in transport.read("a")] == numbered(4)
    disconnect(transport)


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>
/* While the file that FAIL_FILE names is there, the pages that LMDB writes last, at the head of the file, find no space. */
static int fails(off_t at) { const char *f = getenv("FAIL_FILE"); return at < 8192 && f && access(f, F_OK) == 0; }
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    if (n < 4096 && n > 16 && fails(at)) { errno = ENOSPC; return -1; }
    return real(fd, data, n, at);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return pwrite64(fd, data, n, at); }
"""


def test_a_commit_that_fails_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, to make writing fail")
    (tmp_path / "shim.c").write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "shim.so"))
    monkeypatch.setenv("FAIL_FILE", str(tmp_path / "fail"))
    code = """
    from edgeserve.core.errors import DiskFull
    t = connect(url)
    p, s = t.publisher("a"), t.subscribe(["a"], "g")
    fail = os.environ["FAIL_FILE"]
    done, failed = threading.Event(), []
    def reads():
        try:
            while not done.is_set():
                assert [f for f, _, _ in t.read("a")] in ([], [b"1"], [b"1", b"4"])
        except BaseException as exc:
            failed.append(exc)
    reader = threading.Thread(target=reads)
    reader.start()
    p.publish([b"1"])
    open(fail, "w").close()
    refused = 0
    for n in range(5):
        try:
            p.publish([b"2"])
        except DiskFull as exc:
            refused += "nothing of this was written" in str(exc)
        try:
            s.settle({}, {"out": [b"3"]})
        except DiskFull:
            refused += 1
    os.remove(fail)
    p.publish([b"4"])
    found = s.receive(10, 1000)
    s.settle({"a": [d[1] for d in found]})
    done.set()
    reader.join()
    assert not failed, failed
    say(refused, [bytes(d[0]) for d in found], t.topics())
    disconnect(t)
    """
    with Child(code, f"local://{tmp_path}/store") as child:
        assert child.line() == "10 [b'1', b'4'] ['a']"
        child.end()
