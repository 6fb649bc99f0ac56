"""The walk from acceptance to the end, in a simulated cluster."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.unit.finetunejob.world import DIGEST, World, spec, stage

from trimtab_operator.core.kube import FINETUNEJOB, Ref
from trimtab_operator.core.refusals import Refusal
from trimtab_trainer.config import Progress

ROLLOUT = {"from": "one", "endpointName": "chat", "create": {"servedModelName": "chat", "replicas": 2}}


def unschedulable(message: str) -> dict[str, str]:
    return {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}


def prepared(*stages: dict[str, Any], **fields: Any) -> World:
    world = World(spec(*stages, **fields))
    world.settle()
    world.succeed("prepare")
    world.settle()
    return world


def roles(world: World) -> set[str]:
    """Stages whose Job exists and is not over."""
    return {
        job["metadata"]["labels"]["trimtab.dev/stage"]
        for job in world.jobs()
        if "status" not in job and "trimtab.dev/stage" in job["metadata"]["labels"]
    }


def test_one_stage_runs_to_complete() -> None:
    world = World(spec())
    world.settle()
    assert world.status["phase"] == "Preparing"
    world.succeed("prepare")
    world.settle()
    assert world.status["phase"] == "Running"
    assert world.stage("one")["prepared"] == {
        "digest": DIGEST,
        "records": 10,
        "dropped": 0,
        "truncated": 0,
        "tokens": 100,
    }
    needs = {"steps": 20, "acceleratorMemory": "1024Mi", "seconds": 5, "tokensPerSecond": 20}
    assert world.stage("one")["estimate"] == needs
    world.succeed("one")
    world.settle()
    assert (world.status["phase"], world.status["progressText"]) == ("Succeeded", "100%")
    assert world.condition("Complete")["status"] == "True"
    assert "Failed" not in {c["type"] for c in world.status["conditions"]}
    folder = f"pvc://models/m/job-{world.owner['metadata']['uid'][:8]}/one/model"
    assert world.stage("one")["artifact"] == {"uri": folder, "digest": DIGEST}
    assert len(world.status_writes) <= 6


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"step": 600, "bestStep": 400}, "stopped early at step 600 of 1000: validation best at 400"),
        ({"step": 1000, "bestStep": 900}, "validation best at step 900 of 1000, whose weights are the result"),
        ({"step": 1000}, ""),
    ],
)
def test_a_stage_that_stopped_early_is_done_and_says_whose_weights_it_has(steps: dict[str, int], message: str) -> None:
    world = World(spec(stage("one")))
    world.settle()
    world.succeed("prepare")
    world.settle()
    report = json.dumps({"kind": "train", "digest": DIGEST, "totalSteps": 1000, **steps})
    for pod in world.pods("one"):
        world.end(pod, 0, report)
    world.settle()
    assert (world.status["phase"], world.status["progressText"]) == ("Succeeded", "100%")
    assert (world.stage("one")["phase"], world.stage("one").get("message", "")) == ("Succeeded", message)
    assert world.stage("one")["progress"]["step"] == steps["step"]


def test_stages_start_when_what_they_start_from_is_done_and_side_by_side() -> None:
    world = prepared(stage("base"), stage("left", source="base"), stage("right", source="base"), stage("own"))
    assert roles(world) == {"base", "own"}
    world.succeed("base")
    world.settle()
    assert roles(world) == {"left", "right", "own"}
    assert world.status["progressText"] == "25%"
    assert world.config("left")["model"] == world.stage("base")["artifact"]
    assert "model" not in world.config("own"), "random weights"
    for role in ("left", "right", "own"):
        world.succeed(role)
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_failed_stage_fails_the_job_and_stops_the_others() -> None:
    world = prepared(stage("one"), stage("other"), defaults={"retries": 0})
    world.end(world.pods("one")[0], 137, reason="OOMKilled")
    world.settle()
    failed = world.condition("Failed")
    assert (world.status["phase"], failed["reason"]) == ("Failed", "OOMKilled")
    assert failed["message"].startswith("stage one, attempt 1: pod ")
    assert not world.jobs("other"), "accelerators are freed"
    assert world.jobs("one"), "the failed pod and its log stay"
    final = world.status
    for child in [*world.jobs(), *world.pods()]:
        world.objects.pop(Ref(child["kind"], "team", child["metadata"]["name"]))
    world.settle()
    assert world.status is final
    assert len(world.created) == 3


def test_bad_data_is_said_before_anything_trains() -> None:
    world = World(spec())
    world.settle()
    report = '{"kind":"failure","reason":"BadData","message":"text.jsonl: line 17: not UTF-8; save it as UTF-8"}'
    world.end(world.pods("prepare")[0], 65, report)
    world.settle()
    assert (
        world.condition("Failed")["message"] == "prepare, attempt 1: text.jsonl: line 17: not UTF-8; save it as UTF-8"
    )
    assert world.condition("Prepared")["reason"] == "BadData"
    assert len(world.created) == 1


def test_rollout_creates_the_endpoint_and_waits_until_it_serves() -> None:
    world = prepared(rollout=ROLLOUT)
    world.succeed("one")
    world.settle()
    endpoint = world.objects[Ref("ModelEndpoint", "team", "chat")]
    artifact = world.stage("one")["artifact"]
    source = {"jobName": "job", "jobUID": world.owner["metadata"]["uid"]}
    assert endpoint["spec"] == {"servedModelName": "chat", "replicas": 2, "model": {**artifact, "source": source}}
    assert "ownerReferences" not in endpoint["metadata"], "what is served outlives the job"
    assert (world.status["phase"], world.status["reason"]) == ("Running", "RollingOut")
    serves(endpoint, "sha256:" + "0" * 64)
    world.settle()
    assert world.status["phase"] == "Running", "ready with another model is not ready"
    serves(endpoint, artifact["digest"])
    del endpoint["status"]["url"]
    world.settle()
    assert world.status["phase"] == "Running", "its address is not known yet, and would never be written"
    endpoint["status"]["url"] = "http://chat/v1"
    world.settle()
    assert world.status["phase"] == "Succeeded"
    assert world.status["endpoint"] == {"name": "chat", "url": "http://chat/v1"}
    assert len(world.status_writes) <= 7
    endpoint["spec"]["model"] = {"uri": "pvc://models/newer", "digest": DIGEST}
    world.settle()
    assert endpoint["spec"]["model"]["uri"] == "pvc://models/newer", "a finished job never writes again"


def test_endpoint_is_told_of_a_result_only_once_the_status_has_it() -> None:
    world = prepared(rollout=ROLLOUT)
    world.succeed("one")
    plan = world.plan()
    assert plan.status is not None
    assert "artifact" in plan.status["stages"][0]
    assert plan.actions == ()
    world.settle()
    assert world.of_kind("ModelEndpoint")


def test_rollout_changes_only_the_model_of_a_living_endpoint() -> None:
    world = prepared(rollout=ROLLOUT)
    endpoint = endpoint_of(world, replicas=5)
    world.succeed("one")
    world.settle()
    assert endpoint["spec"]["replicas"] == 5
    assert endpoint["spec"]["model"]["source"]["jobUID"] == world.owner["metadata"]["uid"]


def test_rollout_overtaken_by_another_model_does_not_fight() -> None:
    world = prepared(rollout=ROLLOUT)
    endpoint = endpoint_of(world)
    world.succeed("one")
    world.settle()
    endpoint["spec"]["model"] = {"uri": "pvc://models/newer", "digest": DIGEST}
    world.settle()
    assert world.condition("Failed")["reason"] == "RolloutSuperseded"
    assert endpoint["spec"]["model"]["uri"] == "pvc://models/newer"


def test_result_that_was_served_and_then_replaced_counts_as_rolled_out() -> None:
    world = prepared(rollout=ROLLOUT)
    endpoint = endpoint_of(world)
    world.succeed("one")
    world.settle()
    endpoint["spec"]["model"] = {"uri": "pvc://models/newer", "digest": DIGEST}
    uid = world.owner["metadata"]["uid"]
    endpoint["status"] = {"url": "http://chat/v1", "history": [{"digest": DIGEST, "jobUID": uid}]}
    world.settle()
    assert world.status["phase"] == "Succeeded"


def test_degraded_endpoint_is_said() -> None:
    world = prepared(rollout=ROLLOUT)
    endpoint = endpoint_of(world)
    world.succeed("one")
    world.settle()
    endpoint["status"] = {"conditions": [condition("Degraded", "CorruptArtifact", "model.safetensors: bytes differ")]}
    world.settle()
    rolled_out = world.condition("RolledOut")
    assert (rolled_out["status"], rolled_out["reason"]) == ("False", "EndpointDegraded")
    assert "bytes differ" in rolled_out["message"]
    assert world.condition("Progressing")["status"] == "False"


def test_deadline_counts_running_time_only() -> None:
    world = prepared(activeDeadlineSeconds=100)
    world.sleep(60)
    world.edit(suspend=True)
    world.settle()
    world.end(world.pods("one")[0], 75)
    world.settle()
    world.sleep(10_000)
    world.edit(suspend=False)
    world.settle()
    assert world.status["phase"] == "Running"
    assert world.plan().requeue_after == pytest.approx(40)
    world.sleep(39)
    world.settle()
    assert world.status["phase"] == "Running"
    world.sleep(1)
    world.settle()
    assert world.condition("Failed")["reason"] == "DeadlineExceeded"
    assert not world.jobs("one")


def test_time_in_the_queue_is_not_running_time() -> None:
    world = prepared(activeDeadlineSeconds=100)
    world.pods("one")[0]["status"] = {"phase": "Pending", "conditions": [unschedulable("0/3 nodes: no gpu")]}
    world.settle()
    assert "activeSince" not in world.status
    world.sleep(10_000)
    world.settle()
    assert world.status["phase"] == "Queued"


def test_finished_job_is_deleted_after_its_time_to_live() -> None:
    world = prepared(ttlSecondsAfterFinished=60, rollout=ROLLOUT)
    endpoint = endpoint_of(world)
    world.succeed("one")
    world.settle()
    serves(endpoint, DIGEST)
    world.settle()
    assert world.plan().requeue_after == pytest.approx(60)
    world.sleep(59)
    world.settle()
    assert world.get(FINETUNEJOB, "team", "job") is not None
    world.sleep(1)
    world.reconcile()
    assert {ref.kind for ref in world.objects} == {"ModelEndpoint", "PersistentVolumeClaim"}


def waiting(reason: str, message: str = "", image: str = "") -> dict[str, Any]:
    return {"containerStatuses": [{"image": image, "state": {"waiting": {"reason": reason, "message": message}}}]}


@pytest.mark.parametrize(
    ("pod", "seconds", "reason", "words"),
    [
        ({"conditions": [unschedulable("0/3 nodes are available")]}, 0, "Unschedulable", "0/3 nodes are available"),
        (waiting("ImagePullBackOff", image="nope:1"), 0, "ImagePullFailed", "'nope:1' can't be pulled"),
        (waiting("CreateContainerConfigError", 'secret "x" not found'), 0, "CreateFailed", 'secret "x" not found'),
        (waiting("ContainerCreating"), 300, "SlowStart", "kubectl describe pod"),
        (None, 60, "NoPod", "kubectl describe job"),
    ],
)
def test_pod_that_cannot_start_shows_as_the_reason(
    pod: dict[str, Any] | None, seconds: int, reason: str, words: str
) -> None:
    world = prepared()
    (live,) = world.pods("one")
    if pod is None:
        world.objects.pop(Ref("Pod", "team", live["metadata"]["name"]))
    else:
        live["status"] = {"phase": "Pending", **pod}
    world.settle()
    if seconds:
        assert world.status["phase"] == "Running"
        assert world.plan().requeue_after == pytest.approx(seconds)
        world.sleep(seconds)
        world.settle()
    progressing = world.condition("Progressing")
    assert (world.status["phase"], world.status["reason"]) == ("Queued", reason)
    assert (progressing["status"], progressing["reason"]) == ("False", reason)
    assert words in progressing["message"]
    assert words in world.stage("one")["message"]


def test_image_pull_messages_alternate_but_the_status_does_not() -> None:
    world = prepared()
    (pod,) = world.pods("one")
    cause = 'failed to resolve reference "docker.io/library/nope:1": not found'
    told = {"ErrImagePull": cause, "ImagePullBackOff": f'Back-off pulling image "nope:1": ErrImagePull: {cause}'}
    for reason, message in told.items():
        waiting = {"reason": reason, "message": message}
        pod["status"] = {"phase": "Pending", "containerStatuses": [{"image": "nope:1", "state": {"waiting": waiting}}]}
        world.settle()
    assert world.condition("Progressing")["message"].endswith(f"for a private one: {cause}")
    pod["status"]["containerStatuses"][0]["state"]["waiting"] = {"reason": "ErrImagePull", "message": cause}
    assert not world.reconcile()


def test_refusal_is_said_in_the_servers_words() -> None:
    world = World(spec())
    world.settle()
    world.refused = Refusal(Ref("Job", "team", "job-prepare-1"), "Forbidden", "exceeded quota: pods=10")
    world.settle()
    progressing = world.condition("Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "Forbidden")
    assert progressing["message"] == "Job job-prepare-1: exceeded quota: pods=10"
    world.refused = None
    world.settle()
    assert world.condition("Progressing")["status"] == "True"


def test_progress_shows_and_outlives_a_restart_of_the_operator() -> None:
    world = prepared(stage("one"), stage("two", source="one"))
    answer = Progress(step=5, total_steps=20, epoch="0.5", tokens_per_second=900, estimated_remaining_seconds=120)
    (target,) = world.controller.board.targets(world.key)
    assert world.controller.board.put(target, answer)
    world.settle()
    assert world.stage("one")["progress"]["step"] == 5
    assert (world.status["progressText"], world.status["remainingText"]) == ("12%", "2m")
    assert world.status["progress"] == {"stage": "one", "percent": 12, "estimatedRemainingSeconds": 120}
    world.controller = type(world.controller)()
    assert not world.reconcile(), "at a restart nothing is written"


def test_what_remains_is_a_guess_until_the_stage_has_measured() -> None:
    """Before the first step prepare's estimate, then the stage's own guess, each with the speed that it assumes."""
    world = prepared(stage("one"))
    assert world.stage("one")["estimate"]["tokensPerSecond"] == 20
    said = [(world.status["remainingText"], world.status["progress"])]
    (target,) = world.controller.board.targets(world.key)
    told = Progress(step=5, total_steps=20, epoch="0.5", tokens_per_second=900)
    for news in (
        told,
        told.model_copy(update={"estimated_remaining_seconds": 90, "guessed_at_tokens_per_second": 880}),
        told.model_copy(update={"estimated_remaining_seconds": 80}),
    ):
        world.controller.board.put(target, news)
        world.settle()
        said.append((world.status["remainingText"], world.status["progress"]))
    guess = {"stage": "one", "percent": 0, "estimatedRemainingSeconds": 5, "guessedAtTokensPerSecond": 20}
    assert said == [
        ("~5s", guess),
        ("~5s", {**guess, "percent": 25}),
        ("~90s", {**guess, "percent": 25, "estimatedRemainingSeconds": 90, "guessedAtTokensPerSecond": 880}),
        ("80s", {"stage": "one", "percent": 25, "estimatedRemainingSeconds": 80}),
    ]


def test_restart_at_any_point_writes_the_same() -> None:
    """Each write is followed by a new operator; the children and the statuses are those of an undisturbed run."""
    calm, restless = World(spec(rollout=ROLLOUT)), World(spec(rollout=ROLLOUT))
    for role in ("prepare", "one"):
        for world in (calm, restless):
            while world.reconcile():
                if world is restless:
                    world.controller = type(world.controller)()
            world.succeed(role)
    for world in (calm, restless):
        world.settle()
        serves(world.objects[Ref("ModelEndpoint", "team", "chat")], DIGEST)
        world.settle()
    assert calm.status_writes == restless.status_writes
    assert calm.objects.keys() == restless.objects.keys()


def serves(endpoint: dict[str, Any], digest: str) -> None:
    revision = {"revision": "a", "digest": digest, "uri": "pvc://models/m", "ready": 2}
    ready = condition("Ready", "Serving", "")
    endpoint["status"] = {"url": "http://chat/v1", "stable": revision, "conditions": [ready]}


def endpoint_of(world: World, **more: Any) -> dict[str, Any]:
    return world.add(
        {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "ModelEndpoint",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": {"servedModelName": "chat", "model": {"uri": "job://old/one"}, **more},
        }
    )


def condition(kind: str, reason: str, message: str) -> dict[str, str]:
    times = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"type": kind, "status": "True", "reason": reason, "message": message, **times}
