"""Reads packet headers from classic pcap files, plain or zstd: microseconds or nanoseconds, either byte order, IPv4 and IPv6."""

import ipaddress
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
MAX_PACKET_BYTES = 262_144
BYTE_ORDER_AND_UNIT = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
ETHERNET, LINUX_SLL, LINUX_SLL2, RAW = 1, 113, 276, (12, 14, 101, 228, 229)
VLAN_TAGS = (0x8100, 0x88A8)
EXTENSION_HEADERS = (0, 43, 60)


class CaptureError(ValueError):
    """A capture file that cannot be read; the message names the file, what was found, and what to do."""


class Packet(NamedTuple):
    """One TCP or UDP packet's headers, or an ICMP "unreachable", told as the reply of the flow that it quotes."""

    time_ns: int
    src: str
    dst: str
    proto: int
    sport: int
    dport: int
    bytes: int
    payload_bytes: int
    flags: int
    unreachable: bool


def packets(path: str | Path) -> Iterator[Packet]:
    """Yields the TCP and UDP packets of a capture in stored order; passes over what is neither (ARP, fragments without ports...).

    Raises:
        CaptureError: not a pcap file, a pcapng file, an unknown link type, or one that ends in the middle of a packet.
    """
    path = Path(path)
    with path.open("rb") as file:
        chunks = _chunks(path, file)
        buffer = next(chunks, b"")
        while len(buffer) < 24 and (more := next(chunks, b"")):
            buffer += more
        order, unit_ns, link = _file_header(path, buffer)
        record = struct.Struct(f"{order}IIII")
        position, number = 24, 0
        while True:
            if position + 16 <= len(buffer):
                seconds, fraction, kept, _ = record.unpack_from(buffer, position)
                if kept > MAX_PACKET_BYTES:
                    raise CaptureError(f"{path}: packet {number} claims {kept:,} bytes: the file is damaged from there on. {_REPAIR}")
                if position + 16 + kept <= len(buffer):
                    data = buffer[position + 16 : position + 16 + kept]
                    position += 16 + kept
                    number += 1
                    if packet := _packet(link, data, seconds * 1_000_000_000 + fraction * unit_ns):
                        yield packet
                    continue
            more = next(chunks, b"")
            if not more:
                break
            buffer, position = buffer[position:] + more, 0
        if position != len(buffer):
            raise CaptureError(f"{path}: ends in the middle of packet {number} ({len(buffer) - position} bytes are left over). {_REPAIR}")


_REPAIR = "To keep the packets before it: tcpdump -r FILE -w whole.pcap"


def _chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The file's content, decompressed when it is zstd, in pieces."""
    magic = file.read(4)
    file.seek(0)
    if magic != b"\x28\xb5\x2f\xfd":
        while chunk := file.read(1 << 20):
            yield chunk
        return
    try:
        import zstandard
    except ImportError as error:
        raise CaptureError(
            f"{path}: is compressed with zstd. Install the reader (pip install zstandard) or unpack it: unzstd {path}"
        ) from error
    decompress = zstandard.ZstdDecompressor().decompressobj()
    try:
        while chunk := file.read(1 << 18):
            while chunk:
                if out := decompress.decompress(chunk):
                    yield out
                chunk = decompress.unused_data if decompress.eof else b""
                if chunk:
                    decompress = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise CaptureError(f"{path}: damaged zstd data ({error}). Copy the file anew") from error
    if not decompress.eof:
        raise CaptureError(f"{path}: the zstd data ends too early. Copy the file anew, or keep what is there: unzstd -c {path} > part.pcap")


def _file_header(path: Path, data: bytes) -> tuple[str, int, int]:
    if data[:4] == b"\x0a\x0d\x0d\x0a":
        raise CaptureError(f"{path}: is a pcapng file; this reads classic pcap. Convert it: editcap -F pcap {path} converted.pcap")
    if data[:4] not in BYTE_ORDER_AND_UNIT:
        raise CaptureError(
            f"{path}: is not a pcap file: it {f'starts with {data[:4].hex()}' if data else 'is empty'}. Record one: tcpdump -w FILE"
        )
    if len(data) < 24:
        raise CaptureError(f"{path}: ends inside its file header ({len(data)} of 24 bytes). Record it anew: tcpdump -w FILE")
    order, unit_ns = BYTE_ORDER_AND_UNIT[data[:4]]
    link = int(struct.unpack_from(f"{order}I", data, 20)[0]) & 0xFFFF
    if link not in (ETHERNET, LINUX_SLL, LINUX_SLL2, *RAW):
        raise CaptureError(
            f"{path}: has link type {link}; Ethernet, raw IP and Linux cooked are known. Record with: tcpdump -y EN10MB -w FILE"
        )
    return order, unit_ns, link


def _packet(link: int, data: bytes, time_ns: int) -> Packet | None:
    """Finds the IP header behind the link's; None for what is not IP or is cut off before its ports."""
    try:
        if link == ETHERNET:
            start = 12
            while int.from_bytes(data[start : start + 2]) in VLAN_TAGS:
                start += 4
            start += 2
        else:
            start = {LINUX_SLL: 16, LINUX_SLL2: 20}.get(link, 0)
        return _ip(data, start, time_ns)
    except (IndexError, struct.error):
        return None


def _ip(data: bytes, start: int, time_ns: int) -> Packet | None:
    header = _ip_header(data, start)
    if header is None:
        return None
    src, dst, proto, start, total, rest = header
    if proto == TCP:
        sport, dport, offset, flags = struct.unpack_from("!HH8xBB", data, start)
        return Packet(time_ns, src, dst, TCP, sport, dport, total, max(0, rest - (offset >> 4) * 4), flags, False)
    if proto == UDP:
        sport, dport = struct.unpack_from("!HH", data, start)
        return Packet(time_ns, src, dst, UDP, sport, dport, total, max(0, rest - 8), 0, False)
    if (proto, data[start]) in ((ICMP, 3), (ICMP6, 1)) and (quoted := _ip_header(data, start + 8)):
        client, server, proto, start, _, _ = quoted
        if proto in (TCP, UDP):
            sport, dport = struct.unpack_from("!HH", data, start)
            return Packet(time_ns, server, client, proto, dport, sport, total, 0, 0, True)
    return None


def _ip_header(data: bytes, start: int) -> tuple[str, str, int, int, int, int] | None:
    """(source, destination, protocol, where its header starts, bytes of the IP packet, bytes after the IP headers)."""
    version = data[start] >> 4
    if len(data) < start + (40 if version == 6 else 20):
        return None
    if version == 4:
        length = (data[start] & 15) * 4
        total, fragment, proto = struct.unpack_from("!H2xHxB", data, start + 2)
        if fragment & 0x1FFF:
            return None
        return _text(data[start + 12 : start + 16]), _text(data[start + 16 : start + 20]), proto, start + length, total, total - length
    if version != 6:
        return None
    rest, proto = struct.unpack_from("!HB", data, start + 4)
    total, after = rest + 40, start + 40
    while proto in EXTENSION_HEADERS:
        proto, size = data[after], (data[after + 1] + 1) * 8
        after, rest = after + size, rest - size
    return _text(data[start + 8 : start + 24]), _text(data[start + 24 : start + 40]), proto, after, total, rest


@lru_cache(maxsize=65_536)
def _text(address: bytes) -> str:
    return str(ipaddress.ip_address(address))
