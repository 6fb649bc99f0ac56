"""A pod that does not start is named with its cause, and a deadline ends the wait of who asked for one."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.world import World, spec, stage

from trimtab_operator.core.complaints import Complaint
from trimtab_operator.core.conditions import timestamp
from trimtab_operator.core.kube import Ref

QUOTA = "exceeded quota: compute, requested: requests.memory=8Gi, used: requests.memory=8Gi, limited: 10Gi"
SECURITY = 'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false'
MOUNT = 'MountVolume.SetUp failed for volume "secret-0" : secret "s3-read" not found'


def training(**fields: Any) -> World:
    """A job whose one stage of two pods runs."""
    world = World(spec(stage(nodes=2), **fields))
    world.settle()
    world.succeed("prepare")
    world.settle()
    return world


def drop(world: World, index: int) -> None:
    pod = world.pods("one")[index]
    world.objects.pop(Ref("Pod", "team", pod["metadata"]["name"]))


def said(world: World) -> tuple[str, str]:
    progressing = world.condition("Progressing")
    return progressing["reason"], progressing["message"]


def answer(world: World, complaint: Complaint | None) -> None:
    """The API's answer to the one question of the board."""
    (subject,) = world.controller.complaints.targets(world.key)
    assert world.controller.complaints.put(subject, complaint)


@pytest.mark.parametrize(
    ("note", "reason"), [(QUOTA, "QuotaExceeded"), (SECURITY, "PodsRefused")], ids=["quota", "Pod Security"]
)
def test_pods_that_are_refused_say_so_in_the_servers_words(note: str, reason: str) -> None:
    world = training()
    drop(world, 0)
    drop(world, 0)
    world.settle()
    answer(world, Complaint("FailedCreate", note))
    world.settle()
    (job,) = world.jobs("one")
    assert said(world) == (reason, f"stage one: Job {job['metadata']['name']} gets no pod: {note}")
    assert (world.status["phase"], world.status["reason"]) == ("Queued", reason)


def test_one_missing_pod_of_two_is_missed() -> None:
    world = training()
    drop(world, 1)
    world.settle()
    assert world.status["phase"] == "Running"
    world.sleep(60)
    world.settle()
    assert said(world)[0] == "NoPod"
    assert "lacks 1 of 2 pods" in said(world)[1]


def test_a_volume_that_cannot_be_mounted_is_named_at_once() -> None:
    world = training()
    pod = world.pods("one")[1]
    pod["status"] = {"phase": "Pending"}
    world.settle()
    answer(world, Complaint("FailedMount", MOUNT))
    world.settle()
    assert said(world) == ("MountFailed", f"stage one: pod {pod['metadata']['name']} on node node-1: {MOUNT}")
    pod["status"] = {"phase": "Running"}
    world.settle()
    assert said(world)[0] == "Running"
    assert world.controller.complaints.targets(world.key) == ()


def test_nobody_is_asked_about_what_gets_on_or_is_held() -> None:
    world = training(queueName="team-a")
    assert world.controller.complaints.targets(world.key) == ()
    world.admit("one")
    world.settle()
    assert world.controller.complaints.targets(world.key) == ()
    drop(world, 0)
    world.settle()
    (subject,) = world.controller.complaints.targets(world.key)
    assert subject.uid == world.jobs("one")[0]["metadata"]["uid"]


def test_an_init_container_of_a_webhook_is_named() -> None:
    world = training()
    world.pods("one")[0]["status"] = {
        "phase": "Pending",
        "initContainerStatuses": [
            {"name": "mesh", "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended(3)}
        ],
    }
    world.settle()
    assert said(world)[0] == "InitFailed"
    assert "init container mesh ended with exit code 3" in said(world)[1]


def ended(code: int) -> dict[str, Any]:
    return {"terminated": {"exitCode": code}}


def test_a_node_that_does_not_answer_is_named_and_one_that_never_will() -> None:
    world = training()
    pod = world.pods("one")[1]
    pod["status"]["conditions"] = [{"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"}]
    world.settle()
    assert said(world)[0] == "NodeNotReady"
    pod["status"]["conditions"].append(
        {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    )
    pod["metadata"]["deletionTimestamp"] = timestamp(world.now)
    world.settle()
    assert said(world)[0] == "Disrupted"
    assert world.plan().requeue_after == pytest.approx(60)
    world.sleep(60)
    world.settle()
    assert said(world)[0] == "NodeLost"
    assert "kubectl delete node node-1" in said(world)[1]
    world.end(pod, 137)
    world.settle()
    world.sleep(1)
    world.settle()
    assert world.stage("one").get("failures") is None


def test_out_of_memory_names_the_limit_and_the_remedy() -> None:
    limits = {"resources": {"limits": {"memory": "8Gi"}}}
    world = World(spec(stage(**limits)))
    world.settle()
    world.succeed("prepare")
    world.settle()
    world.end(world.pods("one")[0], 137, reason="OOMKilled")
    world.settle()
    assert "ran out of memory (limit 8Gi); raise its memory limit" in said(world)[1]


def test_the_starting_deadline_ends_an_endless_wait_and_names_its_cause() -> None:
    world = training(startingDeadlineSeconds=600)
    pod = world.pods("one")[1]
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes fit"}
    pod["status"] = {"phase": "Pending", "conditions": [scheduled]}
    world.settle()
    assert world.plan().requeue_after == pytest.approx(600)
    world.sleep(599)
    world.settle()
    assert said(world)[0] == "Unschedulable"
    world.edit(startingDeadlineSeconds=700)
    world.sleep(1)
    world.settle()
    assert said(world)[0] == "Unschedulable", "the deadline may change at any time"
    world.sleep(100)
    world.settle()
    failed = world.condition("Failed")
    assert (world.status["phase"], failed["reason"]) == ("Failed", "StartingDeadlineExceeded")
    assert failed["message"].startswith("stage one, attempt 1: its pods have not all started within 700 s: pod ")
    assert failed["message"].endswith("0/3 nodes fit")
    world.settle()
    assert world.jobs("one") == [], "what was started is taken back"


def test_the_starting_deadline_holds_for_prepare_and_for_each_attempt_anew() -> None:
    world = World(spec(stage(), startingDeadlineSeconds=60))
    world.settle()
    world.sleep(1000)
    world.settle()
    assert world.status["phase"] == "Preparing", "a pod that runs has started"
    world.succeed("prepare")
    world.settle()
    world.sleep(1000)
    world.end(world.pods("one")[0], 71)
    world.settle()
    world.sleep(20)
    world.settle()
    assert world.stage("one")["attempt"] == 2
    world.pods("one")[0]["status"] = {"phase": "Pending"}
    world.sleep(59)
    world.settle()
    assert world.status["phase"] != "Failed"
    world.sleep(1)
    world.settle()
    assert world.condition("Failed")["message"].startswith("stage one, attempt 2: ")
