"""Which addresses the server may be sent to by a client."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final

__all__ = ["is_public"]

NAT64: Final = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
"""Behind these a gateway reaches the IPv4 address of the last 32 bits (RFC 6052, RFC 8215)."""

GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
"""All that is assigned to hosts of the internet (RFC 4291)."""

DOCUMENTATION: Final = IPv6Network("3fff::/20")
"""Python 3.11 does not know it yet (RFC 9637)."""

COMPATIBLE: Final = IPv6Network("::/96")


def is_public(address: str) -> bool:
    """Whether an address is a host's on the internet, and none of this machine or its networks.

    An IPv6 address that carries one of IPv4 must be public in both readings.

    Args:
        address: as text, without brackets; one with a zone is never public.
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
    # "Global" includes multicast, and the relays of 6to4, which nobody runs any more (RFC 7526).
    relay = address.packed[:3] == bytes((192, 88, 99))
    return address.is_global and not (address.is_multicast or address.is_reserved or relay)


def _carried(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to an IPv6 address end at, if it is of such a kind."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in COMPATIBLE or any(address in network for network in NAT64):
        return IPv4Address(address.packed[-4:])
    return None
