"""What an operator does not know must not make it do harm: two attempts at once, or a deletion of what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from tests.unit.faults.cluster import NAMESPACE, Cluster
from tests.unit.faults.history import History
from tests.unit.faults.operator import Operator, Trouble
from tests.unit.finetunejob.world import DIGEST, spec, stage

from trimtab_operator.core.kube import JOB, POD, SERVICE, Kind, Object, Ref, ref_of
from trimtab_operator.core.settings import Settings

TUNE = Ref("FineTuneJob", NAMESPACE, "tune")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Life:
    """A job whose prepare runs, as its operator knows; or whose first attempt has failed."""

    def __init__(self, *, failed: bool = False) -> None:
        self.cluster = Cluster()
        self.operator = Operator(self.cluster, History(self.cluster).wrote, Settings())
        self.add("v1", "PersistentVolumeClaim", "models", {"accessModes": ["ReadWriteMany"]})
        self.add("trimtab.dev/v1alpha1", "FineTuneJob", TUNE.name, spec(stage(retries=3)))
        self.go_on()
        if failed:
            self.cluster.end(self.pod, 71)
            self.go_on()

    def add(self, version: str, kind: str, name: str, fields: dict[str, Any]) -> None:
        metadata = {"name": name, "namespace": NAMESPACE}
        self.cluster.add({"apiVersion": version, "kind": kind, "metadata": metadata, "spec": fields})

    def go_on(self) -> None:
        """All is told of, and done."""
        for _ in range(10):
            self.cluster.tick()
            self.operator.hear()
            self.operator.work(TUNE)

    def lag(self, *kinds: Kind) -> None:
        """A restart on lists that for these kinds are as old as can be; their watches have said nothing since."""
        self.operator.restart(len(self.cluster.log), kinds)

    @property
    def jobs(self) -> list[Object]:
        return self.cluster.of_kind("Job")

    @property
    def pod(self) -> Object:
        return self.cluster.of_kind("Pod")[-1]

    @property
    def attempt(self) -> int:
        return int(self.cluster.objects[TUNE]["status"]["prepare"]["attempt"])

    def work(self, times: int = 5) -> None:
        """Nothing is told of meanwhile but by answers."""
        for _ in range(times):
            self.operator.work(TUNE)


def test_a_job_that_has_moved_on_is_not_deleted() -> None:
    """Between the plan and the deletion the watch tells of the change: the store is new, the plan is not."""
    life = Life()
    job = life.cluster.edit(life.cluster.objects[TUNE], suspend=True)
    life.operator.hear()

    def completes() -> None:
        life.cluster.end(life.pod, 0, f'{{"kind": "prepare", "stages": [{{"digest": "{DIGEST}"}}]}}')
        life.operator.hear()

    (before,) = life.jobs
    life.operator.work(TUNE, Trouble(0, "meanwhile", completes))
    (after,) = life.jobs
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["status"]["conditions"][0]["type"] == "Complete"
    assert job["spec"]["suspend"]


@pytest.mark.parametrize("pods", [True, False], ids=["pods run", "its pods are not there yet"])
def test_a_job_that_no_watch_told_of_runs_on(pods: bool) -> None:
    """After a restart on stale lists the status names an attempt, and its Job is not in the store."""
    life = Life()
    (running,) = life.jobs
    if not pods:
        del life.cluster.objects[ref_of(life.pod)]
    life.lag(JOB, POD)
    life.work()
    assert life.jobs == [running]
    assert life.attempt == 1


@pytest.mark.parametrize("request_number", range(4))
def test_a_job_that_is_told_of_in_the_middle_runs_on(request_number: int) -> None:
    """The watch catches up after the plan was made, before or while it is carried out."""
    life = Life()
    (running,) = life.jobs
    life.lag(JOB, POD)
    life.operator.work(TUNE, Trouble(request_number, "meanwhile", life.operator.hear))
    life.work()
    assert life.jobs == [running]
    assert life.attempt == 1


def test_what_an_earlier_job_of_the_name_left_keeps_nothing_back() -> None:
    """Its owner was deleted, and it was not."""
    life = Life()
    (left,) = life.jobs
    job = life.cluster.objects[TUNE]
    life.cluster.orphan(job)
    life.add(job["apiVersion"], job["kind"], TUNE.name, job["spec"])
    life.go_on()
    life.cluster.remove(next(each for each in life.jobs if each != left))
    for pod in life.cluster.running():
        if "deletionTimestamp" in pod["metadata"]:
            life.cluster.end(pod, 75)
    life.go_on()
    assert life.attempt == 2
    assert len(life.jobs) == 2


def test_an_attempt_waits_for_pods_that_no_watch_told_of() -> None:
    """Someone deletes the Job; its pod saves a checkpoint, and the watch of pods has said nothing yet."""
    life = Life()
    life.lag(POD)
    life.cluster.remove(life.jobs[0])
    life.operator.hear("Job")
    assert life.cluster.running() == [life.pod]
    life.work()
    assert life.jobs == []
    assert life.attempt == 1
    life.cluster.end(life.pod, 75)
    life.go_on()
    assert life.attempt == 2
    assert len(life.jobs) == len(life.cluster.running()) == 1


def test_an_attempt_that_is_created_anew_waits_for_its_former_pods() -> None:
    """The operator dies after it has created a Job and before it has recorded it; someone deletes the Job."""
    life = Life(failed=True)
    life.cluster.sleep(60)
    while life.attempt == 1:
        life.operator.hear()
        life.operator.work(TUNE)
    assert life.jobs == []
    for request in range(20):
        life.operator.work(TUNE, Trouble(request, "crash after"))
        if life.jobs:
            break
    life.cluster.tick()
    assert "jobUID" not in life.cluster.objects[TUNE]["status"]["prepare"]
    life.lag(POD)
    life.cluster.remove(life.jobs[0])
    life.operator.hear("Job")
    life.work()
    assert life.jobs == []
    life.cluster.end(life.pod, 75)
    life.go_on()
    assert life.attempt == 2
    assert len(life.jobs) == 1


def test_what_is_found_as_it_should_be_is_known_from_then_on() -> None:
    """An endpoint's Service that no watch told of: its address belongs in the status."""
    life = Life()
    life.add(
        "trimtab.dev/v1alpha1",
        "ModelEndpoint",
        "chat",
        {"servedModelName": "chat", "model": {"uri": "pvc://models/x", "digest": DIGEST}, "replicas": 1},
    )
    chat = Ref("ModelEndpoint", NAMESPACE, "chat")
    life.operator.hear()
    for _ in range(3):
        life.operator.work(chat)
    (service,) = life.cluster.of_kind("Service")
    life.lag(SERVICE)
    assert life.operator.store.find(ref_of(service)) is None
    life.operator.work(chat)
    assert life.operator.store.find(ref_of(service)) is not None
