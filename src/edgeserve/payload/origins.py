"""From which hosts payloads of `routing='lazy'` may be fetched: a message says where its payload lies, and may say anything."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from edgeserve.core.errors import ConfigurationError, NotAllowed

VARIABLE = "EDGESERVE_ORIGINS"

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
# What stands for an address of IPv4, in the system and behind NAT64.
_OF_IPV4 = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))
_NAME = re.compile(r"(?=.*[A-Za-z_-])[A-Za-z0-9._-]{1,253}")


class Origins:
    """Those that are allowed: `EDGESERVE_ORIGINS`, names, addresses and networks with commas in between.

    A host whose name is listed may have any address, others need one that is. Where nothing is listed: every host, but not at link-local
    addresses, where clouds give out credentials.

    Raises:
        ConfigurationError: the variable lists something else.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        given = environment.get(VARIABLE, "")
        self._names: set[str] = set()
        self._networks: list[_Network] = []
        for each in filter(None, map(str.strip, given.split(","))):
            try:
                self._networks.append(ipaddress.ip_network(each.strip("[]")))
            except ValueError as exc:
                if not _NAME.fullmatch(each):
                    raise ConfigurationError(
                        f"{VARIABLE}={given!r}: {each!r} is no host and no network ({exc}): such as camera-3.lan,10.0.0.0/8"
                    ) from None
                self._names.add(each.lower())
        self.listed = bool(self._names or self._networks)
        if given.strip() and not self.listed:
            raise ConfigurationError(f"{VARIABLE}={given!r} lists no host: name some, such as camera-3.lan,10.0.0.0/8, or unset it for all")

    def __str__(self) -> str:
        if not self.listed:
            return "every host, but not at link-local addresses"
        return ", ".join([*sorted(self._names), *map(str, self._networks)])

    def check(self, host: str) -> None:
        """Raises `NotAllowed` where a host cannot be allowed, whatever the addresses of its name are."""
        address = _address(host)
        if not (self._admits(host, address) if address else not self.listed or self._networks or host.lower() in self._names):
            raise _refused(host)

    def admitted(self, host: str, found: Sequence[Any]) -> list[Any]:
        """Of what `getaddrinfo` has found for a host what may be connected to. Raises `NotAllowed` where that is nothing."""
        admitted = [each for each in found if (address := _address(each[4][0])) and self._admits(host, address)]
        if found and not admitted:
            raise _refused(host)
        return admitted

    def _admits(self, host: str, address: _Address) -> bool:
        if not self.listed:
            return not (address.is_link_local or address.is_multicast or address.is_unspecified)
        return host.lower() in self._names or any(address in network for network in self._networks)


def _address(host: str) -> _Address | None:
    """An address as it is connected to; None: it is a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # what the system reads as one, such as 127.1
        except (OSError, UnicodeError):
            return None
    if isinstance(address, ipaddress.IPv6Address):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if any(address in each for each in _OF_IPV4) else address
    return address


def _refused(host: str) -> NotAllowed:
    return NotAllowed(
        f"a payload lies on {host}, says its message, where this host fetches nothing from: {VARIABLE} lists the hosts and networks"
    )


__all__ = ("VARIABLE", "Origins")
