"""Manifests that must be refused at admission, each with the place and the words that a person needs.

The same table runs against a real API server and against local mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Manifest = dict[str, Any]


def job(**spec: Any) -> Manifest:
    """A valid two-stage job; keyword arguments replace fields of its spec."""
    return {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "case", "namespace": "default"},
        "spec": {
            "model": {
                "config": {"model_type": "llama", "hidden_size": 64},
                "tokenizer": {"train": {"vocabularySize": 512}},
            },
            "artifacts": {"uri": "pvc://models/cases"},
            "stages": [
                {"name": "base", "pretrain": {"data": [{"uri": "pvc://models/text.jsonl"}]}},
                {
                    "name": "chat",
                    "from": "base",
                    "sft": {"data": [{"uri": "pvc://models/chat.jsonl"}]},
                    "train": {"learningRate": 1e-4},
                    "resources": {"limits": {"cpu": 2, "memory": "1Gi"}},
                },
            ],
            **spec,
        },
    }


def endpoint(**spec: Any) -> Manifest:
    """A valid endpoint; keyword arguments replace fields of its spec."""
    return {
        "apiVersion": "trimtab.dev/v1alpha1",
        "kind": "ModelEndpoint",
        "metadata": {"name": "case", "namespace": "default"},
        "spec": {"servedModelName": "case", "model": {"uri": "job://case/chat"}, **spec},
    }


def _edited(change: Callable[[Manifest], None], base: Callable[[], Manifest] = job) -> Manifest:
    manifest = base()
    change(manifest)
    return manifest


def _stage(index: int, **fields: Any) -> Manifest:
    return _edited(lambda m: m["spec"]["stages"][index].update(fields))


def _model(**fields: Any) -> Manifest:
    return job(model=fields)


@dataclass(frozen=True)
class Refused:
    """A manifest and what the refusal must contain; `strict`: only refused where unknown fields are errors."""

    id: str
    manifest: Manifest
    words: tuple[str, ...]
    strict: bool = False


@dataclass(frozen=True)
class RefusedEdit:
    """A valid manifest, an edit of it, and what the refusal of the edit must contain."""

    id: str
    before: Manifest
    after: Manifest
    words: tuple[str, ...]


_TEXT = {"data": [{"uri": "pvc://models/text.jsonl"}]}


def _dpo(**fields: Any) -> Manifest:
    return {"name": "prefer", "from": "a", "dpo": {**_TEXT, **fields}}


def _reward(**fields: Any) -> Manifest:
    return {"name": "score", "from": "a", "reward": _TEXT, **fields}


def _ppo(**fields: Any) -> Manifest:
    """`rewardFrom` goes into `ppo`, the rest into the stage; None leaves a field out."""
    ppo = {"rewardFrom": fields.pop("rewardFrom", "score"), "prompts": _TEXT["data"], **fields.pop("ppo", {})}
    stage = {"name": "policy", "from": "a", "ppo": _given(ppo), **fields}
    return _given(stage)


def _given(fields: Manifest) -> Manifest:
    return {key: value for key, value in fields.items() if value is not None}


def _verified(**verifier: Any) -> Manifest:
    return job(stages=[{"name": "a", "pretrain": _TEXT}, _ppo(rewardFrom=None, ppo={"verifier": verifier})])


def _watched(name: str) -> Manifest:
    """A policy with early stopping by the model of that stage."""
    validation = {**_TEXT, "everySteps": 5, "earlyStopping": {"heldOutRewardFrom": name}}
    return job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), _ppo(ppo={"validation": validation})])


def _sft(*sources: Manifest) -> Manifest:
    return _stage(1, sft={"data": [{"uri": "pvc://models/chat.jsonl", **source} for source in sources]})


_ASKED = {"prompt": "{{ input }}", "completion": "{{ target }}"}

REFUSED = (
    Refused(
        "replay without fraction",
        _sft({}, {"replay": True}),
        ("spec.stages[1].sft.data[1]", "replay needs fraction"),
    ),
    Refused(
        "fraction without replay",
        _sft({}, {"fraction": 0.1}),
        ("spec.stages[1].sft.data[1]", "fraction needs replay: true"),
    ),
    Refused(
        "replay with a cap",
        _sft({}, {"replay": True, "fraction": 0.1, "cap": 3}),
        ("spec.stages[1].sft.data[1]", "remove weight and cap"),
    ),
    Refused(
        "replay of everything",
        _sft({}, {"replay": True, "fraction": 0.6}, {"replay": True, "fraction": 0.4}),
        ("spec.stages[1].sft.data", "must sum to less than 1"),
    ),
    Refused("fraction 1", _sft({}, {"replay": True, "fraction": 1}), ("spec.stages[1].sft.data[1].fraction",)),
    Refused(
        "nothing to train on",
        _sft({"replay": True, "fraction": 0.1}, {"heldOutTask": "a"}),
        ("spec.stages[1].sft.data", "at least one data set that is neither replay nor a held-out task"),
    ),
    Refused(
        "weight of a held-out task",
        _sft({}, {"heldOutTask": "a", "weight": 2}),
        ("spec.stages[1].sft.data[1]", "a held-out task is never trained on"),
    ),
    Refused("upper-case task", _sft({}, {"heldOutTask": "A"}), ("spec.stages[1].sft.data[1].heldOutTask",)),
    Refused("no templates", _sft({"templates": []}), ("spec.stages[1].sft.data[0].templates",)),
    Refused(
        "template without completion",
        _sft({"templates": [{"prompt": "{{ input }}"}]}),
        ("spec.stages[1].sft.data[0].templates[0].completion",),
    ),
    Refused(
        "count and maximum of examples",
        _sft({"fewShot": {"count": 1, "maximum": 2}}),
        ("spec.stages[1].sft.data[0].fewShot", "give exactly one of count and maximum"),
    ),
    Refused(
        "templates of running text",
        _stage(0, pretrain={"data": [{"uri": "pvc://models/text.jsonl", "templates": [_ASKED]}]}),
        ("spec.stages[0].pretrain.data[0].templates",),
        strict=True,
    ),
    Refused("unknown field", _stage(1, learnRate=1), ("spec.stages[1].learnRate",), strict=True),
    Refused(
        "misspelt stage type",
        _edited(lambda m: m["spec"]["stages"][1].update(stf=m["spec"]["stages"][1].pop("sft"))),
        ("spec.stages[1]", "set exactly one stage type"),
    ),
    Refused("two types in one stage", _stage(1, pretrain=_TEXT), ("spec.stages[1]", "set exactly one stage type")),
    Refused("no stage type", job(stages=[{"name": "empty"}]), ("spec.stages[0]", "set exactly one stage type")),
    Refused("cycle in from", _stage(0, **{"from": "chat"}), ("spec", "from must name an earlier stage")),
    Refused("from itself", _stage(1, **{"from": "chat"}), ("spec", "from must name an earlier stage")),
    Refused(
        "preferences for a model from nothing",
        _edited(lambda m: m["spec"].update(stages=[{"name": "prefer", "dpo": _TEXT}])),
        ("spec", "a dpo stage starts from a model"),
    ),
    Refused(
        "a reward model from nothing",
        _edited(lambda m: m["spec"].update(stages=[{"name": "score", "reward": _TEXT}])),
        ("spec", "a reward stage starts from a model"),
    ),
    Refused(
        "no demonstrations",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(reward={**_TEXT, "demonstrations": []})]),
        ("spec.stages[1].reward.demonstrations",),
    ),
    Refused(
        "text from a reward model",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), {"name": "b", "from": "score", "sft": _TEXT}]),
        ("spec", "from names a reward stage"),
    ),
    Refused(
        "a reward model served",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward()], rollout={"from": "score", "endpointName": "case"}),
        ("spec", "rollout.from names a reward stage"),
    ),
    Refused(
        "a policy from nothing",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), _ppo(**{"from": None})]),
        ("spec", "a ppo stage starts from a model"),
    ),
    Refused(
        "rewards from no reward model",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _ppo(rewardFrom="a")]),
        ("spec", "ppo.rewardFrom must name a stage of type reward"),
    ),
    Refused(
        "rewards from a later stage",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _ppo(), _reward()]),
        ("spec", "ppo.rewardFrom must name an earlier stage"),
    ),
    Refused(
        "rewards from nothing",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _ppo(rewardFrom=None)]),
        ("spec.stages[1].ppo", "give exactly one of rewardFrom and verifier"),
    ),
    Refused(
        "rewards from a model and a verifier",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), _ppo(ppo={"verifier": {"exactMatch": {}}})]),
        ("spec.stages[2].ppo", "give exactly one of rewardFrom and verifier"),
    ),
    Refused("a verifier of no kind", _verified(), ("spec.stages[1].ppo.verifier", "set exactly one of exactMatch")),
    Refused(
        "two verifiers",
        _verified(exactMatch={}, numericAnswer={}),
        ("spec.stages[1].ppo.verifier", "set exactly one of exactMatch"),
    ),
    Refused(
        "a verifier's open bracket",
        _verified(regularExpression={"pattern": "(a"}),
        ("spec.stages[1].ppo.verifier.regularExpression", "pattern must be a regular expression in RE2's"),
    ),
    Refused(
        "a verifier's look-ahead",
        _verified(numericAnswer={"answerPattern": "a(?=b)"}),
        ("spec.stages[1].ppo.verifier.numericAnswer", "answerPattern must be a regular expression in RE2's syntax"),
    ),
    Refused(
        "a verifier's back-reference",
        _verified(exactMatch={"answerPattern": r"(?P<answer>a)\1"}),
        ("spec.stages[1].ppo.verifier.exactMatch", "answerPattern must be a regular expression in RE2's syntax"),
    ),
    Refused(
        "a schema that is none", _verified(jsonSchema={"schema": "object"}), ("spec.stages[1].ppo.verifier.jsonSchema",)
    ),
    Refused(
        "a tolerance below 0",
        _verified(numericAnswer={"absoluteTolerance": -1}),
        ("spec.stages[1].ppo.verifier.numericAnswer.absoluteTolerance",),
    ),
    Refused(
        "a watcher that is no reward model",
        _watched("a"),
        ("spec", "ppo.validation.earlyStopping.heldOutRewardFrom must name a stage of type reward"),
    ),
    Refused(
        "a watcher that comes later",
        _edited(lambda m: m["spec"]["stages"].append(_reward(name="later")), lambda: _watched("later")),
        ("spec", "ppo.validation.earlyStopping.heldOutRewardFrom must name an earlier stage"),
    ),
    Refused(
        "a watcher that is learnt from",
        _watched("score"),
        ("spec.stages[2].ppo", "heldOutRewardFrom must name another stage than rewardFrom"),
    ),
    Refused(
        "a watcher without measurements",
        _edited(lambda m: m["spec"]["stages"][-1]["ppo"]["validation"].pop("everySteps"), lambda: _watched("score")),
        ("spec.stages[2].ppo.validation", "earlyStopping compares measurements of the held-out score; add everySteps"),
    ),
    Refused(
        "a policy of 4 bits",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), _ppo(lora={"quantization": "nf4"})]),
        ("spec", "a ppo stage holds its weights in its own precision; remove lora.quantization"),
    ),
    Refused(
        "a pretraining mix of no weight",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), _ppo(ppo={"pretrainingMix": _TEXT})]),
        ("spec.stages[2].ppo.pretrainingMix", "coefficient"),
    ),
    Refused(
        "a micro-batch given and to be chosen",
        job(stages=[{"name": "a", "pretrain": _TEXT, "train": {"autotune": True, "microBatchSize": 2}}]),
        ("spec.stages[0]", "train.autotune chooses train.microBatchSize and parallelism.zeroStage"),
    ),
    Refused(
        "a ZeRO stage given and to be chosen",
        job(defaults={"train": {"autotune": True}, "parallelism": {"zeroStage": 1}}),
        ("spec.defaults", "train.autotune chooses train.microBatchSize and parallelism.zeroStage"),
    ),
    Refused(
        "settings of a sampler that does not run",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _reward(), _ppo(ppo={"rollout": {"vllm": {"sleep": True}}})]),
        ("spec.stages[2].ppo.rollout", "rollout.vllm belongs to engine: vllm"),
    ),
    Refused(
        "label smoothing of IPO",
        job(stages=[{"name": "a", "pretrain": _TEXT}, _dpo(loss="ipo", labelSmoothing=0.1)]),
        ("spec.stages[1].dpo", "labelSmoothing belongs to the sigmoid loss"),
    ),
    Refused(
        "an adapter for a model from nothing",
        _stage(0, lora={"rank": 8}),
        ("spec", "lora adapts a model, random weights are none"),
    ),
    Refused("rank 0", _stage(1, lora={"rank": 0}), ("spec.stages[1].lora.rank",)),
    Refused("alpha 0", _stage(1, lora={"alpha": 0}), ("spec.stages[1].lora.alpha",)),
    Refused("all dropped", _stage(1, lora={"dropout": 1}), ("spec.stages[1].lora.dropout",)),
    Refused("no targets", _stage(1, lora={"targets": []}), ("spec.stages[1].lora.targets",)),
    Refused("target by path", _stage(1, lora={"targets": ["a.b"]}), ("spec.stages[1].lora.targets[0]",)),
    Refused("beta 0", job(stages=[{"name": "a", "pretrain": _TEXT}, _dpo(beta=0)]), ("spec.stages[1].dpo.beta",)),
    Refused("from nowhere", _stage(1, **{"from": "nowhere"}), ("spec", "from must name a stage of this job")),
    Refused(
        "rollout from nowhere",
        job(rollout={"from": "nowhere", "endpointName": "case"}),
        ("spec", "rollout.from must name a stage"),
    ),
    Refused(
        "name of 64 characters", _edited(lambda m: m["metadata"].update(name="n" * 64)), ("at most 63 characters",)
    ),
    Refused(
        "same stage twice", job(stages=[{"name": "a", "pretrain": _TEXT}] * 2), ("spec.stages[1]", "Duplicate value")
    ),
    Refused("17 stages", job(stages=[{"name": f"s{i}", "pretrain": _TEXT} for i in range(17)]), ("spec.stages", "16")),
    Refused("no stages", job(stages=[]), ("spec.stages",)),
    Refused("upper-case stage name", _stage(0, name="Base"), ("spec.stages[0].name",)),
    Refused("learning rate 0", _stage(1, train={"learningRate": 0}), ("spec.stages[1].train.learningRate",)),
    Refused("learning rate as text", _stage(1, train={"learningRate": "1e-4"}), ("spec.stages[1].train.learningRate",)),
    Refused("zero epochs", _stage(1, train={"epochs": 0}), ("spec.stages[1].train.epochs",)),
    Refused("ZeRO 4", _stage(1, parallelism={"zeroStage": 4}), ("spec.stages[1].parallelism.zeroStage",)),
    Refused("unknown precision", _stage(1, precision="fp8"), ("spec.stages[1].precision", "bf16")),
    Refused("no data", _stage(0, pretrain={"data": []}), ("spec.stages[0].pretrain.data",)),
    Refused(
        "data by ftp",
        _stage(0, pretrain={"data": [{"uri": "ftp://host/text"}]}),
        ("spec.stages[0].pretrain.data[0].uri",),
    ),
    Refused(
        "credentials in a URI",
        _stage(0, pretrain={"data": [{"uri": "https://me:secret@host/x.jsonl"}]}),
        ("spec.stages[0].pretrain.data[0].uri",),
    ),
    Refused(
        "climbing Secret name",
        _stage(0, pretrain={"data": [{"uri": "s3://bucket/x", "secretRef": {"name": "../../etc"}}]}),
        ("spec.stages[0].pretrain.data[0].secretRef.name",),
    ),
    Refused(
        "job of another namespace",
        _model(uri="job://other/case/chat"),
        ("spec.model.uri",),
    ),
    Refused("label key that is none", _stage(0, labels={"$(X)": "1"}), ("spec.stages[0].labels", "a key is a name")),
    Refused("label value that is none", _stage(0, labels={"team": "a\nb"}), ("spec.stages[0].labels.team",)),
    Refused("resource that is none", _stage(0, resources={"limits": {"a b": 1}}), ("limits", "a key is a name")),
    Refused("priority class that is none", _stage(0, priorityClassName="$(X)"), ("spec.stages[0].priorityClassName",)),
    Refused(
        "hub data without revision",
        _stage(0, pretrain={"data": [{"uri": "hf://org/data"}]}),
        ("spec.stages[0].pretrain.data[0]", "needs revision"),
    ),
    Refused(
        "branch as revision",
        _stage(0, pretrain={"data": [{"uri": "hf://org/data", "revision": "main"}]}),
        ("spec.stages[0].pretrain.data[0].revision",),
    ),
    Refused(
        "both kinds of validation",
        _stage(0, pretrain=_TEXT | {"validation": _TEXT | {"fraction": 0.1}}),
        ("spec.stages[0].pretrain.validation", "exactly one of data and fraction"),
    ),
    Refused(
        "early stopping without measurements",
        _stage(0, pretrain=_TEXT | {"validation": _TEXT | {"earlyStopping": {}}}),
        ("spec.stages[0].pretrain.validation", "earlyStopping compares measurements of the validation loss; add every"),
    ),
    Refused(
        "patience of 0",
        _stage(0, pretrain=_TEXT | {"validation": _TEXT | {"everySteps": 5, "earlyStopping": {"patience": 0}}}),
        ("spec.stages[0].pretrain.validation.earlyStopping.patience",),
    ),
    Refused(
        "model from two places",
        _model(uri="pvc://models/base", config={"model_type": "llama"}),
        ("spec.model", "exactly one of uri and config"),
    ),
    Refused("config without tokenizer", _model(config={"model_type": "llama"}), ("spec.model", "add tokenizer.train")),
    Refused(
        "config without model_type",
        _model(config={"hidden_size": 8}, tokenizer={"train": {}}),
        ("spec.model", "config needs model_type"),
    ),
    Refused("hub model without revision", _model(uri="hf://org/model"), ("spec.model", "needs revision")),
    Refused(
        "model with a second tokenizer",
        _model(uri="pvc://models/base", tokenizer={"train": {}}),
        ("spec.model", "remove tokenizer"),
    ),
    Refused("artifacts outside a claim", job(artifacts={"uri": "s3://bucket/x"}), ("spec.artifacts.uri",)),
    Refused(
        "reserved variable",
        _stage(0, env=[{"name": "LD_PRELOAD", "value": "x"}]),
        ("spec.stages[0].env[0]", "this variable is reserved"),
    ),
    Refused("reserved label", _stage(0, labels={"trimtab.dev/job": "other"}), ("spec.stages[0].labels", "reserved")),
    Refused(
        "negative memory",
        _stage(0, resources={"limits": {"memory": "-1"}}),
        ("spec.stages[0].resources.limits.memory",),
    ),
    Refused("negative retries", _stage(0, retries=-1), ("spec.stages[0].retries",)),
    Refused("queue of two words", job(queueName="team a"), ("spec.queueName",)),
    Refused("queue name of 64 characters", job(queueName="q" * 64), ("spec.queueName", "63")),
    Refused("no time to start", job(startingDeadlineSeconds=0), ("spec.startingDeadlineSeconds",)),
    Refused("a century to start", job(startingDeadlineSeconds=31_536_001), ("spec.startingDeadlineSeconds",)),
    Refused(
        "service account with a path",
        _stage(0, serviceAccountName="../other"),
        ("spec.stages[0].serviceAccountName",),
    ),
    Refused(
        "no service account by default", job(defaults={"serviceAccountName": ""}), ("spec.defaults.serviceAccountName",)
    ),
    Refused("service account of an endpoint", endpoint(serviceAccountName="A B"), ("spec.serviceAccountName",)),
    Refused("endpoint without digest", endpoint(model={"uri": "pvc://models/x"}), ("spec.model", "needs digest")),
    Refused(
        "unknown engine option",
        endpoint(engine={"args": {"trustRemoteCode": True}}),
        ("spec.engine.args.trustRemoteCode",),
        strict=True,
    ),
    Refused("negative replicas", endpoint(replicas=-1), ("spec.replicas",)),
)


def _edit(id: str, change: Callable[[Manifest], None], *words: str, before: Manifest | None = None) -> RefusedEdit:
    base = job() if before is None else before
    after = copy.deepcopy(base)
    change(after)
    return RefusedEdit(id, base, after, words)


REFUSED_EDITS = (
    _edit("another model", lambda m: m["spec"]["model"]["config"].update(hidden_size=128), "model can't be changed"),
    _edit(
        "another store", lambda m: m["spec"]["artifacts"].update(uri="pvc://models/other"), "artifacts can't be changed"
    ),
    _edit("a recipe", lambda m: m["spec"]["stages"][1]["train"].update(learningRate=2e-4), "train can't be changed"),
    _edit("a recipe added", lambda m: m["spec"]["stages"][0].update(train={"epochs": 2}), "train can't be changed"),
    _edit("an adapter added", lambda m: m["spec"]["stages"][1].update(lora={}), "lora can't be changed"),
    _edit("a recipe removed", lambda m: m["spec"]["stages"][1].pop("train"), "train can't be changed"),
    _edit(
        "data",
        lambda m: m["spec"]["stages"][0]["pretrain"]["data"].append({"uri": "pvc://models/more.jsonl"}),
        "pretrain can't be changed",
    ),
    _edit(
        "a stage added",
        lambda m: m["spec"]["stages"].append({"name": "more", "pretrain": _TEXT}),
        "stages of a job are fixed",
    ),
    _edit("a stage removed", lambda m: m["spec"]["stages"].pop(), "stages of a job are fixed"),
    _edit(
        "a rollout added",
        lambda m: m["spec"].update(rollout={"from": "chat", "endpointName": "case"}),
        "rollout can't be changed",
    ),
    _edit(
        "resources while running",
        lambda m: m["spec"]["stages"][1]["resources"]["limits"].update(cpu=4),
        "only while the job is suspended",
    ),
    _edit("nodes while running", lambda m: m["spec"]["stages"][1].update(nodes=2), "only while the job is suspended"),
    _edit("a queue while running", lambda m: m["spec"].update(queueName="team-a"), "only while the job is suspended"),
    _edit(
        "no queue while running",
        lambda m: m["spec"].pop("queueName"),
        "only while the job is suspended",
        before=job(queueName="team-a"),
    ),
    _edit(
        "a service account",
        lambda m: m["spec"]["stages"][0].update(serviceAccountName="trainer"),
        "serviceAccountName can't be changed",
    ),
    _edit(
        "defaults' nodes while running",
        lambda m: m["spec"]["defaults"].update(nodes=2),
        "only while the job is suspended",
        before=job(defaults={"precision": "fp32"}),
    ),
    _edit(
        "defaults' precision",
        lambda m: m["spec"]["defaults"].update(precision="bf16"),
        "precision can't be changed",
        before=job(defaults={"precision": "fp32"}),
    ),
    _edit(
        "defaults added while suspended",
        lambda m: m["spec"].update(defaults={"nodes": 2, "image": "other"}),
        "defaults.image can't be changed",
        before=job(suspend=True),
    ),
    _edit(
        "defaults removed while suspended",
        lambda m: m["spec"].pop("defaults"),
        "defaults.precision can't be changed",
        before=job(suspend=True, defaults={"precision": "fp32"}),
    ),
)

ACCEPTED_EDITS = (
    _edit("suspend", lambda m: m["spec"].update(suspend=True)),
    _edit("more retries", lambda m: m["spec"]["stages"][0].update(retries=9)),
    _edit("a deadline", lambda m: m["spec"].update(activeDeadlineSeconds=60, ttlSecondsAfterFinished=60)),
    _edit("a deadline for the start", lambda m: m["spec"].update(startingDeadlineSeconds=60)),
    _edit(
        "another queue while suspended",
        lambda m: m["spec"].update(queueName="team-b"),
        before=job(suspend=True, queueName="team-a"),
    ),
    _edit(
        "leave the queue and resume",
        lambda m: (m["spec"].pop("queueName"), m["spec"].update(suspend=False)),
        before=job(suspend=True, queueName="team-a"),
    ),
    _edit(
        "an endpoint's service account",
        lambda m: m["spec"].update(serviceAccountName="server"),
        before=endpoint(),
    ),
    _edit(
        "defaults' nodes while suspended", lambda m: m["spec"].update(defaults={"nodes": 2}), before=job(suspend=True)
    ),
    _edit("nodes while suspended", lambda m: m["spec"]["stages"][1].update(nodes=2), before=job(suspend=True)),
    _edit(
        "resources and resume",
        lambda m: (m["spec"]["stages"][1]["resources"]["limits"].update(cpu=4), m["spec"].update(suspend=False)),
        before=job(suspend=True),
    ),
)
