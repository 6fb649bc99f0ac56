"""One file over https.

Redirects are followed to https only. The host of the URI may be private (a server in the cluster), but not link-local:
there a node has its metadata service, and a name can be made to resolve to it. A redirect to a private, loopback or
link-local address is refused unless it stays on the same host, so that an outside server can't point a pod at inside
ones. `SSL_CERT_FILE` adds a private authority.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, SSLError
from urllib3.util import Retry, Timeout

from trimtab_trainer.data.files import DataFile
from trimtab_trainer.data.scratch import target_for
from trimtab_trainer.errors import BadConfiguration, InputMissing, UnsafeInput

_REDIRECTS = 5
_CHUNK = 1 << 20


def download(uri: str, scratch: Path) -> DataFile:
    """Stream the file into `scratch`; connection errors, cut-off bodies and 429, 5xx answers are retried with back-off.

    Raises:
        BadConfiguration: the URI has no host or file name, or holds a password.
        InputMissing: the server does not deliver the file.
        UnsafeInput: the file's name, the host or a redirect is not acceptable.
    """
    parts = urlsplit(uri)
    name = PurePosixPath(unquote(parts.path)).name
    if not parts.hostname or not name or parts.username or parts.password:
        raise BadConfiguration(f"https://{parts.hostname}{parts.path}: expected https://HOST/PATH/FILE")
    if any(address.is_link_local for address in _addresses(parts.hostname, parts.port or 443)):
        raise UnsafeInput(f"{uri}: {parts.hostname} is a link-local address of the node; name the server of the file")
    target = target_for(name, scratch)
    retries = Retry(total=5, other=0, redirect=False, status_forcelist=(429, 500, 502, 503, 504), backoff_factor=0.3)
    pool = urllib3.PoolManager(ssl_context=ssl.create_default_context(), timeout=Timeout(connect=10, read=60))
    while True:
        try:
            _stream(pool, uri, retries, target)
            return DataFile(target, name)
        except HTTPError as error:
            if isinstance(getattr(error, "reason", error), SSLError):
                raise InputMissing(f"{uri}: {str(error)[:300]}; check the certificate") from error
            try:
                retries = retries.increment("GET", uri, error=error)
            except HTTPError:
                raise InputMissing(f"{uri}: {str(error)[:300]}; check the uri and the network") from error
            retries.sleep()


def _stream(pool: urllib3.PoolManager, uri: str, retries: Retry, target: Path) -> None:
    url = uri
    for _ in range(_REDIRECTS + 1):
        response = pool.request("GET", url, redirect=False, retries=retries, preload_content=False)
        try:
            location = response.get_redirect_location()
            if location:
                url = _follow(url, urljoin(url, location))
                continue
            if response.status != 200:
                raise InputMissing(
                    f"{uri}: the server answers {response.status} {response.reason or ''}; check the uri"
                )
            with target.open("wb") as file:
                # Compressed transfer is not undone: a .gz file is stored as it is.
                for chunk in response.stream(_CHUNK, decode_content=False):
                    file.write(chunk)
            return
        finally:
            response.close()
    raise InputMissing(f"{uri}: more than {_REDIRECTS} redirects; give the final address")


def _follow(before: str, after: str) -> str:
    old, new = urlsplit(before), urlsplit(after)
    if new.scheme != "https" or not new.hostname:
        raise InputMissing(f"{before} redirects to {new.scheme}://{new.hostname}; only https is followed")
    if new.hostname != old.hostname:
        found = _addresses(new.hostname, new.port or 443)
        if not found:
            raise InputMissing(f"{before} redirects to {new.hostname}, which has no address; give the final address")
        if not all(address.is_global for address in found):
            raise InputMissing(f"{before} redirects to the private address {new.hostname}; give the final address")
    return after


def _addresses(host: str, port: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """What a name resolves to; nothing where it does not."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
