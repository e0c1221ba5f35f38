"""Where other hosts reach this one."""

from __future__ import annotations

import os
import socket
import struct
from ipaddress import ip_address
from pathlib import Path

LOOPBACK = "127.0.0.1"


def own_address() -> str:
    """The address of the interface that gloo is told to use, or of the way to the job's master; IPv4 before IPv6."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return _interface_address(name)
    master = _way_to(os.environ.get("MASTER_ADDR", "localhost"))
    if master and not ip_address(master).is_loopback:
        return master
    others = [address for address in _addresses_of(socket.gethostname()) if not ip_address(address).is_loopback]
    return next(iter(others), master or LOOPBACK)


def family_of(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _way_to(host: str) -> str:
    """This host's end of the way to ``host``; nothing if there is none."""
    for address in _addresses_of(host):
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))  # sends nothing
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return ""


def _addresses_of(host: str) -> list[str]:
    """What ``host`` resolves to, IPv4 first; without addresses of a link, which mean nothing on another host."""
    try:
        found = [str(each[4][0]) for each in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)]
    except OSError:
        return []
    usable = [address for address in found if "%" not in address and not ip_address(address).is_link_local]
    return sorted(usable, key=family_of)


def _interface_address(name: str) -> str:
    import fcntl  # of Unix only

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
