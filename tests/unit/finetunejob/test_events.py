"""Events tell of transitions, once, and a Warning says what to do."""

from __future__ import annotations

from tests.unit.finetunejob.world import World, spec, stage

from trimtab_operator.core.actions import EventType


def told(world: World) -> list[tuple[str, str]]:
    """What each plan until rest would emit: reason and message of what is new."""
    found = []
    for _ in range(50):
        notes = world.plan().events
        found += [(note.type, note.reason, note.message) for note in notes]
        if not world.reconcile():
            break
    return [(f"{'!' * (type_ is EventType.WARNING)}{reason}", message) for type_, reason, message in found]


def test_a_stuck_pod_is_told_once_with_a_hint_and_told_again_when_the_cause_changes() -> None:
    world = World(spec())
    told(world)
    world.succeed("prepare")
    told(world)
    (pod,) = world.pods("one")
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes fit"}
    pod["status"] = {"phase": "Pending", "conditions": [scheduled]}
    name = pod["metadata"]["name"]
    words = f"stage one: pod {name}: 0/3 nodes fit Hint: Free or add capacity."
    assert told(world) == [("!Unschedulable", words)]
    scheduled["message"] = "0/4 nodes fit"
    assert told(world) == [], "the status says so; an Event for each word would be noise"
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "x" not found'}
    pod["status"] = {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}
    assert [reason for reason, _ in told(world)] == ["!CreateFailed"]
    pod["status"] = {"phase": "Running"}
    assert told(world) == []


def test_a_failure_and_the_end_have_hints() -> None:
    world = World(spec(stage(retries=0)))
    told(world)
    world.succeed("prepare")
    told(world)
    world.end(world.pods("one")[0], 71)
    (failure, words), (end, last) = told(world)
    assert (failure, end) == ("!Stalled", "!Stalled")
    assert words.startswith("stage one, attempt 1: pod ")
    assert words.endswith("Hint: The rank logs have all stacks.")
    assert last.endswith("Hint: The rank logs have all stacks.")


def test_waiting_in_a_queue_is_no_warning() -> None:
    world = World(spec(queueName="team-a"))
    told(world)
    world.succeed("prepare")
    assert "WaitingForQuota" in [reason for reason, _ in told(world)]
