"""Jobs in a Kueue queue: they wait, are admitted, evicted and admitted again as the same attempt."""

from __future__ import annotations

import pytest
from tests.unit.finetunejob.world import World, spec, stage

QUEUED = spec(stage(nodes=2), queueName="team-a", activeDeadlineSeconds=100)


def queued(**fields: object) -> World:
    """A job whose training waits in its queue."""
    world = World({**QUEUED, **fields})
    world.settle()
    world.succeed("prepare")
    world.settle()
    return world


def said(world: World) -> tuple[str, str, str]:
    progressing = world.condition("Progressing")
    return world.status["phase"], progressing["reason"], progressing["status"]


def test_a_job_waits_in_its_queue_for_as_long_as_it_takes() -> None:
    world = queued(startingDeadlineSeconds=60)
    assert said(world) == ("Queued", "WaitingForQuota", "False")
    (job,) = world.jobs("one")
    uid = job["metadata"]["uid"]
    words = f"waits in queue team-a; see kubectl get workloads -l kueue.x-k8s.io/job-uid={uid}"
    assert words in world.condition("Progressing")["message"]
    assert "activeSince" not in world.status
    world.sleep(100_000)
    assert not world.reconcile(), "neither deadline counts time in the queue"
    world.jobs("one")[0]["spec"]["suspend"] = False
    world.settle()
    assert world.status["phase"] != "Failed", "the Job controller has not seen the admission yet"
    world.jobs("one")[0]["spec"]["suspend"] = True
    world.admit("one", pool="reserved")
    world.settle()
    assert said(world) == ("Running", "Running", "True")
    assert [pod["spec"]["nodeSelector"] for pod in world.pods("one")] == [{"pool": "reserved"}] * 2
    assert world.plan().requeue_after == pytest.approx(100)


def test_an_eviction_costs_neither_a_retry_nor_the_attempt() -> None:
    world = queued(startingDeadlineSeconds=60)
    world.admit("one")
    world.settle()
    world.sleep(30)
    world.evict("one")
    world.settle()
    assert said(world) == ("Queued", "Evicted", "False")
    assert (world.status["activeSeconds"], world.status.get("activeSince")) == (30, None)
    first, second = world.pods("one")
    world.finish(first, 75)
    world.settle()
    assert said(world) == ("Queued", "Evicted", "False"), "the kubelet has not removed the pod yet"
    world.end(first, 75)
    world.end(second, 143)
    world.settle()
    assert said(world) == ("Queued", "WaitingForQuota", "False")
    world.sleep(100_000)
    world.settle()
    world.admit("one")
    world.settle()
    assert said(world)[:2] == ("Running", "Running")
    assert (world.stage("one")["attempt"], world.stage("one").get("failures")) == (1, None)
    assert len(world.created) == 2, "prepare and one attempt"
    world.succeed("one")
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_admitted_again_while_the_former_pods_still_save() -> None:
    world = queued()
    world.admit("one")
    world.settle()
    world.evict("one")
    world.settle()
    first, second = world.pods("one")
    world.finish(first, 75)
    world.admit("one")
    world.sleep(90)
    world.settle()
    assert said(world) == ("Queued", "Evicted", "False")
    assert second["metadata"]["name"] in world.condition("Progressing")["message"]
    world.end(first, 75)
    world.end(second, 75)
    world.settle()
    assert said(world)[:2] == ("Running", "Running")
    assert len(world.created) == 2


def test_a_pod_that_fails_by_itself_just_before_the_eviction_is_a_failure() -> None:
    world = queued()
    world.admit("one")
    world.settle()
    world.end(world.pods("one")[0], 71, '{"kind":"failure","reason":"Stalled","message":"no step for 300 s"}')
    (job,) = world.jobs("one")
    job["spec"]["suspend"] = True
    world.settle()
    assert world.stage("one")["failures"]["last"]["reason"] == "Stalled"
    world.sleep(10)
    world.settle()
    for pod in world.pods("one"):
        world.end(pod, 143)
    world.settle()
    assert said(world)[:2] == ("Queued", "WaitingForQuota"), "the next attempt waits in the queue as well"
    assert world.stage("one")["attempt"] == 2


def test_suspended_by_its_author_while_it_waits() -> None:
    world = queued()
    world.edit(suspend=True)
    world.settle()
    assert world.jobs("one") == []
    assert said(world)[:2] == ("Suspended", "Suspended")
    world.edit(suspend=False, queueName="team-b")
    world.settle()
    (job,) = world.jobs("one")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-b"
    assert said(world)[:2] == ("Queued", "WaitingForQuota")


def test_a_job_that_someone_suspends_without_a_queue_says_so() -> None:
    world = World(spec())
    world.settle()
    world.evict("prepare")
    world.settle()
    assert said(world) == ("Preparing", "JobSuspended", "False")
    world.end(world.pods("prepare")[0], 143)
    world.admit("prepare")
    world.settle()
    assert said(world)[:2] == ("Preparing", "Preparing")
    assert world.status["prepare"]["attempt"] == 1
