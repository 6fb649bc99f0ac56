"""Jobs in a Kueue queue, on the real Job controller.

Kueue itself is played: what it does to a Job is a handful of writes, made here in its order. It admits by taking back
`suspend` and adding what the ResourceFlavor says (node labels, tolerations) to the template; it evicts by setting
`suspend`, clearing `status.startTime`, and restoring the template. Its Workload objects are none of the operator's.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tests.controlplane.jobs import Object, Space, annotated, condition, until
from tests.controlplane.operator import Operator

QUEUE = "kueue.x-k8s.io/queue-name"
STOPPING = "kueue.x-k8s.io/stopping"
TOLERATION = {"key": "team-a", "operator": "Exists", "effect": "NoSchedule"}


class Kueue:
    """Its batch/Job integration, for one Job."""

    def __init__(self, space: Space, job: str) -> None:
        self._space = space
        self._job = job
        self._template: Object = self.live()["spec"]["template"]["spec"]

    def live(self) -> Object:
        return self._space.get("job", self._job)

    def admit(self, **node_labels: str) -> None:
        self._patch({"spec": {"suspend": False, "template": self._placed(node_labels, [TOLERATION])}})

    def evict(self) -> None:
        self._patch({"spec": {"suspend": True}, "metadata": {"annotations": {STOPPING: "true"}}})
        self._patch({"status": {"startTime": None}}, "--subresource=status")
        before = {"nodeSelector": None, "tolerations": self._template.get("tolerations")}
        self._patch({"metadata": {"annotations": {STOPPING: None}}, "spec": {"template": {"spec": before}}})

    def _placed(self, node_labels: dict[str, str], tolerations: list[Object]) -> Object:
        return {"spec": {"nodeSelector": node_labels, "tolerations": tolerations}}

    def _patch(self, change: Object, *options: str) -> None:
        self._space.kubectl("patch", "job", self._job, "--type=merge", f"--patch={json.dumps(change)}", *options)


def queued(space: Space, **spec: Any) -> Kueue:
    """A job in a queue, once its second stage waits there; its pods would train for an hour."""
    job = annotated(space.job(queueName="team-a", **spec), "sft", duration="1h", stop_exit_code="75")
    space.apply(job)
    first = until(lambda: space.items("jobs", stage="pretrain"), "the first stage's Job")[0]
    Kueue(space, first["metadata"]["name"]).admit()
    second = until(lambda: space.items("jobs", stage="sft"), "the second stage's Job")[0]
    return Kueue(space, second["metadata"]["name"])


def seconds(status: Object) -> int:
    return int(status.get("activeSeconds", 0))


def test_admitted_evicted_and_admitted_again_it_is_one_attempt(operator: Operator, space: Space) -> None:
    kueue = queued(space, activeDeadlineSeconds=600)
    job = kueue.live()
    assert (job["spec"]["suspend"], job["metadata"]["labels"][QUEUE]) == (True, "team-a")
    (prepare,) = [each for each in space.items("jobs") if "trimtab.dev/stage" not in each["metadata"]["labels"]]
    assert QUEUE not in prepare["metadata"]["labels"]
    assert space.until_row("Queued", "WaitingForQuota")["STAGE"] == "sft"
    assert "waits in queue team-a" in space.message()
    assert "activeSince" not in space.status()

    kueue.admit(**{"kubernetes.io/hostname": "node-1"})
    space.until_row("Running", "Running")
    (pod,) = space.items("pods", stage="sft")
    assert pod["spec"]["nodeName"] == "node-1"
    assert TOLERATION.items() <= next(t for t in pod["spec"]["tolerations"] if t.get("key") == "team-a").items()
    assert space.status()["activeSince"]

    kueue.evict()
    space.until_row("Queued", "WaitingForQuota")
    space.until_none("pods", stage="sft")
    status = space.status()
    assert "activeSince" not in status
    live = kueue.live()
    assert live["metadata"]["uid"] == job["metadata"]["uid"]
    assert live["status"].get("failed", 0) == 0, "the Job controller does not count the pods of a suspension"

    kueue.admit()
    space.until_row("Running", "Running")
    (pod,) = space.items("pods", stage="sft")
    assert seconds(space.status()) >= seconds(status)
    space.kubectl("annotate", "pod", pod["metadata"]["name"], "test.trimtab.dev/duration=0s", "--overwrite")
    space.wait("Complete")
    stage = space.status()["stages"][1]
    assert (stage["attempt"], stage.get("failures")) == (1, None)
    assert stage["jobUID"] == job["metadata"]["uid"]


def test_a_pod_that_fails_by_itself_costs_a_retry_and_the_next_attempt_queues(operator: Operator, space: Space) -> None:
    kueue = queued(space)
    kueue.admit()
    space.until_row("Running", "Running")
    first = kueue.live()["metadata"]["uid"]
    (pod,) = space.items("pods", stage="sft")
    space.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    until(lambda: space.status()["stages"][1]["attempt"] == 2, "a second attempt")
    space.until_row("Queued", "WaitingForQuota")
    (job,) = space.items("jobs", stage="sft")
    assert job["metadata"]["uid"] != first
    assert (job["spec"]["suspend"], job["metadata"]["labels"][QUEUE]) == (True, "team-a")


def test_suspended_by_its_author_while_it_waits_and_moved_to_another_queue(operator: Operator, space: Space) -> None:
    queued(space)
    space.until_row("Queued", "WaitingForQuota")
    edit(space, {"suspend": True})
    space.until_row("Suspended", "Suspended")
    assert space.items("jobs", stage="sft") == []
    edit(space, {"suspend": False, "queueName": "team-b"})
    space.until_row("Queued", "WaitingForQuota")
    (job,) = space.items("jobs", stage="sft")
    assert job["metadata"]["labels"][QUEUE] == "team-b"


def test_only_the_time_after_admission_counts_for_the_starting_deadline(operator: Operator, space: Space) -> None:
    kueue = queued(space, startingDeadlineSeconds=3)
    space.until_row("Queued", "WaitingForQuota")
    created = kueue.live()["metadata"]["creationTimestamp"]
    until(lambda: age(created) > 6, "more time than the deadline passes")
    assert space.row()["PHASE"] == "Queued"
    kueue.admit(nowhere="yes")
    space.wait("Failed")
    assert condition(space.status(), "Failed") == ("True", "StartingDeadlineExceeded")
    failed = space.message("Failed")
    assert "its pods have not all started within 3 s: pod " in failed
    assert "node(s) didn't match Pod's node affinity/selector" in failed
    space.until_none("jobs", stage="sft")


def age(created: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()


def edit(space: Space, change: Object) -> None:
    space.kubectl("patch", "ftj", "quickstart", "--type=merge", f"--patch={json.dumps({'spec': change})}")
