"""What an attempt has cost is counted once, when the status records how it ended."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.finetunejob.world import World, spec, stage

GPUS = {"resources": {"limits": {"nvidia.com/gpu": 4}}}


def training(**fields: Any) -> World:
    """A job whose stage runs on two pods of four GPUs each."""
    world = World(spec(stage(nodes=2, **GPUS), **fields))
    world.settle()
    world.succeed("prepare")
    world.settle()
    return world


def rest(world: World) -> None:
    """Whatever follows an end: pods go, time passes."""
    for _ in range(5):
        world.settle()
        world.sleep(1)
        for pod in [pod for pod in world.pods() if "deletionTimestamp" in pod["metadata"]]:
            world.end(pod, 143)
    world.settle()


def test_success_counts_every_pod_for_as_long_as_it_ran() -> None:
    world = training()
    first, second = world.pods("one")
    world.sleep(100)
    world.end(first, 0, world.report("one"))
    world.sleep(20)
    world.end(second, 0)
    rest(world)
    assert world.spent == [("succeeded", 4 * (100 + 120))]


def test_a_failure_counts_once_though_its_retry_waits() -> None:
    world = training()
    world.sleep(60)
    world.end(world.pods("one")[0], 71)
    for _ in range(8):
        world.settle()
        world.sleep(1)
    assert world.spent == [("failed", 2 * 4 * 60)]
    rest(world)
    assert world.stage("one")["attempt"] == 2
    assert len(world.spent) == 1


@pytest.mark.parametrize("how", ["exit 75", "a disruption"])
def test_an_interruption_counts_once(how: str) -> None:
    world = training()
    world.sleep(60)
    world.end(world.pods("one")[0], 75 if how == "exit 75" else 143, disrupted=how != "exit 75")
    rest(world)
    assert world.spent == [("interrupted", 2 * 4 * 60)]
    assert world.stage("one")["attempt"] == 2


def test_another_status_write_does_not_count_it_again() -> None:
    world = training()
    world.sleep(60)
    world.end(world.pods("one")[0], 75)
    world.settle()
    world.edit(ttlSecondsAfterFinished=5)
    world.settle()
    assert world.status["observedGeneration"] == 2
    assert world.spent == [("interrupted", 2 * 4 * 60)]


def test_a_suspension_counts_once() -> None:
    world = training()
    world.sleep(60)
    world.edit(suspend=True)
    rest(world)
    assert world.status["phase"] == "Suspended"
    assert world.spent == [("interrupted", 2 * 4 * 60)]


def test_an_eviction_counts_what_ran_and_the_rest_counts_with_the_end() -> None:
    world = training(queueName="team-a")
    world.sleep(1000)
    world.admit("one")
    world.settle()
    world.sleep(60)
    world.evict("one")
    world.settle()
    for pod in world.pods("one"):
        world.end(pod, 75)
    rest(world)
    assert world.spent == [("interrupted", 2 * 4 * 60)]
    world.admit("one")
    world.settle()
    world.sleep(30)
    world.succeed("one")
    rest(world)
    assert world.spent[1:] == [("succeeded", 2 * 4 * 30)]


def test_what_a_deadline_or_a_bad_report_ends_was_for_nothing() -> None:
    world = training(activeDeadlineSeconds=50)
    world.sleep(50)
    rest(world)
    assert world.spent == [("failed", 2 * 4 * 50)]
    world = training()
    world.sleep(10)
    for pod in world.pods("one"):
        world.end(pod, 0, json.dumps({"kind": "train"}))
    rest(world)
    assert world.condition("Failed")["reason"] == "ReportInvalid"
    assert world.spent == [("failed", 2 * 4 * 10)]


def test_cpu_only_work_costs_nothing() -> None:
    world = World(spec(stage()))
    for role in ("prepare", "one"):
        world.settle()
        world.sleep(60)
        world.succeed(role)
    rest(world)
    assert (world.status["phase"], world.spent) == ("Succeeded", [])
