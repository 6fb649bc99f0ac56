"""What the chart gives the operator and takes from it: its roles, and the policies of admission."""

from __future__ import annotations

import json

from tests.chart.render import Object, objects_of, render, render_text
from tests.controlplane.cluster import ControlPlane

NAMESPACE = "default"
"""Of the release, and so of the Lease."""
_ALLOWED = "--set=admission.allowLists.serviceAccounts={absent,server,trainer}"
"""The service accounts that jobs and endpoints of the tests name."""
_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:trimtab-operator"
_KINDS = (
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
)
_USER = {"kind": "User", "name": "operator", "apiGroup": "rbac.authorization.k8s.io"}


def rights_and_policies(*options: str) -> list[Object]:
    """Those of the chart, about the test user `operator` in place of the operator's ServiceAccount.

    Args:
        options: `--set` and `--values` for Helm.
    """
    text = render_text(_ALLOWED, *options, namespace=NAMESPACE).replace(_ACCOUNT, _USER["name"])
    chosen = [obj for obj in objects_of(text) if obj["kind"] in _KINDS and "helm.sh/hook" not in _annotations(obj)]
    return [obj | ({"subjects": [_USER]} if "subjects" in obj else {}) for obj in chosen]


def selftest(*options: str) -> list[Object]:
    """What `helm test` creates: service account, role, binding and the pod that tests."""
    return [obj for obj in render(*options, namespace=NAMESPACE) if "helm.sh/hook" in _annotations(obj)]


def install_rights_and_policies(control_plane: ControlPlane, *options: str) -> None:
    """Install or update them."""
    body = {"apiVersion": "v1", "kind": "List", "items": rights_and_policies(*options)}
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=json.dumps(body))


def _annotations(obj: Object) -> dict[str, str]:
    return obj["metadata"].get("annotations") or {}
