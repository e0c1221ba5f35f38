"""The address at which other hosts reach this one."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import ip_address
from pathlib import Path

LOOPBACK = "127.0.0.1"


def own_address() -> str:
    """Return the address of the interface that gloo is told to use, or of the route to the job's master; IPv4 first."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return _interface_address(name)
    master = _way_to(os.environ.get("MASTER_ADDR", "localhost"))
    if master and not ip_address(master).is_loopback:
        return master
    others = [address for address in _addresses_of(socket.gethostname()) if not ip_address(address).is_loopback]
    return next(iter(others), master or LOOPBACK)


def family_of(address: str) -> socket.AddressFamily:
    """Return the family, IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _way_to(host: str) -> str:
    """Return the local address of the route to ``host``; an empty string if there is none."""
    for address in _addresses_of(host):
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))  # sends nothing
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return ""


def _addresses_of(host: str) -> list[str]:
    """Return the addresses of ``host``, IPv4 first, without link-local ones, which are invalid on other hosts."""
    try:
        found = [str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)]
    except OSError:
        return []
    usable = [address for address in found if "%" not in address and not ip_address(address).is_link_local]
    return sorted(usable, key=family_of)


def _interface_address(name: str) -> str:
    import fcntl  # Unix only

    get_interface_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, get_interface_address, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return _ipv6_address(name)
    return socket.inet_ntoa(answer[20:24])


def _ipv6_address(name: str) -> str:
    try:
        lines = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        return LOOPBACK
    for digits, _, _, _, _, interface in lines:
        address = ip_address(bytes.fromhex(digits))
        if interface == name and not address.is_link_local:
            return str(address)
    return LOOPBACK
