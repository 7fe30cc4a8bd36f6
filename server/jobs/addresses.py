"""Checks on network addresses to which a client may make the server connect."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

__all__ = ["is_public"]

NAT64: Final = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
"""Prefixes of gateways to the IPv4 address in the last 32 bits (RFC 6052, RFC 8215)."""

GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
"""All addresses that are assigned to hosts of the internet (RFC 4291)."""

DOCUMENTATION: Final = IPv6Network("3fff::/20")
"""Not known to Python 3.11 (RFC 9637)."""

COMPATIBLE: Final = IPv6Network("::/96")


def is_public(address: str) -> bool:
    """Whether an address is that of a host on the internet, not of this machine or its networks.

    An IPv6 address that embeds an IPv4 address must be public in both readings.

    Args:
        address: address as text, without brackets; one with a zone is never public.
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, IPv4Address):
        return _is_public_v4(parsed)
    if parsed.scope_id is not None:
        return False
    inner = _carried(parsed)
    if inner is not None:
        return _is_public_v4(inner)
    return parsed in GLOBAL_UNICAST and parsed not in DOCUMENTATION and parsed.is_global


def _is_public_v4(address: IPv4Address) -> bool:
    # is_global includes multicast, and the abandoned relays of 6to4 (RFC 7526).
    relay = address.packed[:3] == bytes((192, 88, 99))
    return address.is_global and not (address.is_multicast or address.is_reserved or relay)


def _carried(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to an IPv6 address finally reach, if it embeds one."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in COMPATIBLE or any(address in network for network in NAT64):
        return IPv4Address(address.packed[-4:])
    return None
