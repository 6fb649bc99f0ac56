"""The operator uses every right that the chart grants, and asks for no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.controlplane.chart import rights_and_policies
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.jobs import Space, annotated, until
from tests.controlplane.operator import Operator

READS = {"get", "list", "watch"}
"""When something is read depends on who was faster; the kinds are the same for each verb."""

Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane) -> Iterator[Operator]:
    """One that asks soon why a child does not get on."""
    install_crds(control_plane)
    with Operator(control_plane, complaint_seconds=1) as running:
        yield running


def test_rights_are_used_and_enough(control_plane: ControlPlane, operator: Operator, space: Space) -> None:
    earlier = len(control_plane.audit())  # in an outage of another test anything may be refused
    space.apply(space.job())
    space.wait("Complete")
    first = space.status("mep/quickstart")["stable"]

    # The second job meets the first one's endpoint, is suspended on its way, and expires.
    second = annotated(space.job(ttlSecondsAfterFinished=5), "sft", duration="1h")
    second["metadata"]["name"] = "second"
    space.apply(second)
    until(lambda: training(space), "the second job trains")
    suspend(space, "true")
    until(lambda: not training(space), "it is suspended")
    suspend(space, "false")
    (pod,) = until(lambda: training(space), "it trains again")
    space.kubectl("annotate", "pod", pod, "test.trimtab.dev/duration=0s", "--overwrite")
    space.wait("Complete", "ftj/second")
    space.kubectl("wait", "--for=delete", "ftj/second", "--timeout=120s")
    stable = space.status("mep/quickstart")["stable"]
    assert stable["digest"] != first["digest"]
    for kind in ("deployments", "configmaps", "pods"):
        space.until_none(kind, endpoint="quickstart", revision=first["revision"])
        assert len(space.items(kind, endpoint="quickstart", revision=stable["revision"])) == 1

    # The third one's pods are refused, and the Events are asked why.
    space.kubectl("create", "quota", "none", "--hard=pods=0")
    third = space.job()
    third["metadata"]["name"] = "third"
    space.apply(third)
    space.until_status(lambda status: "exceeded quota" in str(status), "the quota is named", "ftj/third")

    granted = rights()
    used, _ = asked(control_plane.audit())
    _, refused = asked(control_plane.audit()[earlier:])
    assert refused == []
    assert {right for right in granted - used if right[2] not in READS} == set()
    assert {right[:2] for right in granted if right[2] in READS} == {right[:2] for right in used if right[2] in READS}


def training(space: Space) -> list[str]:
    """The pods of the second job's last stage."""
    return space.names("pods", job="second", stage="sft")


def suspend(space: Space, value: str) -> None:
    space.kubectl("patch", "ftj", "second", "--type=merge", f'--patch={{"spec": {{"suspend": {value}}}}}')


def asked(audit: list[dict[str, Any]]) -> tuple[set[Right], list[str]]:
    """The rights that the operator used, and the requests that it had none for."""
    used, refused = set(), []
    for event in audit:
        if event["user"]["username"] == "operator" and "objectRef" in event:
            ref = event["objectRef"]
            resource = "/".join(filter(None, (ref["resource"], ref.get("subresource"))))
            made = event["verb"] == "patch" and event["responseStatus"]["code"] == 201  # an apply that creates
            used |= {(ref.get("apiGroup", ""), resource, verb) for verb in [event["verb"], *(["create"] * made)]}
            if event["annotations"]["authorization.k8s.io/decision"] != "allow":
                refused.append(f"{event['verb']} {event['requestURI']}")
    return used, refused


def rights() -> set[Right]:
    """What the chart grants the operator, and can be asked for.

    `…/finalizers` is asked for by the admission plugin OwnerReferencesPermissionEnforcement, which the API server of
    these tests runs: without that right no child could be created.
    """
    objects = rights_and_policies()
    bound = {obj["roleRef"]["name"] for obj in objects if "subjects" in obj}
    return {
        (group, resource, verb)
        for role in objects
        if role["kind"] in ("ClusterRole", "Role") and role["metadata"]["name"] in bound
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        if not resource.endswith("/finalizers")
        for verb in rule["verbs"]
    }
