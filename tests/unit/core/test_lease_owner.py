"""A Lease that an installation creates goes away with its service account."""

import base64
import json
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab_operator.core.credentials import Credentials
from trimtab_operator.core.lease import held, look

ACCOUNT = {"apiVersion": "v1", "kind": "ServiceAccount", "name": "trimtab-operator", "uid": "uid-1"}
CLAIMS = {"namespace": "trimtab-system", "serviceaccount": {"name": "trimtab-operator", "uid": "uid-1"}}
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def token(claims: Any) -> str:
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"Bearer head.{body}.signature"


def credentials(header: str | None) -> Credentials:
    async def get(*_: str, **__: str) -> str | None:
        return header

    absent = dict.fromkeys(("ssl_ca_cert", "cert_file", "key_file", "tls_server_name", "proxy"))
    found = SimpleNamespace(host="https://api", verify_ssl=True, get_api_key_with_prefix=get, **absent)
    return Credentials(found)


async def test_a_pods_token_tells_its_service_account() -> None:
    found = credentials(token({"kubernetes.io": CLAIMS}))
    assert await found.service_account("trimtab-system") == ACCOUNT


@pytest.mark.parametrize("header", [None, "Bearer opaque", "Bearer a.b.c", token([]), token({"sub": "alice"})])
async def test_any_other_identity_owns_nothing(header: str | None) -> None:
    assert await credentials(header).service_account("trimtab-system") is None


async def test_no_owner_in_another_namespace() -> None:
    """The garbage collector deletes what names an owner of another namespace."""
    assert await credentials(token({"kubernetes.io": CLAIMS})).service_account("elsewhere") is None


def test_a_new_lease_has_the_owner_and_a_live_one_keeps_its_own() -> None:
    new = held(look(None, None, 0, "me", 10), "me", "lease", "ns", 10, NOW, ACCOUNT)
    assert new["metadata"]["ownerReferences"] == [ACCOUNT]
    live = {**new, "metadata": {**new["metadata"], "resourceVersion": "7", "ownerReferences": []}}
    renewed = held(look(None, live, 0, "me", 10), "me", "lease", "ns", 10, NOW, ACCOUNT)
    assert renewed["metadata"] == live["metadata"]
