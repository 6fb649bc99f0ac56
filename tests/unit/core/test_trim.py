"""What the store keeps of an object. That no plan reads more is checked by `guarded.py` in every test of a plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tests.unit.core.guarded import NotKept, guarded

from trimtab_operator.core.kube import CHILDREN, CLAIM, OWNERS, Object
from trimtab_operator.core.pods import pod_view
from trimtab_operator.core.trim import kept_of, trim

METADATA: Object = {
    "name": "a",
    "namespace": "n",
    "uid": "u",
    "resourceVersion": "7",
    "labels": {"app": "x"},
    "ownerReferences": [{"uid": "o", "controller": True}],
    "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "mine": "1"},
    "managedFields": [{"manager": "kubectl"}],
}
POD: Object = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": METADATA,
    "spec": {
        "nodeName": "node-1",
        "volumes": [{"name": "config"}],
        "containers": [{"name": "trainer", "env": [], "resources": {"limits": {"memory": "1Gi", "cpu": "1"}}}],
    },
    "status": {
        "phase": "Failed",
        "qosClass": "Burstable",
        "conditions": [{"type": "Ready", "status": "False", "lastProbeTime": None}],
        "containerStatuses": [
            {"name": "trainer", "imageID": "x", "state": {"terminated": {"exitCode": 1, "message": "m" * 100}}}
        ],
    },
}


def test_a_pod_keeps_what_its_view_is_made_of() -> None:
    before = copy.deepcopy(POD)
    kept = trim(POD)
    assert before == POD, "it is a copy"
    assert kept["spec"] == {
        "nodeName": "node-1",
        "containers": [{"name": "trainer", "resources": {"limits": {"memory": "1Gi"}}}],
    }
    assert "managedFields" not in kept["metadata"]
    assert kept["metadata"]["annotations"] == {}
    assert pod_view(kept) == pod_view(POD)


@pytest.mark.parametrize("kind", [k.kind for k in (*OWNERS, *CHILDREN, CLAIM) if kept_of({"kind": k.kind}) is None])
def test_what_is_compared_with_what_is_desired_stays_whole(kind: str) -> None:
    obj: Object = {"kind": kind, "metadata": METADATA, "spec": {"any": [{"thing": None}], "n": 1.5}, "data": {"x": "y"}}
    kept = trim(obj)
    assert kept["metadata"]["annotations"] == {"mine": "1"}
    assert {**kept, "metadata": METADATA} == obj


def test_a_config_map_that_can_not_change_keeps_no_data() -> None:
    obj: Object = {"kind": "ConfigMap", "metadata": METADATA, "data": {"stage.json": "{}"}}
    assert trim(obj)["data"] == obj["data"]
    assert "data" not in trim({**obj, "immutable": True})


def test_texts_are_shared_between_objects() -> None:
    first, second = (trim({"kind": "Service", "metadata": {"name": "-".join(("a", "b"))}}) for _ in range(2))
    assert first["metadata"]["name"] is second["metadata"]["name"]
    assert next(iter(first)) is next(iter(second))


@pytest.mark.parametrize(
    "read",
    [
        lambda pod: pod["spec"]["volumes"],
        lambda pod: pod["spec"].get("absent"),
        lambda pod: "hostIP" in pod["status"],
        lambda pod: pod["status"]["containerStatuses"][0]["imageID"],
        lambda pod: pod["metadata"]["annotations"]["mine"],
        lambda pod: {**pod["spec"]},
        lambda pod: pod["spec"].items(),
    ],
)
def test_the_guard_refuses_what_is_not_kept(read: Any) -> None:
    assert pod_view(guarded(POD)) == pod_view(POD)
    with pytest.raises(NotKept):
        read(guarded(POD))
