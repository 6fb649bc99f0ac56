"""What the operator makes of a spec, in a few lives that bring out what fields do: in success, failure and delay."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from tests.unit.finetunejob.test_exploration import serve
from tests.unit.finetunejob.world import World as JobWorld
from tests.unit.modelendpoint.world import World as EndpointWorld

from trimtab_operator.core.kube import Object, Ref

Outcome = dict[str, Any]
_CLAIM = re.compile(r'"pvc://([a-z0-9][-a-z0-9.]*)')


def outcome_of(obj: Object) -> Outcome:
    """All that comes of an object, alike for alike specs."""
    if obj["kind"] == "ModelEndpoint":
        world = endpoint_world(obj)
        return {"served": state(world), "stuck": state(endpoint_world(obj, ready=False))}
    lives = {"success": success, "failure": failure, "endless": endless, "pending": pending}
    return {name: live(obj) for name, live in lives.items()}


def job_world(obj: Object) -> JobWorld:
    """A cluster with the job and every claim that it names."""
    world = JobWorld(copy.deepcopy(obj["spec"]), name=obj["metadata"]["name"])
    for claim in sorted(set(_CLAIM.findall(json.dumps(obj["spec"])))):
        if claim != "models":
            world.add_claim(claim)
    return world


def success(obj: Object) -> Outcome:
    """Every pod ends well; then the time to live passes."""
    world = job_world(obj)
    run(world)
    ended = state(world)
    return {**ended, "expires in": world.plan().requeue_after if world.key in world.objects else 0}


def run(world: JobWorld) -> None:
    """To the end, well."""
    while not over(world):
        world.settle()
        for role in [job["metadata"]["labels"].get("trimtab.dev/stage", "prepare") for job in world.jobs()]:
            world.succeed(role)
        serve_all(world)


def over(world: JobWorld) -> bool:
    """It has ended, or nothing more will happen."""
    phase = world.status.get("phase") if world.key in world.objects else "Failed"
    running = any(pod["status"]["phase"] == "Running" for pod in world.pods())
    return phase in ("Succeeded", "Failed") or (bool(phase) and not running and not world.reconcile())


def serve_all(world: JobWorld) -> None:
    """The endpoint's controller does its part, whatever its name."""
    for endpoint in world.of_kind("ModelEndpoint"):
        chat = Ref("ModelEndpoint", "team", "chat")
        world.objects[chat] = endpoint
        serve(world)
        if endpoint["metadata"]["name"] != "chat":
            del world.objects[chat]


def failure(obj: Object) -> Outcome:
    """Prepare ends well, and every training pod fails."""
    world = job_world(obj)
    attempts = 0
    while not over(world):
        world.settle()
        world.succeed("prepare")
        running = [pod for pod in world.pods() if pod["status"]["phase"] == "Running"]
        attempts += bool(running)
        for pod in running:
            world.end(pod, 71)
        world.settle()
        world.sleep(400)
    return {"attempts": attempts, **state(world)}


def endless(obj: Object) -> Outcome:
    """Prepare ends well, and the training pods run on; time goes by as the plan asks to be woken."""
    world = job_world(obj)
    world.settle()
    world.succeed("prepare")
    return {"wakes": _wait(world), **state(world)}


def pending(obj: Object) -> Outcome:
    """No pod ever starts."""
    world = job_world(obj)
    world.settle()
    for pod in world.pods():
        pod["status"] = {"phase": "Pending"}
        pod["spec"].pop("nodeName", None)
    return {"wakes": _wait(world), **state(world)}


def _wait(world: JobWorld) -> list[float | None]:
    wakes: list[float | None] = []
    for _ in range(3):
        world.settle()
        if world.key not in world.objects:
            break
        wakes.append(world.plan().requeue_after)
        world.sleep(wakes[-1] or 0)
    return wakes


def endpoint_world(obj: Object, *, ready: bool = True) -> EndpointWorld:
    """The endpoint at rest; or with pods that do not get ready."""
    spec = copy.deepcopy(obj["spec"])
    world = EndpointWorld(spec.pop("model"), **{key: value for key, value in spec.items() if key != "replicas"})
    world.owner["spec"]["replicas"] = spec.get("replicas", 1)
    settle(world, ready=ready)
    return world


def settle(world: EndpointWorld, *, ready: bool = True) -> None:
    """To rest."""
    for _ in range(4):
        world.settle()
        for deployment in world.of_kind("Deployment"):
            replicas = deployment["spec"]["replicas"]
            deployment["status"] = {
                "observedGeneration": deployment["metadata"]["generation"],
                "replicas": replicas,
                "updatedReplicas": replicas,
                "readyReplicas": replicas if ready else 0,
            }
    world.settle()


def state(world: JobWorld | EndpointWorld) -> Outcome:
    """What is there: children as they are desired, and the status; not the spec itself, nor when it was edited."""
    found: Outcome = {}
    for ref, obj in sorted(world.objects.items()):
        if ref != world.key and ref.kind != "PersistentVolumeClaim":
            found[str(ref)] = _plain(obj)
    found["status"] = _plain(world.status) if world.key in world.objects else "deleted"
    if isinstance(world, JobWorld):
        found["created"] = [_plain(job) for job in world.created]
    return found


def _plain(value: Any) -> Any:
    volatile = {"generation", "observedGeneration", "uid", "resourceVersion", "lastTransitionTime", "creationTimestamp"}
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if key not in volatile}
    return [_plain(each) for each in value] if isinstance(value, list) else copy.deepcopy(value)
