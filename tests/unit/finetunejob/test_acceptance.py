"""What CEL can't say: refused for good, or waited for, with cause, place and remedy."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.finetunejob.world import World, spec, stage

from trimtab_operator.core.kube import Ref
from trimtab_operator.core.settings import Settings


def data(uri: str) -> dict[str, Any]:
    return {"pretrain": {"data": [{"uri": uri}]}}


POLICY = (
    {"name": "score", "reward": {"data": [{"uri": "pvc://models/pairs.jsonl"}]}},
    {"name": "policy", "ppo": {"rewardFrom": "score", "prompts": [{"uri": "pvc://models/prompts.jsonl"}]}},
)


@pytest.mark.parametrize(
    ("made", "reason", "words"),
    [
        (spec(stage(**data("pvc://Models/x"))), "BadName", "'Models' is not the name of a PersistentVolumeClaim"),
        (spec(stage(**data("pvc://models/../secret"))), "BadName", "'..' is not allowed"),
        (spec(stage(**data("pvc://models/%2e%2e/secret"))), "BadName", "'..' is not allowed"),
        (
            spec(stage(pretrain={"data": [{"uri": "s3://b/x", "secretRef": {"name": "../../etc"}}]})),
            "InvalidSpec",
            "secretRef.name: String should match pattern",
        ),
        (spec(stage(**data("pvc://[models/x"))), "BadName", "'[models' is not the name of a PersistentVolumeClaim"),
        *(
            (spec(stage(**data(f"https://{host}/x.jsonl"))), "HostNotAllowed", "expected https://HOST/PATH")
            for host in ("[::1", "a_b", "%31%32%37.0.0.1", "\uff11\uff12\uff17.0.0.1", "host:99999", "-")
        ),
        *(
            (spec(stage(**data(f"https://{host}/x.jsonl"))), "HostNotAllowed", "name the server that has the file")
            for host in (
                *(
                    "localhost",
                    "LOCALHOST.",
                    "a.localhost",
                    "127.0.0.1",
                    "127.1",
                    "2130706433",
                    "0x7f000001",
                    "0177.0.0.1",
                ),
                *("0.0.0.0", "0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[0:0:0:0:0:ffff:7f00:1]", "127.0.0.1:8443"),
                *("169.254.169.254", "0xa9fea9fe", "2852039166", "[fe80::1]", "[::ffff:a9fe:a9fe]", "[fd00:ec2::254]"),
                *("metadata.google.internal", "metadata.google.internal.", "100.100.100.200", "255.255.255.255"),
            )
        ),
        (spec(stage(**data("file:///etc/passwd"))), "FileUriNotAllowed", "put the data on a claim"),
        (
            spec(stage(train={"learningRate": 1e-5, "minimumLearningRate": 1e-4})),
            "InvalidStage",
            "stage one: train.minimumLearningRate 0.0001 is above train.learningRate 1e-05",
        ),
        (
            spec(stage(processesPerNode=8), defaults={"resources": {"limits": {"nvidia.com/gpu": 4}}}),
            "InvalidStage",
            "processesPerNode is 8, but resources.limits has 4 accelerators",
        ),
        (
            spec(
                stage(resources={"requests": {"memory": "2Gi"}}), defaults={"resources": {"limits": {"memory": "1Gi"}}}
            ),
            "InvalidStage",
            "resources.requests memory 2Gi is above its limit 1Gi",
        ),
        (
            spec(stage(resources={"limits": {"memory": "1Gi"}}, acceleratorMemory="80Gi")),
            "InvalidStage",
            "acceleratorMemory is set, but resources.limits has no accelerators",
        ),
        (
            spec(stage(train={"autotune": True}), defaults={"train": {"microBatchSize": 2}}),
            "InvalidStage",
            "stage one: train.autotune chooses train.microBatchSize; remove one or the other, from defaults too",
        ),
        (
            spec(defaults={"lora": {"rank": 8}}),
            "InvalidStage",
            "stage one: lora of defaults adapts a model, and this stage starts from random weights",
        ),
        (
            spec(
                model={"uri": "pvc://models/start"},
                defaults={"lora": {"quantization": "nf4"}, "parallelism": {"zeroStage": 3}},
            ),
            "InvalidStage",
            "stage one: lora.quantization holds the weights in 4 bits, and parallelism.zeroStage 3 would shard them",
        ),
        (
            spec(*POLICY, model={"uri": "pvc://models/start"}, defaults={"lora": {"quantization": "nf4"}}),
            "InvalidStage",
            "stage policy: a ppo stage holds its weights in its own precision; set lora.quantization in the other",
        ),
        (spec(model={"uri": "job://job/one"}), "SelfReference", "names this job"),
        (spec(stage(resources={"limits": {"cpu": -1}})), "InvalidSpec", "limits.cpu"),
    ],
)
def test_what_no_change_of_the_world_can_mend_fails_at_once(made: dict[str, Any], reason: str, words: str) -> None:
    world = World(made)
    world.settle()
    failed = world.condition("Failed")
    assert (world.status["phase"], failed["reason"]) == ("Failed", reason)
    assert words in failed["message"]
    assert world.condition("Accepted")["status"] == "False"
    assert not world.created


@pytest.mark.parametrize("host", ["10.1.2.3", "files.team.svc", "example.org:8443", "[2001:db8::1]", "127.example.org"])
def test_servers_of_the_cluster_and_elsewhere_are_asked(host: str) -> None:
    world = World(spec(stage(**data(f"https://{host}/x.jsonl"))))
    world.settle()
    assert world.condition("Accepted")["status"] == "True"


def test_local_mode_takes_files() -> None:
    world = World(spec(stage(**data("file:///data/x.txt"))), Settings(allow_file_uris=True))
    world.settle()
    assert world.condition("Accepted")["status"] == "True"


def test_several_nodes_need_a_shared_claim() -> None:
    world = World(spec(stage(nodes=2)))
    world.add_claim("models", "ReadWriteOnce")
    world.settle()
    failed = world.condition("Failed")
    assert failed["reason"] == "ClaimNotShared"
    assert "stage one runs on 2 nodes" in failed["message"]
    assert "ReadWriteOnce" in failed["message"]


def test_claim_is_waited_for_and_its_arrival_wakes_the_job() -> None:
    world = World(spec())
    claim = world.objects.pop(Ref("PersistentVolumeClaim", "team", "models"))
    world.settle()
    assert world.status["phase"] == "Pending"
    assert world.status["reason"] == "ClaimMissing"
    assert not world.created
    assert world.controller.interested(claim) == [world.key]
    world.add_claim("models")
    world.settle()
    assert world.status["phase"] == "Preparing"


def test_rollout_without_a_target_is_found_out_before_anything_runs() -> None:
    world = World(spec(rollout={"from": "one", "endpointName": "chat"}))
    world.settle()
    assert world.status["reason"] == "EndpointMissing"
    assert not world.created
    world.add(
        {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "ModelEndpoint",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": {"servedModelName": "chat", "model": {"uri": "job://other/one"}},
        }
    )
    world.settle()
    assert world.status["phase"] == "Preparing"


def test_bad_change_while_suspended_holds_the_job_and_does_not_end_it() -> None:
    world = World(spec())
    world.add_claim("models", "ReadWriteOnce")
    world.settle()
    world.succeed("prepare")
    world.settle()
    world.edit(suspend=True)
    world.settle()
    world.end(world.pods("one")[0], 75)
    world.settle()
    world.edit(stages=[stage(nodes=2)])
    world.settle()
    world.edit(suspend=False)
    world.settle()
    assert world.condition("Progressing")["reason"] == "ClaimNotShared"
    assert world.condition("Accepted")["status"] == "False"
    assert len(world.created) == 2
    world.edit(stages=[stage(nodes=1)])
    world.settle()
    assert world.status["phase"] == "Running"


def test_another_jobs_result_is_waited_for_resolved_once_and_trained_from() -> None:
    world = World(spec(model={"uri": "job://other/base"}))
    world.settle()
    assert (world.status["phase"], world.status["reason"]) == ("Pending", "WaitingForArtifact")
    artifact = {"uri": "pvc://models/m/other-1/base/model", "digest": "sha256:" + "c" * 64}
    other = world.add(
        {
            "apiVersion": "trimtab.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": "other", "namespace": "team"},
            "spec": spec(stage("base")),
            "status": {"phase": "Running", "stages": [{"name": "base", "phase": "Running"}]},
        }
    )
    world.settle()
    assert world.status["reason"] == "WaitingForArtifact"
    assert world.controller.interested(other) == [world.key]
    other["status"]["stages"][0]["artifact"] = artifact
    world.settle()
    assert world.status["model"] == artifact
    world.objects.pop(Ref("FineTuneJob", "team", "other"))
    world.succeed("prepare")
    world.settle()
    config = world.config("one")
    assert config["model"] == artifact
