"""The quickstart's manifest, as it is committed, from `kubectl apply` to an endpoint that outlives its job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.jobs import QUICKSTART, Space, condition, until
from tests.controlplane.operator import Operator
from tests.controlplane.process import Component
from tests.controlplane.variants import without_messages

COLUMNS = ["NAME", "PHASE", "STAGE", "PROGRESS", "ETA", "REASON", "AGE"]
MOMENTS = [
    ("Preparing", "", "0%", "Preparing"),
    ("Queued", "pretrain", "0%", "Starting"),
    ("Running", "pretrain", "0%", "Running"),
    ("Queued", "sft", "50%", "Starting"),
    ("Running", "sft", "50%", "Running"),
    ("Running", "", "100%", "RollingOut"),
    ("Succeeded", "", "100%", "Completed"),
]
"""Phase, stage, progress and reason, as `kubectl get ftj` shows them one after the other."""

METRICS = {
    "trimtab_operator_reconcile": {"kind", "outcome", "reason"},
    "trimtab_operator_reconcile_seconds": {"kind", "outcome", "le"},
    "trimtab_operator_wake_up_seconds": {"kind", "outcome", "le"},
    "trimtab_operator_api_requests": {"verb", "code"},
    "trimtab_operator_missed_changes": {"kind"},
    "trimtab_operator_synced": set(),
    "trimtab_operator_queue_depth": set(),
    "trimtab_operator_queue_oldest_seconds": set(),
    "trimtab_operator_watch_age_seconds": {"kind"},
    "trimtab_operator_store_objects": {"kind"},
    "trimtab_operator_jobs": {"phase", "stage_type"},
    "trimtab_operator_accelerator_seconds": {"namespace", "outcome"},
    "trimtab_operator_leader": set(),
    "trimtab_operator_leader_transitions": set(),
    "trimtab_operator_watch_restarts": set(),
}
"""Families by the parser's names, which leave out `_total`, with their labels."""


@pytest.fixture
def default(control_plane: ControlPlane) -> Iterator[Space]:
    """The namespace of the committed manifests; left as it was found."""
    space = Space(control_plane, "default")
    space.provide_claim()
    yield space
    space.kubectl("delete", "ftj,mep", "--all")
    space.kubectl("delete", "pvc", "quickstart")
    control_plane.kubectl("delete", "pv", "default-quickstart")


def test_the_quickstart(
    control_plane: ControlPlane, kubernetes_binaries: Path, operator: Operator, default: Space, tmp_path: Path
) -> None:
    command = [str(kubernetes_binaries / "kubectl"), f"--kubeconfig={control_plane.kubeconfig()}"]
    watch = Component("kubectl", [*command, "get", "ftj", "--watch"], tmp_path / "watch", {"HOME": str(tmp_path)})
    default.kubectl("apply", f"--filename={QUICKSTART / 'job.yaml'}")
    default.kubectl("wait", "--for=condition=Complete", "--timeout=180s", "ftj/quickstart")
    until(lambda: "Completed" in (tmp_path / "watch").read_text(), "kubectl get --watch shows the end")
    watch.kill()
    header, *rows = (tmp_path / "watch").read_text().splitlines()
    assert header.split() == COLUMNS
    seen = distinct([shown for row in rows if (shown := cells(row))])
    assert seen == MOMENTS[-len(seen) :]
    assert len(seen) >= 4, rows

    default.wait("Ready", "mep/quickstart-base")
    status = default.status()
    assert condition(status, "Complete") == ("True", "Completed")
    assert children(default) == [
        "configmaps quickstart-prepare-1-#",
        "configmaps quickstart-pretrain-1-#",
        "configmaps quickstart-sft-1-#",
        "jobs quickstart-prepare-1-#",
        "jobs quickstart-pretrain-1-#",
        "jobs quickstart-sft-1-#",
        "services quickstart-pretrain-#",
        "services quickstart-sft-#",
    ]
    for name, stage in [("quickstart", 1), ("quickstart-base", 0)]:
        artifact = status["stages"][stage]["artifact"]
        served = default.status(f"mep/{name}")
        assert served["phase"] == "Healthy"
        assert {key: served["stable"][key] for key in ("uri", "digest", "ready")} == {**artifact, "ready": 1}
    assert status["endpoint"]["url"] == default.status("mep/quickstart")["url"]

    metrics = operator.metrics()
    own = {name for name in metrics if name.startswith("trimtab_operator_") and not name.endswith("_created")}
    assert own == set(METRICS)
    for name, labels in METRICS.items():
        assert all(set(sample.labels) <= labels for sample in metrics[name].samples)

    def counted() -> bool:
        """The operator counts what is there; jobs of other tests may still be going."""
        live = [
            job["status"]["phase"] for job in control_plane.get("ftj", "--all-namespaces")["items"] if "status" in job
        ]
        samples = operator.metrics()["trimtab_operator_jobs"].samples
        told = sum(sample.value for sample in samples if sample.labels["phase"] == "Succeeded")
        return live.count("Succeeded") == told >= 1

    until(counted, "the metric agrees with the API server")

    before = served_objects(default)
    default.kubectl("delete", "ftj", "quickstart")
    for kind in ("jobs", "pods", "services", "configmaps"):
        default.until_none(kind, job="quickstart")
    assert served_objects(default) == before
    assert len(before) == 2 * 5  # of each endpoint: itself, ConfigMap, Deployment, Service and pod
    for name in ("quickstart", "quickstart-base"):
        status = default.status(f"mep/{name}")
        assert condition(status, "Ready") == ("True", "Serving")
        assert status["stable"]["ready"] == 1


def test_without_termination_messages_the_job_fails(
    control_plane: ControlPlane, operator: Operator, space: Space, tmp_path: Path
) -> None:
    control_plane.start_kwok(*without_messages(tmp_path))
    try:
        space.apply(space.job(), space.base_endpoint())
        space.wait("Failed")
        status = space.status()
    finally:
        control_plane.start_kwok()
    assert (status["phase"], status["reason"]) == ("Failed", "ReportMissing")
    assert condition(status, "Failed") == ("True", "ReportMissing")
    message = next(c["message"] for c in status["conditions"] if c["type"] == "Failed")
    assert "prepare, attempt 1" in message
    assert "check that its image" in message
    assert space.names("jobs", job="quickstart") != []
    assert not space.items("jobs", stage="pretrain")
    assert not space.get("mep", "--field-selector=metadata.name=quickstart")["items"]


def cells(row: str) -> tuple[str, str, str, str] | None:
    """Phase, stage, progress and reason of a row; None before the first status. Empty cells leave no trace in a row."""
    match = re.fullmatch(r"quickstart +(\w+) +(?:([a-z]\w*) +)?(\d+%) +(?:\w+ +)?(\w+) +\w+ *", row)
    return (match[1], match[2] or "", match[3], match[4]) if match else None


def distinct(values: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    return [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]


def children(space: Space) -> list[str]:
    """Kind and name, without its hash, of what the job controls."""
    uid = space.get("ftj", "quickstart")["metadata"]["uid"]
    found = []
    for kind in ("configmaps", "deployments", "jobs", "services"):
        for item in space.get(kind)["items"]:
            owners = item["metadata"].get("ownerReferences", [])
            if any(owner["uid"] == uid and owner["controller"] for owner in owners):
                found.append(f"{kind} {re.sub('-[0-9a-f]{8}$', '-#', item['metadata']['name'])}")
    return sorted(found)


def served_objects(space: Space) -> list[tuple[str, str, str]]:
    """Kind, name and uid of the endpoints and all that serves them."""
    found = space.get("mep")["items"]
    for kind in ("configmaps", "deployments", "services", "pods"):
        found += space.items(kind, endpoint="quickstart") + space.items(kind, endpoint="quickstart-base")
    return sorted((o["kind"], o["metadata"]["name"], o["metadata"]["uid"]) for o in found)
