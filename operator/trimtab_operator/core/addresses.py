"""Hosts that a user's URI must not lead a pod to: the node's metadata service, the pod itself."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\.?")
_METADATA_NAMES = ("metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal")
_METADATA_ADDRESSES = frozenset(
    ipaddress.ip_address(address) for address in ("100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254")
)
"""Of clouds whose service is not at a link-local address."""


def refused_host(uri: str) -> str | None:
    """Why the host of an `https://` URI may not be asked; None where it may, or for another scheme.

    A private host is a server of the cluster and is fine. What a name resolves to and where a redirect leads is checked
    where the connection is made.
    """
    if not uri.startswith("https://"):
        return None
    try:
        parts = urlsplit(uri)
        host, _ = (parts.hostname or ""), parts.port
    except ValueError as error:
        return f"{error}; expected https://HOST/PATH"
    address = _address(host)
    if address is None and not _HOST.fullmatch(host):
        return f"{host!r} is not the name of a host; expected https://HOST/PATH"
    name = host.removesuffix(".")
    if address is None:
        loops = name == "localhost" or name.endswith(".localhost")
        metadata = name in _METADATA_NAMES
    else:
        loops = address.is_loopback or address.is_unspecified
        metadata = address.is_link_local or address in _METADATA_ADDRESSES
    if loops:
        return f"{host} is the pod itself; name the server that has the file"
    if metadata or (address is not None and (address.is_multicast or address.is_reserved)):
        return (
            f"{host} is not a file server but the node's own or a reserved address; name the server that has the file"
        )
    return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host stands for, in any notation that resolvers take: 2130706433, 0x7f.1, ::ffff:127.0.0.1."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host.removesuffix(".")))
        except OSError:
            return None
    return (isinstance(found, ipaddress.IPv6Address) and (found.ipv4_mapped or found.sixtofour)) or found
