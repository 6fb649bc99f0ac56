"""How attempts end and when the next one starts, in the simulated cluster."""

from __future__ import annotations

import json

import pytest
from tests.unit.finetunejob.world import START, World, spec, stage

from trimtab_operator.core.pods import Ended, PodView
from trimtab_operator.finetunejob.attempts import Failed, Interrupted, outcome, retry_delay
from trimtab_operator.finetunejob.observe import JobView


def training(*stages: dict[str, object], **fields: object) -> World:
    """A job whose stages train for the first time."""
    world = World(spec(*stages, **fields))
    world.settle()
    world.succeed("prepare")
    world.settle()
    return world


def attempt(world: World, role: str = "one") -> int:
    """The attempt whose Job exists."""
    (job,) = world.jobs(role)
    return int(job["metadata"]["labels"]["trimtab.dev/attempt"])


def end(world: World, code: int, message: str = "", reason: str = "Error", *, disrupted: bool = False) -> None:
    world.end(world.pods("one")[0], code, message, reason, disrupted=disrupted)
    world.settle()


def failure(reason: str, message: str) -> str:
    return json.dumps({"kind": "failure", "reason": reason, "message": message})


@pytest.mark.parametrize(
    ("code", "reason"), [(64, "BadConfiguration"), (65, "BadData"), (66, "InputMissing"), (70, "TrainingFailed")]
)
def test_what_would_fail_again_is_not_retried(code: int, reason: str) -> None:
    world = training()
    end(world, code, failure(reason, "data.jsonl: line 17: 'messages' is missing; add it"))
    failed = world.condition("Failed")
    assert (world.status["phase"], failed["reason"]) == ("Failed", reason)
    assert failed["message"] == "stage one, attempt 1: data.jsonl: line 17: 'messages' is missing; add it"
    world.sleep(10_000)
    world.settle()
    assert len(world.created) == 2


@pytest.mark.parametrize("code", [1, 71, 74, 137, 139, 143])
def test_what_may_pass_is_retried_three_times_with_growing_pauses(code: int) -> None:
    world = training()
    for number, pause in enumerate((10, 20, 40), start=1):
        assert attempt(world) == number
        end(world, code)
        assert world.stage("one")["failures"]["count"] == number
        assert world.condition("Progressing")["reason"] == "Retrying"
        world.sleep(pause - 1)
        world.settle()
        assert attempt(world) == number, "the old pods and their logs stay until then"
        world.sleep(1)
        world.settle()
    end(world, code)
    assert world.status["phase"] == "Failed"
    assert world.stage("one")["failures"]["count"] == 4
    assert world.stage("one")["failures"]["last"]["exitCode"] == code


def test_retry_pauses_are_capped() -> None:
    assert retry_delay(100) == 300


def test_preemption_is_free_but_never_hot() -> None:
    world = training()
    for number in range(1, 7):
        assert attempt(world) == number
        end(world, 75, failure("Preempted", "saved"), disrupted=number % 2 == 0)
        assert attempt(world) == number
        world.sleep(1)
        world.settle()
    assert "failures" not in world.stage("one")


def test_crash_on_a_disrupted_node_is_free() -> None:
    world = training()
    end(world, 137, disrupted=True)
    world.sleep(1)
    world.settle()
    assert attempt(world) == 2
    assert "failures" not in world.stage("one")


def test_deleted_job_starts_again_for_free_once_its_pods_are_gone() -> None:
    world = training()
    pod = world.pods("one")[0]
    world.remove(world.jobs("one")[0])
    world.settle()
    assert not world.jobs("one")
    assert pod["metadata"]["name"] in world.stage("one")["message"]
    world.end(pod, 75)
    world.settle()
    assert attempt(world) == 2
    assert "failures" not in world.stage("one")


def test_first_pod_to_fail_is_the_cause() -> None:
    def pod(index: int, code: int, second: int, reason: str = "Error") -> PodView:
        ended = Ended(code, reason, finished_at=f"2026-01-01T00:00:{second:02d}Z")
        return PodView(f"pod-{index}", index=index, phase="Failed", node=f"node-{index}", ended=ended)

    def cause(*pods: PodView) -> object:
        found = outcome(1, JobView("job", "u", "1", "one", 1), pods, START)
        return found.failure.node if isinstance(found, Failed) else found

    assert cause(pod(0, 70, 9), pod(1, 137, 7, "OOMKilled"), pod(2, 75, 8)) == "node-1"
    assert cause(pod(0, 70, 7), pod(1, 137, 7), pod(2, 75, 7)) == "node-1", "of one second: the signal"
    assert cause(pod(0, 143, 7), pod(1, 70, 7), pod(2, 75, 7)) == "node-1", "SIGTERM is a consequence"
    assert cause(pod(0, 75, 5), pod(1, 74, 7)) == Interrupted("Preempted", "2026-01-01T00:00:05Z")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("", "ReportMissing"),
        ("done!", "ReportInvalid"),
        ('{"kind":"train","digest":"sha256:12","step":1,"totalSteps":1}', "ReportInvalid"),
        ('{"kind":"prepare","stages":[]}', "ReportInvalid"),
        ('{"kind":"train","digest":"sha256:' + "a" * 64 + '","step":-1,"totalSteps":1}', "ReportInvalid"),
    ],
)
def test_good_end_without_a_good_report_fails_at_once(message: str, reason: str) -> None:
    world = training()
    end(world, 0, message)
    assert world.condition("Failed")["reason"] == reason
    assert "artifact" not in world.stage("one")
    assert len(world.created) == 2


def test_finished_job_waits_for_the_pod_that_another_watch_brings() -> None:
    world = training()
    pod = world.pods("one")[0]
    world.end(pod, 0, world.report("one"))
    late, pod["status"] = pod["status"], {"phase": "Running"}
    world.settle()
    assert world.status["phase"] == "Running"
    pod["status"] = late
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_finished_job_whose_pod_never_shows_has_no_report() -> None:
    world = training()
    pod = world.pods("one")[0]
    world.end(pod, 0, world.report("one"))
    world.remove(pod)
    world.settle()
    assert world.status["phase"] == "Running"
    world.sleep(30)
    world.settle()
    assert world.condition("Failed")["reason"] == "ReportMissing"


def test_lost_status_takes_the_next_number_and_removes_the_stray() -> None:
    world = training()
    pod = world.pods("one")[0]
    one = world.stage("one")
    world.owner["status"]["stages"] = [{"name": "one", "prepared": one["prepared"], "estimate": one["estimate"]}]
    world.settle()
    assert not world.jobs("one")
    world.end(pod, 75)
    world.settle()
    assert attempt(world) == 2


def test_suspend_ends_the_attempt_and_resuming_takes_the_next() -> None:
    world = training()
    pod = world.pods("one")[0]
    world.edit(suspend=True)
    world.settle()
    assert not world.jobs("one")
    assert (world.condition("Suspended")["status"], world.condition("Suspended")["reason"]) == ("False", "Suspending")
    world.end(pod, 75)
    world.settle()
    assert world.status["phase"] == "Suspended"
    assert world.condition("Suspended")["status"] == "True"
    world.edit(suspend=False)
    world.settle()
    assert world.status["phase"] == "Running"
    assert attempt(world) == 2
    assert "failures" not in world.stage("one")


def test_while_suspended_the_shape_may_change_and_nothing_is_prepared_again() -> None:
    world = training()
    before = world.config("one")
    world.edit(suspend=True)
    world.settle()
    world.end(world.pods("one")[0], 75)
    world.settle()
    world.edit(stages=[stage(processesPerNode=4)], suspend=False)
    world.settle()
    after = world.config("one")
    assert (before.get("processesPerNode", 1), after["processesPerNode"]) == (1, 4)
    assert (before["attempt"], after["attempt"]) == (1, 2)
    same = before.keys() - {"attempt", "processesPerNode", "threads"}
    assert {key: before[key] for key in same} == {key: after[key] for key in same}
    assert len(world.jobs("prepare")) == 1


def test_hostile_last_words_are_shown_harmless() -> None:
    world = training()
    end(world, 65, failure("BadData", "\x1b[2J" + "x" * 2900))
    message = world.stage("one")["failures"]["last"]["message"]
    assert "\x1b" not in message
    assert len(message) == 1024
