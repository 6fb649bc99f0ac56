"""What `kubectl get ftj` shows at each moment of a job's life, on a real control plane.

The scheduler, the Job controller, quota and admission are real. Where a kubelet would speak, the test writes the pod's
status or Event as a kubelet of Kubernetes 1.36 does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.jobs import Object, Space, annotated, until
from tests.controlplane.operator import Operator

NOT_FOUND = 'failed to pull and unpack image "nope:1": failed to resolve reference "nope:1": not found'


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane) -> Iterator[Operator]:
    """Soon asks why a pod is not there."""
    install_crds(control_plane)
    with Operator(control_plane, complaint_seconds=1) as running:
        yield running


def shaped(space: Space, **shape: Any) -> Object:
    """A job whose stage `sft` has this shape; its pods would run for an hour."""
    job = annotated(space.job(), "sft", duration="1h")
    job["spec"]["stages"][1] |= shape
    return job


def held(space: Space) -> Object:
    """The pod of `sft`, on its node, whose kubelet has not said a word."""
    job = annotated(space.job(), "sft", duration="1h", held="yes")
    job["spec"]["stages"][1]["image"] = "nope:1"
    space.apply(job)

    def bound() -> Object | None:
        return next((pod for pod in space.items("pods", stage="sft") if pod["spec"].get("nodeName")), None)

    pod: Object = until(bound, "a scheduled pod")
    return pod


def named(space: Space, kind: str, name: str, **spec: Any) -> Object:
    """An object of the core API."""
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": space.namespace}, "spec": spec}


def says(space: Space, pod: Object, phase: str = "Pending", **status: Any) -> None:
    """The kubelet's words about a pod."""
    change = json.dumps({"status": {"phase": phase, **status}})
    name = pod["metadata"]["name"]
    space.kubectl("patch", "pod", name, "--subresource=status", f"--patch={change}", "--type=merge")


def waiting(reason: str, message: str = "") -> list[Object]:
    state = {"waiting": {"reason": reason, "message": message}}
    return [{"name": "trainer", "image": "nope:1", "imageID": "", "ready": False, "restartCount": 0, "state": state}]


def test_from_its_creation_to_its_end(operator: Operator, space: Space) -> None:
    job = annotated(space.job(), "sft", duration="1h")
    job["spec"]["artifacts"] = {"uri": "pvc://later/x"}
    space.apply(job)
    row = space.until_row("Pending", "ClaimMissing")
    assert (row["PROGRESS"], row["STAGE"], row["ETA"]) == ("0%", "", "")
    space.kubectl("delete", "ftj", "quickstart")

    space.apply(annotated(space.job(), "sft", duration="1h"))
    row = space.until_row("Running", "Running")
    until(lambda: space.row()["STAGE"] == "sft", "sft runs")
    space.kubectl("patch", "ftj", "quickstart", "--type=merge", '--patch={"spec": {"suspend": true}}')
    space.until_row("Suspended", "Suspended")
    space.kubectl("patch", "ftj", "quickstart", "--type=merge", '--patch={"spec": {"suspend": false}}')
    until(lambda: space.row()["PHASE"] == "Running" and space.items("pods", stage="sft"), "it goes on")
    (pod,) = space.items("pods", stage="sft")
    space.kubectl("annotate", "pod", pod["metadata"]["name"], "test.trimtab.dev/duration=0s", "--overwrite")
    row = space.until_row("Succeeded", "Completed")
    assert (row["PROGRESS"], row["ETA"]) == ("100%", "")


def test_prepare_and_retries_show(operator: Operator, space: Space) -> None:
    job = annotated(space.job(), "pretrain", duration="1h")
    space.apply(job)
    space.until_row("Preparing", "Preparing")
    space.kubectl("delete", "ftj", "quickstart")
    space.apply(annotated(space.job(), "sft", exit_code="71"))
    space.until_row("Running", "Retrying")
    assert "attempt 1 failed (Stalled)" in space.message()
    space.kubectl("delete", "ftj", "quickstart")
    space.apply(annotated(space.job(), "sft", exit_code="70"))
    space.until_row("Failed", "TrainingFailed")


def test_no_node_fits_in_the_schedulers_words(operator: Operator, space: Space) -> None:
    space.apply(shaped(space, nodeSelector={"nowhere": "yes"}))
    space.until_row("Queued", "Unschedulable")
    assert "node(s) didn't match Pod's node affinity/selector" in space.message()


def test_a_quota_in_the_api_servers_words(operator: Operator, space: Space) -> None:
    hard = {"requests.nvidia.com/gpu": "1"}
    space.apply(named(space, "ResourceQuota", "gpus", hard=hard))
    until(lambda: space.get("quota", "gpus").get("status", {}).get("hard"), "the quota is in force")
    space.apply(shaped(space, resources={"limits": {"nvidia.com/gpu": 2, "cpu": 1, "memory": "1Gi"}}))
    space.until_row("Queued", "QuotaExceeded")
    assert "gets no pod: exceeded quota: gpus, requested: requests.nvidia.com/gpu=2" in space.message()


def test_an_endpoints_pods_over_quota(operator: Operator, space: Space) -> None:
    space.apply(named(space, "ResourceQuota", "none", hard={"pods": "0"}))
    until(lambda: space.get("quota", "none").get("status", {}).get("hard"), "the quota is in force")
    endpoint = space.base_endpoint()
    endpoint["spec"]["model"] = {"uri": "pvc://quickstart/x", "digest": f"sha256:{'a' * 64}"}
    space.apply(endpoint)
    space.wait("Degraded", "mep/quickstart-base")
    degraded = next(c for c in space.status("mep/quickstart-base")["conditions"] if c["type"] == "Degraded")
    assert degraded["reason"] == "QuotaExceeded"
    assert "gets no pod: exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0" in degraded["message"]


def test_an_absent_service_account_is_named(operator: Operator, space: Space) -> None:
    space.apply(shaped(space, serviceAccountName="absent"))
    space.until_row("Queued", "PodsRefused")
    assert 'serviceaccount "absent" not found' in space.message()


def test_pods_that_a_limit_range_refuses_are_named(operator: Operator, space: Space) -> None:
    limits = [{"type": "Container", "max": {"cpu": "500m"}}]
    space.apply(named(space, "LimitRange", "small", limits=limits))
    space.apply(space.job())
    space.until_row("Preparing", "PodsRefused")
    assert "maximum cpu usage per Container is 500m, but limit is" in space.message()


def test_pod_security_lets_every_pod_pass(operator: Operator, space: Space) -> None:
    space.kubectl("label", "namespace", space.namespace, "pod-security.kubernetes.io/enforce=restricted")
    space.apply(space.job())
    space.until_row("Succeeded", "Completed")


def test_a_kubelet_that_cannot_start_the_pod(operator: Operator, space: Space) -> None:
    pod = held(space)
    name = pod["metadata"]["name"]
    says(space, pod, containerStatuses=waiting("ErrImagePull", NOT_FOUND))
    space.until_row("Queued", "ImagePullFailed")
    message = space.message()
    assert message.startswith(f"stage sft: pod {name}: the image 'nope:1' can't be pulled; ")
    assert message.endswith(NOT_FOUND)
    version = space.get("ftj", "quickstart")["metadata"]["resourceVersion"]
    back_off = f'Back-off pulling image "nope:1": ErrImagePull: {NOT_FOUND}'
    says(space, pod, containerStatuses=waiting("ImagePullBackOff", back_off))

    says(space, pod, containerStatuses=waiting("CreateContainerConfigError", 'secret "token" not found'))
    space.until_row("Queued", "CreateFailed")
    assert int(space.get("ftj", "quickstart")["metadata"]["resourceVersion"]) > int(version)
    assert space.message() == f'stage sft: pod {name}: secret "token" not found'

    state = {"terminated": {"exitCode": 3, "reason": "Error"}}
    mesh = {"name": "mesh", "image": "m", "imageID": "", "ready": False, "restartCount": 1, "state": state}
    says(space, pod, initContainerStatuses=[mesh], containerStatuses=waiting("PodInitializing"))
    space.until_row("Queued", "InitFailed")

    says(space, pod, initContainerStatuses=[], containerStatuses=waiting("ContainerCreating"))
    note = 'MountVolume.SetUp failed for volume "secret-0" : secret "s3-read" not found'
    space.apply(warning(pod, "FailedMount", note))
    space.until_row("Queued", "MountFailed")
    assert space.message() == f"stage sft: pod {name} on node {pod['spec']['nodeName']}: {note}"


def test_a_node_that_does_not_answer(operator: Operator, space: Space) -> None:
    pod = held(space)
    conditions = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady")]
    says(space, pod, "Running", conditions=conditions)
    space.until_row("Running", "Running")
    conditions[0]["status"] = "False"
    says(space, pod, "Running", conditions=conditions)
    space.until_row("Queued", "NodeNotReady")
    assert f"node {pod['spec']['nodeName']} does not answer" in space.message()


def warning(pod: Object, reason: str, note: str) -> Object:
    """An Event as the kubelet's recorder writes it."""
    metadata = pod["metadata"]
    regarding = {"kind": "Pod", "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]}
    now = "2026-01-01T00:00:00Z"
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.1", "namespace": metadata["namespace"]},
        "involvedObject": {"apiVersion": "v1", **regarding},
        "type": "Warning",
        "reason": reason,
        "message": note,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
        "source": {"component": "kubelet"},
    }
