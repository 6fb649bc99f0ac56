"""Valid objects on which, between them, every field can be set."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]

_DATA = [{"uri": "pvc://models/text.jsonl"}]
_CONFIG = {"config": {"model_type": "llama"}, "tokenizer": {"train": {}}}
_BY_URI = {"uri": "pvc://models/base"}


def job(model: Object, task: str, **fields: Any) -> Object:
    """Three stages, of which the last is the one that is changed; the names are some that samples name."""
    stages = [{"name": name, "pretrain": {"data": _DATA}} for name in ("case", "casex")]
    last = {"name": "last", task: {"data": _DATA}, **fields.pop("last", {})}
    spec = {"model": model, "artifacts": {"uri": "pvc://models/results"}, "stages": [*stages, last], **fields}
    return _object("FineTuneJob", spec)


def endpoint(**model: Any) -> Object:
    """One model."""
    return _object("ModelEndpoint", {"servedModelName": "chat", "model": model})


def _object(kind: str, spec: Object) -> Object:
    name = "chat" if kind == "ModelEndpoint" else "job"
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": "trimtab.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def _validated(task: str) -> Object:
    """A stage with held-out data."""
    return {task: {"data": _DATA, "validation": {"data": _DATA, "everySteps": 5}}}


def _mixture(**source: Any) -> Object:
    """An `sft` stage whose last data set, in training and validation, is a special one."""
    plain, special = _DATA[0], {**_DATA[0], **source}
    validated = {"validation": {"data": [special]}} if "fewShot" in source else {}
    return job(_CONFIG, "sft", last={"sft": {"data": [plain, special], **validated}})


def _policy(**ppo: Any) -> Object:
    """Two reward models, and a policy that learns from one of them."""
    made = job(_CONFIG, "ppo", last={"from": "base", "ppo": {"rewardFrom": "casex", "prompts": _DATA, **ppo}})
    rewards = [{"name": name, "from": "base", "reward": {"data": _DATA}} for name in ("case", "casex")]
    made["spec"]["stages"] = [{"name": "base", "pretrain": {"data": _DATA}}, *rewards, made["spec"]["stages"][-1]]
    return made


_WATCHED = {"everySteps": 5, "earlyStopping": {"heldOutRewardFrom": "case"}}


def _verified(kind: str, **ppo: Any) -> Object:
    """A policy whose answers a program judges."""
    needed = {"regularExpression": {"pattern": "."}, "jsonSchema": {"schema": {"type": "object"}}}
    made = _policy(verifier={kind: needed.get(kind, {})}, **ppo)
    del made["spec"]["stages"][-1]["ppo"]["rewardFrom"]
    return made


_ROLLOUT = {"from": "last", "endpointName": "chat", "create": {"servedModelName": "chat"}}
_DIGEST = f"sha256:{'a' * 64}"

BASES = {
    "FineTuneJob": [
        job(_BY_URI, "pretrain", rollout=_ROLLOUT),
        job(_CONFIG, "pretrain", rollout=_ROLLOUT),
        job(_CONFIG, "sft"),
        job(_CONFIG, "pretrain", last=_validated("pretrain")),
        job(_CONFIG, "sft", last=_validated("sft")),
        _mixture(fewShot={"count": 1}),
        _mixture(fewShot={"maximum": 2}),
        _mixture(replay=True, fraction=0.1),
        _mixture(heldOutTask="other"),
        _mixture(templates=[{"prompt": "{{ question }}", "completion": "{{ answer }}"}]),
        job(_CONFIG, "dpo", last={"from": "casex"}),
        job(_CONFIG, "dpo", last={"from": "casex", **_validated("dpo")}),
        job(_CONFIG, "reward", last={"from": "casex"}),
        job(_CONFIG, "reward", last={"from": "casex", **_validated("reward")}),
        job(_CONFIG, "reward", last={"from": "casex", "reward": {"data": _DATA, "demonstrations": _DATA}}),
        _policy(),
        _policy(validation={"data": _DATA}),
        _verified("exactMatch", validation={**_WATCHED, "data": _DATA}),
        *(_verified(kind) for kind in ("exactMatch", "regularExpression", "jsonSchema", "numericAnswer")),
        _policy(rollout={"engine": "vllm", "vllm": {"sleep": True}}),
        _policy(pretrainingMix={"data": _DATA, "coefficient": 1}),
        job({"config": {"model_type": "llama"}, "tokenizer": {"uri": "pvc://models/tokenizer"}}, "pretrain"),
    ],
    "ModelEndpoint": [endpoint(uri="pvc://models/base", digest=_DIGEST)],
}
