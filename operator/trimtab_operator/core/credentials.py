"""Where the API server is and how to prove who we are; kubeconfig and service accounts are parsed by `kubernetes`."""

from __future__ import annotations

import base64
import binascii
import json
import os
import ssl
from typing import Any

from trimtab_operator.core.kube import Object

IN_CLUSTER_VARIABLE = "KUBERNETES_SERVICE_HOST"
KUBECONFIG = "~/.kube/config"


class CredentialsError(Exception):
    """No usable kubeconfig or service account; the message says what was tried."""


class Credentials:
    """One API server and one identity; `load()` makes it.

    In a pod the service account is used, elsewhere the current context of `$KUBECONFIG` (or ~/.kube/config). A
    `$KUBECONFIG` that is set wins in a pod too.
    """

    def __init__(self, configuration: Any) -> None:
        self._configuration = configuration
        self.server: str = configuration.host.rstrip("/")
        self.ca_file: str | None = configuration.ssl_ca_cert or None
        self.certificate_file: str | None = configuration.cert_file or None
        self.key_file: str | None = configuration.key_file or None
        self.insecure: bool = not configuration.verify_ssl
        self.server_name: str | None = configuration.tls_server_name or None
        self.proxy: str | None = configuration.proxy or None

    async def authorization(self) -> str | None:
        """The Authorization header's value now: a service account's token is read again as it is renewed."""
        header: str | None = await self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return header or None

    async def service_account(self, namespace: str) -> Object | None:
        """An owner reference to the service account whose token this is; None for others, and in another namespace."""
        claims = _claims(await self.authorization() or "").get("kubernetes.io", {})
        account = claims.get("serviceaccount", {})
        if claims.get("namespace") != namespace or not account.keys() >= {"name", "uid"}:
            return None
        return {"apiVersion": "v1", "kind": "ServiceAccount", "name": account["name"], "uid": account["uid"]}

    async def renew(self) -> None:
        """Read the credentials again, because the server refused them: a token from a plugin or a file has expired."""
        self._configuration = await _configuration()

    def ssl_context(self) -> ssl.SSLContext:
        """Trusts the cluster's authority and shows the client certificate, where there is one."""
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _claims(header: str) -> Object:
    """The claims of a bearer token that is a JSON Web Token, unverified: what we are told about ourselves."""
    try:
        body = header.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (IndexError, ValueError, binascii.Error):
        return {}
    return claims if isinstance(claims, dict) else {}


async def load() -> Credentials:
    """Read the credentials of this process.

    Raises:
        CredentialsError: There are none, or they can't be read.
    """
    return Credentials(await _configuration())


async def _configuration() -> Any:
    # Imported here: 50 MB of client that local mode has no use for.
    from kubernetes.aio import config
    from kubernetes.aio.client import Configuration

    configuration = Configuration()
    try:
        if IN_CLUSTER_VARIABLE in os.environ and "KUBECONFIG" not in os.environ:
            config.load_incluster_config(  # type: ignore[no-untyped-call]
                client_configuration=configuration
            )
        else:
            await config.load_kube_config(  # type: ignore[no-untyped-call]
                # Given here, since the library reads the variable when it is imported and never again.
                config_file=os.environ.get("KUBECONFIG", KUBECONFIG),
                client_configuration=configuration,
                persist_config=False,
            )
    except (config.ConfigException, OSError, KeyError, ValueError) as error:
        raise CredentialsError(
            f"no access to a cluster: {error}; set KUBECONFIG to a kubeconfig, or run in a pod with a service account"
        ) from error
    return configuration
