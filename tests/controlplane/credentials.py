"""Who may talk to the test API server: certificates, token users and their kubeconfigs."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import trustme

LOOPBACK = "127.0.0.1"

USERS: dict[str, tuple[str, ...]] = {
    "admin": ("system:masters",),
    "kwok": ("system:masters",),
    "system:kube-controller-manager": (),
    "system:kube-scheduler": (),
    "operator": (),
    "alice": (),
    "bob": (),
}
"""User name -> groups. The last three have no rights until a test binds some to them."""


class Credentials:
    """The files of a new certificate authority and of the users, written below `directory`.

    Attributes:
        ca: The authority's certificate.
        directory: Has `apiserver.{pem,key}`, `kubelet-client.{pem,key}` (the API server's, towards kubelets),
            `service-accounts.key`, `tokens.csv` and the kubeconfigs.
        tokens: User -> bearer token.
    """

    def __init__(self, directory: Path, url: str, users: Mapping[str, tuple[str, ...]] = USERS) -> None:
        self.directory = directory
        self.ca = directory / "ca.pem"
        self.tokens = {user: secrets.token_hex(16) for user in users}
        self._url = url
        directory.mkdir(parents=True)
        self._write_certificates()
        rows = [f'{self.tokens[user]},{user},{user},"{",".join(groups)}"\n' for user, groups in users.items()]
        (directory / "tokens.csv").write_text("".join(rows))
        for user, token in self.tokens.items():
            self.write_kubeconfig(user, token)

    def kubeconfig(self, user: str) -> Path:
        """The kubeconfig of one of the users."""
        if user not in self.tokens:
            raise ValueError(
                f"no user {user!r}: the API server reads its users at its start; they are {', '.join(self.tokens)}"
            )
        return self._kubeconfig(user)

    def write_kubeconfig(self, user: str, token: str) -> Path:
        """Writes a kubeconfig for whom the token stands for, and returns its path."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self._url, "certificate-authority": str(self.ca)}}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": "default"}}],
            "current-context": "test",
        }
        path = self._kubeconfig(user)
        path.write_text(json.dumps(content, indent=2))  # JSON is YAML
        return path

    def _kubeconfig(self, user: str) -> Path:
        return self.directory / f"{user.replace(':', '-')}.kubeconfig"

    def _write_certificates(self) -> None:
        authority = trustme.CA(organization_name="trimtab tests")
        authority.cert_pem.write_to_path(self.ca)
        names = {LOOPBACK, urlsplit(self._url).hostname or LOOPBACK, "localhost", "10.96.0.1", "kubernetes.default.svc"}
        server = authority.issue_cert(*names)
        client = authority.issue_cert(
            "kubelet-client.test", common_name="kubelet-client", organization_name="system:masters"
        )
        for name, certificate in (("apiserver", server), ("kubelet-client", client)):
            certificate.cert_chain_pems[0].write_to_path(self.directory / f"{name}.pem")
            certificate.private_key_pem.write_to_path(self.directory / f"{name}.key")
        # Of this one the key alone is used: it signs the tokens of service accounts.
        authority.issue_cert("service-accounts").private_key_pem.write_to_path(self.directory / "service-accounts.key")
