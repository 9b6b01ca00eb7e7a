"""Which network cards lanes may use: those of the address that the node listens on, and no other.

UCX offers and listens on all of them otherwise, however local the address is that the node was given.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping, Sequence

import psutil

ALL = "all"
"""UCX's own default."""
_TCP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def devices_of(host: str) -> str:
    """The value of UCX_NET_DEVICES for a node that listens on `host`; a wildcard is all of them.

    Raises ValueError when no card of this machine has that address.
    """
    addresses = {
        card: [item.address for item in items if item.family in _TCP_FAMILIES]
        for card, items in psutil.net_if_addrs().items()
    }
    return choose(_addresses(host), addresses)


def choose(wanted: Sequence[str], cards: Mapping[str, Sequence[str]]) -> str:
    """The cards that have one of the `wanted` addresses, comma-separated. Pure.

    `cards` are the addresses of each card. Every address of a loopback network is the loopback card's,
    listed there or not.
    """
    ours = [ipaddress.ip_address(address) for address in wanted]
    if any(address.is_unspecified for address in ours):
        return ALL
    found = [card for card, addresses in cards.items() if _has(addresses, ours)]
    if not found:
        raise ValueError(f"no network card of this machine has the address {', '.join(wanted)}")
    return ",".join(sorted(found))


def _has(addresses: Sequence[str], wanted: Iterable[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> bool:
    of_card = [ipaddress.ip_address(address.partition("%")[0]) for address in addresses]
    return any(
        address in of_card or (address.is_loopback and any(other.is_loopback for other in of_card))
        for address in wanted
    )


def _addresses(host: str) -> list[str]:
    name = host.strip("[]")
    if not name:
        return ["0.0.0.0"]
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"{host!r} is no address of this machine: {error}") from error
    return sorted({str(item[4][0]).partition("%")[0] for item in found})
