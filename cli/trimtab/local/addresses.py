"""Addresses of pods and Services: each has its own in 127.0.0.0/8, so ports never clash within a working folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from trimtab.local.workdir import LocalError

_HOSTS = 254


class Addresses:
    """A /24 below 127.0.0.0/8, chosen by the working folder; `used` tells what objects hold now."""

    def __init__(self, workdir: Path, used: Callable[[], Iterable[str]]) -> None:
        digest = hashlib.sha256(str(workdir.resolve()).encode()).digest()
        self._block = f"127.{16 + digest[0] % 224}.{digest[1]}."
        self._used = used
        self._reserved: dict[str, str] = {}
        self._last = 0

    def take(self) -> str:
        """A free address; one that was given back is given again last.

        Raises:
            LocalError: all are in use.
        """
        taken = {*self._used(), *self._reserved.values()}
        for step in range(1, _HOSTS + 1):
            host = (self._last + step - 1) % _HOSTS + 1
            if f"{self._block}{host}" not in taken:
                self._last = host
                return f"{self._block}{host}"
        raise LocalError(f"all addresses {self._block}1 to {_HOSTS} are in use; delete jobs or endpoints")

    def of_host(self, host: str) -> str:
        """The address of a pod's host name `HOSTNAME.SUBDOMAIN.NAMESPACE`, the same before and after it starts."""
        if host not in self._reserved:
            self._reserved[host] = self.take()
        return self._reserved[host]

    def release(self, address: str | None) -> None:
        """The pod at this address has ended."""
        self._reserved = {host: taken for host, taken in self._reserved.items() if taken != address}
