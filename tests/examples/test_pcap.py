"""The capture reader: every format it names, and a clear error for every file it cannot read."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import flows
import pcap
import pytest
import zstandard

T0 = 1_700_000_000
TCP_SYN, TCP_SYN_ACK, TCP_RST = 0x02, 0x12, 0x14


def tcp(sport: int = 40_000, dport: int = 80, flags: int = TCP_SYN, payload: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 5 << 4, flags, 1024, 0, 0) + payload


def udp(sport: int = 40_000, dport: int = 53, payload: bytes = b"") -> bytes:
    return struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload


def ipv4(proto: int, rest: bytes, src: bytes = b"\x0a\x01\x00\x05", dst: bytes = b"\x0a\x02\x00\x09", fragment: int = 0) -> bytes:
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(rest), 7, fragment, 64, proto, 0, src, dst) + rest


def ipv6(proto: int, rest: bytes) -> bytes:
    return struct.pack("!IHBB16s16s", 6 << 28, len(rest), proto, 64, bytes(15) + b"\x01", bytes(15) + b"\x02") + rest


def ethernet(ip: bytes, kind: int = 0x0800) -> bytes:
    return bytes(12) + struct.pack("!H", kind) + ip


def capture(frames: Iterable[bytes], order: str = "<", nano: bool = False, link: int = 1, step: float = 0.25, snaplen: int = 96) -> bytes:
    out = struct.pack(f"{order}IHHiIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, snaplen, link)
    for number, frame in enumerate(frames):
        seconds, fraction = divmod(number * step, 1)
        kept = frame[:snaplen]
        out += struct.pack(f"{order}IIII", T0 + int(seconds), int(fraction * (1e9 if nano else 1e6)), len(kept), len(frame)) + kept
    return out


def read(tmp_path: Path, data: bytes, name: str = "a.pcap") -> list[pcap.Packet]:
    path = tmp_path / name
    path.write_bytes(data)
    return list(pcap.packets(path))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_both_byte_orders_and_both_units(tmp_path: Path, order: str, nano: bool) -> None:
    first, second = read(tmp_path, capture([ethernet(ipv4(6, tcp())), ethernet(ipv4(17, udp(payload=b"x" * 30)))], order, nano))
    assert first == pcap.Packet(T0 * 10**9, "10.1.0.5", "10.2.0.9", 6, 40_000, 80, 40, 0, TCP_SYN, False)
    assert second == pcap.Packet(T0 * 10**9 + 250_000_000, "10.1.0.5", "10.2.0.9", 17, 40_000, 53, 58, 30, 0, False)


@pytest.mark.parametrize(
    ("link", "frame"),
    [
        (1, ethernet(struct.pack("!HH", 5, 0x0800) + ipv4(6, tcp()), kind=0x8100)),
        (113, bytes(14) + b"\x08\x00" + ipv4(6, tcp())),
        (276, b"\x08\x00" + bytes(18) + ipv4(6, tcp())),
        (101, ipv4(6, tcp())),
        (228, ipv4(6, tcp())),
    ],
    ids=["vlan", "cooked", "cooked2", "raw", "ipv4"],
)
def test_link_types(tmp_path: Path, link: int, frame: bytes) -> None:
    (packet,) = read(tmp_path, capture([frame], link=link))
    assert (packet.src, packet.dport, packet.flags) == ("10.1.0.5", 80, TCP_SYN)


def test_ipv6_with_and_without_extension_headers(tmp_path: Path) -> None:
    hop_by_hop = bytes([17, 0]) + bytes(6) + udp(payload=b"abc")
    plain, extended = read(tmp_path, capture([ethernet(ipv6(6, tcp(payload=b"hi")), 0x86DD), ethernet(ipv6(0, hop_by_hop), 0x86DD)]))
    assert (plain.src, plain.dst, plain.proto, plain.payload_bytes) == ("::1", "::2", 6, 2)
    assert (extended.proto, extended.dport, extended.payload_bytes) == (17, 53, 3)


def test_an_icmp_unreachable_is_the_reply_of_the_flow_that_it_quotes(tmp_path: Path) -> None:
    icmp = bytes([3, 3, 0, 0]) + bytes(4) + ipv4(17, udp(40_000, 27_101))
    (packet,) = read(tmp_path, capture([ethernet(ipv4(1, icmp, src=b"\x0a\x02\x00\x09", dst=b"\x0a\x01\x00\x05"))]))
    assert packet.unreachable
    assert (packet.src, packet.sport, packet.dst, packet.dport, packet.proto) == ("10.2.0.9", 27_101, "10.1.0.5", 40_000, 17)


def test_what_has_no_ports_is_passed_over(tmp_path: Path) -> None:
    arp, ping = ethernet(bytes(28), 0x0806), ethernet(ipv4(1, bytes([8, 0]) + bytes(6)))
    fragment, cut = ethernet(ipv4(17, bytes(40), fragment=100)), ethernet(ipv4(6, tcp()))[:30]
    assert len(read(tmp_path, capture([arp, ping, fragment, cut, b"", ethernet(ipv4(6, tcp()))]))) == 1


def test_zstd_in_one_frame_or_several_reads_as_plain(tmp_path: Path) -> None:
    data = capture([ethernet(ipv4(6, tcp(i))) for i in range(50)])
    plain = read(tmp_path, data)
    compress = zstandard.ZstdCompressor().compress
    assert len(plain) == 50
    assert read(tmp_path, compress(data), "a.pcap.zst") == plain
    assert read(tmp_path, compress(data[:777]) + compress(data[777:]), "b.pcap.zst") == plain


@pytest.mark.parametrize(
    ("data", "found", "remedy"),
    [
        (b"", "is empty", "tcpdump -w"),
        (b"\x0a\x0d\x0d\x0a" + bytes(40), "pcapng", "editcap -F pcap"),
        (b"PK\x03\x04" + bytes(40), "starts with 504b0304", "tcpdump -w"),
        (capture([])[:20], "20 of 24 bytes", "tcpdump -w"),
        (capture([], link=105), "link type 105", "tcpdump -y"),
        (capture([ethernet(ipv4(6, tcp()))] * 2)[:-10], "in the middle of packet 1", "tcpdump -r"),
        (capture([ethernet(ipv4(6, tcp()))])[:-60], "in the middle of packet 0", "tcpdump -r"),
        (capture([]) + struct.pack("<IIII", T0, 0, 1 << 30, 1 << 30), "packet 0 claims 1,073,741,824 bytes", "tcpdump -r"),
        (zstandard.ZstdCompressor().compress(capture([ethernet(ipv4(6, tcp()))] * 50))[:-20], "zstd", "Copy the file anew"),
        (b"\x28\xb5\x2f\xfd" + bytes(range(60)), "damaged zstd", "Copy the file anew"),
    ],
    ids=["empty", "pcapng", "foreign", "header", "link", "cut", "cut-header", "huge", "zstd-cut", "zstd-bad"],
)
def test_errors_name_the_file_what_was_found_and_what_to_do(tmp_path: Path, data: bytes, found: str, remedy: str) -> None:
    with pytest.raises(pcap.CaptureError) as error:
        read(tmp_path, data, "mine.pcap")
    message = str(error.value)
    assert str(tmp_path / "mine.pcap") in message
    assert found in message
    assert remedy in message


def test_an_empty_capture_has_no_packets_and_no_windows(tmp_path: Path) -> None:
    path = tmp_path / "none.pcap"
    path.write_bytes(capture([]))
    assert list(pcap.packets(path)) == []
    assert list(flows.windows(path)) == []


def test_windows_are_aligned_and_empty_ones_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    frames = [ethernet(ipv4(6, tcp(flags=flags))) for flags in (TCP_SYN, TCP_SYN, TCP_RST)] + [ethernet(ipv4(17, udp(payload=b"1234")))]
    path.write_bytes(capture(frames, step=1.0))
    found = list(flows.windows(path, window_ns=2 * flows.SECOND))
    assert [(w.start_ns, w.packets, len(w.flows)) for w in found] == [(T0 * 10**9, 2, 1), ((T0 + 2) * 10**9, 2, 2)]
    (first,) = found[0].flows
    assert (first.packets, first.syn, first.rst, first.last_ns - first.first_ns) == (2, 2, 0, flows.SECOND)
    reset, datagram = found[1].flows
    assert (reset.rst, reset.syn, datagram.proto, datagram.payload_bytes) == (1, 0, 17, 4)
    path.write_bytes(capture(frames[:2], step=3.0))
    assert [len(w.flows) for w in flows.windows(path)] == [1, 0, 0, 1]


def test_a_clock_that_jumps_is_an_error_and_not_a_million_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.pcap"
    path.write_bytes(capture([ethernet(ipv4(6, tcp()))] * 2, step=10.0 * flows.MAX_GAP_WINDOWS))
    with pytest.raises(pcap.CaptureError, match="clock jumps"):
        list(flows.windows(path))
