"""Revisions come and go behind one Service."""

import json

import kubernetes_validate
from tests.unit.modelendpoint.world import NOW, World, digest, model

from trimtab_operator.core.actions import Apply, Delete
from trimtab_operator.core.kube import Ref
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.settings import ServiceAddress, Settings


def serving(letter: str = "a", **spec: object) -> World:
    world = World(model(letter), **spec)
    world.settle()
    world.ready(letter)
    world.settle()
    return world


def test_first_revision_serves_once_all_replicas_are_ready() -> None:
    world = World(model("a"), replicas=2)
    world.settle()
    assert world.condition("Ready")["status"] == "False"
    world.ready("a", 1)
    world.settle()
    assert "stable" not in world.status
    world.ready("a")
    world.settle()
    assert world.condition("Ready")["status"] == "True"
    assert world.status["phase"] == "Healthy"
    assert world.status["stable"]["digest"] == digest("a")
    assert world.status["stable"]["ready"] == 2
    assert world.status["url"] == "http://chat.team.svc.cluster.local:8000/v1"
    assert world.status["history"] == [{"digest": digest("a")}]


def test_service_switches_only_when_the_new_revision_is_ready_then_the_old_one_goes() -> None:
    world = serving("a", replicas=2)
    world.edit(model=model("b", job="u-1"))
    world.settle()
    assert world.selected() == "a"
    assert world.status["next"]["digest"] == digest("b")
    world.ready("b", 1)
    world.settle()
    assert world.selected() == "a"
    assert world.deployment("a") is not None
    world.ready("b")
    world.settle()
    assert world.selected() == "b"
    assert world.deployment("a") is None
    assert "next" not in world.status
    assert world.status["history"][0] == {"digest": digest("b"), "jobUID": "u-1"}
    assert len(world.of_kind("ConfigMap")) == 1


def test_old_deployment_is_kept_until_the_service_has_switched() -> None:
    world = serving("a")
    world.edit(model=model("b"))
    world.settle()
    world.ready("b")
    while world.selected() == "a":
        assert world.deployment("a") is not None
        world.reconcile()
    assert world.deployment("a") is not None


def test_new_engine_options_roll_the_same_deployment() -> None:
    world = serving("a")
    before = world.deployment("a")
    assert before is not None
    config = before["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
    world.edit(engine={"maxModelLen": 512})
    world.settle()
    after = world.deployment("a")
    assert after is not None
    name = after["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"]
    assert name != config
    assert {o["metadata"]["name"] for o in world.of_kind("ConfigMap")} == {name, config}
    world.ready("a")
    world.settle()
    text = world.objects[Ref("ConfigMap", "team", name)]["data"]["serve.json"]
    assert json.loads(text)["engine"]["maxModelLen"] == 512
    assert [o["metadata"]["name"] for o in world.of_kind("ConfigMap")] == [name]


def test_model_of_a_job_is_waited_for_and_pinned() -> None:
    world = World({"uri": "job://train/sft"})
    world.settle()
    assert world.condition("Progressing")["reason"] == "WaitingForArtifact"
    assert not world.of_kind("Deployment")
    stages = [{"name": "sft", "pretrain": {"data": [{"uri": "pvc://models/text.txt"}]}}]
    spec = {"model": {"uri": "pvc://models/base"}, "artifacts": {"uri": "pvc://models/m"}, "stages": stages}
    artifact = {"uri": "pvc://models/m/train-1/sft/model", "digest": digest("c")}
    job = world.add("FineTuneJob", "train", spec=spec, status={"stages": [{"name": "sft", "artifact": artifact}]})
    assert world.controller.interested(job) == [world.key]
    world.settle()
    assert world.deployment("c") is not None
    assert world.status["next"]["uri"] == artifact["uri"]
    del world.objects[Ref("FineTuneJob", "team", "train")]
    world.ready("c")
    world.settle()
    assert world.status["stable"]["digest"] == digest("c")
    assert world.condition("Progressing")["reason"] == "AtRest"


def test_corrupt_artifact_is_named_and_the_old_revision_goes_on_serving() -> None:
    world = serving("a")
    world.edit(model=model("b"))
    world.settle()
    message = json.dumps({"kind": "failure", "reason": "CorruptArtifact", "message": "model.safetensors: bytes differ"})
    crashed = {"terminated": {"exitCode": 66, "reason": "Error", "message": message}}
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}
    world.pod("b", containerStatuses=[{"name": "vllm", "state": waiting, "lastState": crashed}])
    world.settle()
    degraded = world.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "CorruptArtifact")
    assert "model.safetensors" in degraded["message"]
    assert world.condition("Ready")["status"] == "True"
    assert world.selected() == "a"
    world.pod("b", containerStatuses=[{"name": "vllm", "state": {"running": {}}, "lastState": crashed}])
    assert not world.reconcile(), "one cause, one message, whatever the back-off does"


def test_nothing_is_proven_with_zero_replicas() -> None:
    world = serving("a")
    world.edit(model=model("b"), replicas=0)
    world.settle()
    world.ready("a")
    world.ready("b")
    world.settle()
    assert world.selected() == "a"
    assert world.condition("Ready")["reason"] == "ScaledToZero"
    world.edit(replicas=1)
    world.settle()
    world.ready("b")
    world.settle()
    assert world.selected() == "b"


def test_refusal_is_said_and_serving_goes_on() -> None:
    world = serving("a")
    world.refused = Refusal(Ref("Deployment", "team", "chat-x"), "Forbidden", "exceeded quota: gpus")
    world.settle()
    progressing = world.condition("Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "Forbidden")
    assert "exceeded quota" in progressing["message"]
    assert world.condition("Ready")["status"] == "True"


def test_path_that_leaves_the_claim_is_refused() -> None:
    world = World({"uri": "pvc://models/../../etc", "digest": digest("a")})
    world.settle()
    assert world.condition("Progressing")["reason"] == "BadName"
    assert not world.of_kind("Deployment")


def test_address_without_dns() -> None:
    world = World(model("a"), Settings(service_address=ServiceAddress.CLUSTER_IP))
    world.settle()
    assert world.status["url"] == "http://10.96.0.7:8000/v1"


def test_pods_fit_the_restricted_standard_and_drain() -> None:
    world = serving("a")
    deployment = world.deployment("a")
    assert deployment is not None
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == 15
    assert pod["terminationGracePeriodSeconds"] == 15 + 30 + 15
    claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [{"claimName": "models", "readOnly": True}]
    for kind, version in (("Deployment", "apps/v1"), ("Service", "v1"), ("ConfigMap", "v1")):
        for obj in world.of_kind(kind):
            written = {key: obj[key] for key in obj if key != "status"} | {"apiVersion": version}
            kubernetes_validate.validate(written, "1.30", strict=True)


def test_spec_that_the_schema_lets_pass_is_said_to_be_wrong() -> None:
    world = serving("a")
    world.edit(resources={"limits": {"cpu": -1}})
    world.settle()
    progressing = world.condition("Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "InvalidSpec")
    assert "spec.resources.limits.cpu" in progressing["message"]
    assert world.condition("Ready")["status"] == "True"


def test_old_pods_stay_while_the_service_still_sends_them_requests() -> None:
    world = serving("a")
    world.edit(model=model("b"))
    world.settle()
    world.ready("b")
    while world.status["stable"]["digest"] != digest("b"):
        world.reconcile()
    world.of_kind("Service")[0]["spec"]["selector"]["trimtab.dev/revision"] = "a" * 12
    plan = world.controller.plan(world.owner, world.controller.observe(world, world.owner), world.settings, NOW)
    assert not any(isinstance(action, Delete) for action in plan.actions)


def test_a_deployment_that_lost_its_label_gets_it_back() -> None:
    world = serving()
    (deployment,) = world.of_kind("Deployment")
    del deployment["metadata"]["labels"]["trimtab.dev/revision"]
    plan = world.controller.plan(world.owner, world.controller.observe(world, world.owner), world.settings, NOW)
    assert not [action for action in plan.actions if isinstance(action, Delete)]
    (desired,) = [a.obj for a in plan.actions if isinstance(a, Apply) and a.obj["kind"] == "Deployment"]
    assert desired["metadata"]["labels"]["trimtab.dev/revision"] == "a" * 12


def test_pods_that_a_quota_refuses_are_told_and_a_new_pod_name_is_no_news() -> None:
    world = World(model("a"))
    world.settle()
    (deployment,) = world.of_kind("Deployment")
    for suffix in ("x7k2p", "abcde"):
        words = f'pods "chat-{suffix}" is forbidden: exceeded quota: gpus, requested: nvidia.com/gpu=1'
        failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": words}
        deployment.setdefault("status", {})["conditions"] = [failure]
        written = world.reconcile()
        assert written is (suffix == "x7k2p")
    degraded = world.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "QuotaExceeded")
    name = deployment["metadata"]["name"]
    told = f"Deployment {name} gets no pod: exceeded quota: gpus, requested: nvidia.com/gpu=1"
    assert degraded["message"] == told
    deployment["status"]["conditions"] = []
    world.settle()
    assert world.condition("Degraded")["status"] == "False"
