"""The objects of an attempt: valid for Kubernetes, restricted, and what the contract with the trainer asks."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_validate
import pytest
from tests.unit.finetunejob.world import World, spec, stage

from trimtab_operator.core.kube import Ref
from trimtab_operator.core.settings import Settings
from trimtab_trainer.config import STAGE_CONFIG, PrepareConfig, TrainConfig
from trimtab_trainer.ppo_settings import HeldOutReward, KlPenalty, Ppo, PretrainingMix, Rollout
from trimtab_trainer.settings import FewShot, Lora, Preference, Template
from trimtab_trainer.verifier_settings import Verifier

QUEUE = "kueue.x-k8s.io/queue-name"
SECRET = {"secretRef": {"name": "s3"}}
DEFAULTS = {
    "resources": {"limits": {"nvidia.com/gpu": 4, "cpu": 10, "memory": "8Gi"}, "sharedMemory": "1Gi"},
    "env": [
        {"name": "NCCL_DEBUG", "value": "INFO"},
        {"name": "HF_HUB_OFFLINE", "value": "0"},
        {"name": "LITERAL", "value": "$(HOME) $$"},
    ],
    "labels": {"team": "blue", "trimtab.dev/job": "forged"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "nodeSelector": {"pool": "gpu"},
    "runtimeClassName": "nvidia",
    "imagePullSecrets": [{"name": "registry"}],
    "train": {"epochs": 3, "learningRate": 1e-4},
}


def world() -> World:
    made = World(
        spec(
            stage("one", pretrain={"data": [{"uri": "pvc://corpus/text", "weight": 2}, {"uri": "s3://b/x", **SECRET}]}),
            {
                "name": "two",
                "from": "one",
                "sft": {
                    "data": [{"uri": "pvc://models/x.jsonl"}],
                    "validation": {"fraction": 0.1, "everySteps": 5, "earlyStopping": {"minimumImprovement": 0.01}},
                },
                "nodes": 2,
                "train": {"epochs": 1},
            },
            defaults=DEFAULTS,
        ),
        Settings(trainer_image="trainer@sha256:1"),
    )
    made.add_claim("corpus", "ReadOnlyMany")
    made.settle()
    return made


def pod_of(made: World, role: str) -> dict[str, Any]:
    (job,) = made.jobs(role)
    return dict(job["spec"]["template"])


def test_every_object_fits_kubernetes_own_schema() -> None:
    made = world()
    for role in ("prepare", "one", "two"):
        made.succeed(role)
        made.settle()
    checked = [o for o in made.objects.values() if o["kind"] in ("Job", "Service", "ConfigMap")]
    assert len(checked) == 3 + 2 + 3
    for obj in checked:
        kubernetes_validate.validate({key: obj[key] for key in obj if key != "status"}, "1.30", strict=True)
        assert len(obj["metadata"]["name"]) <= 63


def test_prepare_claims_no_accelerator_and_alone_gets_the_secrets() -> None:
    made = world()
    template = pod_of(made, "prepare")
    container = template["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "10", "memory": "8Gi"}
    assert "runtimeClassName" not in template["spec"]
    secrets = [m for m in container["volumeMounts"] if m["mountPath"] == "/var/run/trimtab/secrets/s3"]
    assert [mount["readOnly"] for mount in secrets] == [True]
    claims = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"] if "claim" in m["name"]}
    assert claims == {"/var/run/trimtab/volumes/corpus": True, "/var/run/trimtab/volumes/models": False}
    config = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(config, PrepareConfig)
    assert config.root == "pvc://models/m"
    first, second = config.stages
    assert [source.weight for source in first.data] == [2, 1]
    assert first.data[1].secret_path == "/var/run/trimtab/secrets/s3"
    assert (first.loss, second.loss, second.from_stage) == ("all", "assistant", "one")
    assert (first.world_size, second.world_size) == (4, 8)
    assert first.accelerator
    assert (first.recipe.epochs, second.recipe.epochs, second.recipe.learning_rate) == (3, 1, 1e-4)
    made.succeed("prepare")
    made.settle()
    assert "secret" not in json.dumps(pod_of(made, "one"))


def test_prepare_knows_the_memory_of_a_process() -> None:
    """That of its accelerator, or its part of the pod's."""
    gpus = {"limits": {"nvidia.com/gpu": 2, "memory": "8Gi"}}
    stages = [
        stage("one", resources=gpus, acceleratorMemory="80Gi"),
        stage("two", resources=gpus),
        stage("three", resources={"limits": {"memory": "8Gi"}}, processesPerNode=2),
        stage("four"),
    ]
    made = World(spec(*stages))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert [each.process_memory_bytes for each in told.stages] == [80 * 2**30, None, 4 * 2**30, None]


def test_autotune_reaches_prepare_and_training() -> None:
    limits = {"limits": {"memory": "8Gi"}}
    made = World(spec(stage("one", train={"autotune": True, "epochs": 2}, resources=limits), stage("two")))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert [each.autotune for each in told.stages] == [True, False]
    made.succeed("prepare")
    made.settle()
    config = STAGE_CONFIG.validate_python(made.config("one"))
    assert isinstance(config, TrainConfig)
    assert (config.autotune, config.process_memory_bytes, config.recipe.epochs) == (True, 8 * 2**30, 2)


def test_training_pods_are_restricted_offline_and_find_each_other() -> None:
    made = world()
    for role in ("prepare", "one"):
        made.succeed(role)
        made.settle()
    template = pod_of(made, "two")
    pod, container = template["spec"], template["spec"]["containers"][0]
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert not {"hostNetwork", "hostPID", "serviceAccountName"} & pod.keys()
    assert pod["automountServiceAccountToken"] is False
    assert (pod["restartPolicy"], pod["runtimeClassName"]) == ("Never", "nvidia")
    env = {e["name"]: e.get("value") for e in container["env"]}
    assert len(env) == len(container["env"])
    assert (env["HF_HUB_OFFLINE"], env["NCCL_DEBUG"]) == ("1", "INFO")
    assert env["LITERAL"] == "$$(HOME) $$$$", "a kubelet turns it back into what the user wrote"
    assert json.loads(env["TRIMTAB_VOLUMES"]) == {"models": "/var/run/trimtab/volumes/models"}
    (job,) = made.jobs("two")
    name = job["metadata"]["name"]
    assert env["TRIMTAB_RENDEZVOUS"] == f"{name}-0.{pod['subdomain']}.team.svc:29500"
    service = made.objects[Ref("Service", "team", pod["subdomain"])]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["metadata"]["labels"]["trimtab.dev/job"] == "job", "labels of ours can't be forged"
    assert template["metadata"]["labels"]["team"] == "blue"
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (2, 2, 0)


def test_every_pod_of_a_stage_has_its_service_account_but_no_token() -> None:
    made = World(spec(stage(), defaults={"serviceAccountName": "trainer"}))
    made.settle()
    assert pod_of(made, "prepare")["spec"]["serviceAccountName"] == "trainer"
    made.succeed("prepare")
    made.settle()
    pod = pod_of(made, "one")["spec"]
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("trainer", False)


def test_a_queue_gets_training_suspended_and_labelled_and_prepare_neither() -> None:
    made = World(spec(stage(), queueName="team-a"))
    made.settle()
    (prepare,) = made.jobs("prepare")
    assert "suspend" not in prepare["spec"]
    assert QUEUE not in prepare["metadata"]["labels"]
    made.succeed("prepare")
    made.settle()
    (job,) = made.jobs("one")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"][QUEUE] == "team-a"
    assert QUEUE not in job["spec"]["template"]["metadata"]["labels"]


def test_where_nobody_admits_a_queued_job_runs_at_once() -> None:
    made = World(spec(stage(), queueName="team-a"), Settings(queues=False))
    for role in ("prepare", "one"):
        made.settle()
        (job,) = made.jobs(role)
        assert "suspend" not in job["spec"]
        assert QUEUE not in job["metadata"]["labels"]
        made.succeed(role)


def test_stage_json_is_the_contract() -> None:
    made = world()
    for role in ("prepare", "one"):
        made.succeed(role)
        made.settle()
    config = STAGE_CONFIG.validate_python(made.config("two"))
    assert isinstance(config, TrainConfig)
    uid = made.owner["metadata"]["uid"]
    assert config.folder == f"pvc://models/m/job-{uid[:8]}/two"
    assert config.prepared.uri == "pvc://models/m/prepared/" + "a" * 64
    assert config.model is not None
    assert config.model.uri == f"pvc://models/m/job-{uid[:8]}/one/model"
    assert (config.nodes, config.processes_per_node, config.threads) == (2, 4, 2)
    assert config.validation_every_steps == 5
    assert config.early_stopping is not None
    assert (config.early_stopping.patience, config.early_stopping.minimum_improvement) == (3, 0.01)
    assert config.images == {"trainer": "trainer@sha256:1"}


def test_a_mixture_reaches_the_trainer_whole() -> None:
    wording = {"prompt": "{{ input }}", "completion": "{{ target }}"}
    sources = [
        {"uri": "pvc://models/a.tsv", "weight": 2, "cap": 9, "templates": [wording], "fewShot": {"maximum": 3}},
        {"uri": "pvc://models/b.txt", "replay": True, "fraction": 0.01},
        {"uri": "pvc://models/c.tsv", "heldOutTask": "c", "cap": 5},
    ]
    validation = {"data": [{"uri": "pvc://models/d.tsv", "templates": [wording]}]}
    made = World(spec(stage("one"), {"name": "two", "from": "one", "sft": {"data": sources, "validation": validation}}))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    trained, replayed, held_out = told.stages[1].data
    assert (trained.weight, trained.cap, trained.templates) == (2, 9, [Template(**wording)])
    assert trained.few_shot == FewShot(maximum=3, proportion=0.5)
    assert (replayed.replay_fraction, held_out.held_out_task, held_out.cap) == (0.01, "c", 5)
    assert [each.in_mixture for each in told.stages[1].data] == [True, False, False]
    assert told.stages[1].validation is not None
    assert told.stages[1].validation.data[0].templates == [Template(**wording)]


def test_dpo_is_held_to_the_weights_that_it_starts_from() -> None:
    preferences = {"data": [{"uri": "pvc://models/pairs.jsonl"}], "beta": 0.3, "maxLength": 512}
    made = World(spec(stage("one"), {"name": "two", "from": "one", "dpo": preferences}))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert (told.stages[1].type, told.stages[1].loss, told.stages[1].max_length) == ("dpo", "completion", 512)
    for role in ("prepare", "one"):
        made.succeed(role)
        made.settle()
    config = STAGE_CONFIG.validate_python(made.config("two"))
    assert isinstance(config, TrainConfig)
    assert config.model is not None
    assert config.reference == config.model
    assert config.preference == Preference(beta=0.3)


def test_ppo_waits_for_its_reward_model_and_is_told_all_four_models() -> None:
    shown = [{"uri": "s3://texts/chat.jsonl", "secretRef": {"name": "keys"}}]
    pairs = {"reward": {"data": [{"uri": "pvc://models/pairs.jsonl"}], "demonstrations": shown}}
    learning = {
        "rewardFrom": "score",
        "prompts": [{"uri": "pvc://models/prompts.jsonl"}],
        "kl": {"coefficient": 0.1},
        "rollout": {"maxNewTokens": 24},
        "passes": 2,
        "pretrainingMix": {
            "data": [{"uri": "s3://texts/old.jsonl", "secretRef": {"name": "keys"}}],
            "coefficient": 27.8,
        },
    }
    policy = {"name": "policy", "from": "one", "ppo": learning, "lora": {"rank": 8}}
    made = World(spec(stage("one"), {"name": "score", "from": "one", **pairs}, policy))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert (told.stages[2].reward_stage, told.stages[2].max_new_tokens) == ("score", 24)
    assert [source.uri for source in told.stages[1].demonstrations] == ["s3://texts/chat.jsonl"]
    assert [source.uri for source in told.stages[2].pretraining_mix] == ["s3://texts/old.jsonl"]
    mounts = made.pods("prepare")[0]["spec"]["containers"][0]["volumeMounts"]
    for source in (told.stages[1].demonstrations[0], told.stages[2].pretraining_mix[0]):
        assert source.secret_path in {mount["mountPath"] for mount in mounts}
    assert [source.uri for source in told.stages[2].data] == ["pvc://models/prompts.jsonl"]
    for role in ("prepare", "one"):
        made.succeed(role)
        made.settle()
    assert not made.pods("policy"), "its reward model is not done"
    made.succeed("score")
    made.settle()
    config = STAGE_CONFIG.validate_python(made.config("policy"))
    assert isinstance(config, TrainConfig)
    assert config.model is not None
    assert config.reward is not None
    assert config.reference == config.model
    assert config.model.uri == made.stage("one")["artifact"]["uri"]
    assert config.reward.uri == made.stage("score")["artifact"]["uri"]
    assert config.ppo == told.stages[2].ppo
    assert config.lora == told.stages[2].lora == Lora(rank=8)
    assert config.ppo == Ppo(
        kl=KlPenalty(coefficient=0.1),
        rollout=Rollout(max_new_tokens=24),
        passes=2,
        pretraining_mix=PretrainingMix(coefficient=27.8),
    )


NUMBER = {"numericAnswer": {"field": "target", "answerPattern": "#### (?P<answer>.*)", "relativeTolerance": 0.01}}
DOCUMENT = {"jsonSchema": {"schema": {"properties": {"a_b": {"enum": [None, 1.5]}, "aB": {"const": None}}}}}


@pytest.mark.parametrize("verifier", [NUMBER, DOCUMENT])
def test_ppo_with_a_verifier_waits_for_no_reward_model(verifier: dict[str, Any]) -> None:
    learning = {"verifier": verifier, "prompts": [{"uri": "pvc://models/prompts.jsonl"}]}
    made = World(spec(stage("one"), {"name": "policy", "from": "one", "ppo": learning}))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert told.stages[1].reward_stage is None
    assert told.stages[1].verifier == Verifier.model_validate(verifier), "nulls of a schema included"
    for role in ("prepare", "one"):
        made.succeed(role)
        made.settle()
    config = STAGE_CONFIG.validate_python(made.config("policy"))
    assert isinstance(config, TrainConfig)
    assert config.model is not None
    assert (config.reference, config.reward) == (config.model, None)
    assert config.ppo == told.stages[1].ppo


def test_ppo_waits_for_the_reward_model_that_watches_as_well() -> None:
    pairs = {"reward": {"data": [{"uri": "pvc://models/pairs.jsonl"}]}}
    stopping = {"heldOutRewardFrom": "watch", "minimumFall": 0.1}
    validation = {"fraction": 0.1, "everySteps": 4, "earlyStopping": stopping}
    learning = {"rewardFrom": "score", "prompts": [{"uri": "pvc://models/prompts.jsonl"}], "validation": validation}
    judges = [{"name": name, "from": "one", **pairs} for name in ("score", "watch")]
    made = World(spec(stage("one"), *judges, {"name": "policy", "from": "one", "ppo": learning}))
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert (told.stages[3].reward_stage, told.stages[3].held_out_reward_stage) == ("score", "watch")
    for role in ("prepare", "one", "score"):
        made.succeed(role)
        made.settle()
    assert not made.pods("policy"), "the one that watches is not done"
    made.succeed("watch")
    made.settle()
    config = STAGE_CONFIG.validate_python(made.config("policy"))
    assert isinstance(config, TrainConfig)
    assert config.reward is not None
    assert config.held_out_reward is not None
    assert config.reward.uri == made.stage("score")["artifact"]["uri"]
    assert config.held_out_reward.uri == made.stage("watch")["artifact"]["uri"]
    assert config.validation_every_steps == 4
    assert config.early_stopping is None
    assert config.ppo == told.stages[3].ppo
    assert config.ppo is not None
    assert config.ppo.early_stopping == HeldOutReward(minimum_fall=0.1)


def test_lora_of_defaults_and_stage_goes_to_prepare_and_trainer() -> None:
    chat = {"sft": {"data": [{"uri": "pvc://models/chat.jsonl"}]}, "lora": {"targets": ["q_proj"]}}
    made = World(
        spec(stage("one"), {"name": "two", "from": "one", **chat}, model={"uri": "pvc://models/base"})
        | {"defaults": {"lora": {"rank": 8}}}
    )
    made.settle()
    told = STAGE_CONFIG.validate_python(made.config("prepare"))
    assert isinstance(told, PrepareConfig)
    assert [each.lora for each in told.stages] == [Lora(rank=8), Lora(rank=8, targets=["q_proj"])]
    assert told.stages[0].lora is not None
    assert told.stages[0].lora.scaling == 2
    for role in ("prepare", "one"):
        made.succeed(role)
        made.settle()
    config = STAGE_CONFIG.validate_python(made.config("two"))
    assert isinstance(config, TrainConfig)
    assert config.lora == Lora(rank=8, targets=["q_proj"])


def test_upgrade_of_the_operator_leaves_a_running_jobs_image_alone() -> None:
    made = world()
    made.settings = Settings(trainer_image="trainer@sha256:2")
    made.succeed("prepare")
    made.settle()
    assert pod_of(made, "one")["spec"]["containers"][0]["image"] == "trainer@sha256:1"
