"""Manifests that have a value in one chosen place: made from the schema, so that a new field is tried as well."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from tests.manifests.cases import Manifest, endpoint, job

from trimtab_operator.api.crd import RESOURCES, crd

Place = tuple[str, ...]
"""Keys from `spec` on; `[]` stands for an item of a list, `{key}` and `{value}` for those of a map."""


def job_of_every_type() -> Manifest:
    """One stage of each type, in the order of `_TYPES`."""
    made = job()
    made["spec"]["stages"].append({"name": "prefer", "from": "chat", "dpo": {"data": [_ITEMS["data"]]}})
    made["spec"]["stages"].append({"name": "score", "from": "chat", "reward": {"data": [_ITEMS["data"]]}})
    ppo = {"rewardFrom": "score", "prompts": [_ITEMS["data"]]}
    made["spec"]["stages"].append({"name": "policy", "from": "chat", "ppo": ppo})
    return made


BASES: dict[str, Callable[..., Manifest]] = {"FineTuneJob": job_of_every_type, "ModelEndpoint": endpoint}
_TYPES = ("pretrain", "sft", "dpo", "reward", "ppo")
_ITEMS: dict[str, Any] = {
    "data": {"uri": "pvc://models/text.jsonl"},
    "prompts": {"uri": "pvc://models/text.jsonl"},
    "demonstrations": {"uri": "pvc://models/text.jsonl"},
    "templates": {"prompt": "{{ question }}", "completion": "{{ answer }}"},
    "env": {"name": "SOME", "value": "x"},
    "imagePullSecrets": {"name": "some"},
    "tolerations": {"operator": "Exists"},
}
"""A valid item of each list of maps, for what stands beside the chosen place."""
_NEIGHBOURS: dict[str, Any] = {
    "tokenizer": {"train": {}},
    "rollout": {"from": "chat", "endpointName": "case"},
    "create": {"servedModelName": "case"},
    "pretrainingMix": {"data": [_ITEMS["data"]], "coefficient": 1},
    "source": {"jobName": "some", "jobUID": "some"},
}

_IN_PLACE_OF = {"verifier": "rewardFrom"}
"""What a field excludes beside it."""


def places(kind: str, wanted: Callable[[str, dict[str, Any]], bool]) -> Iterator[Place]:
    """The places below `spec` whose name and schema are wanted."""
    resource = next(each for each in RESOURCES if each.model.__name__ == kind)
    schema = crd(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    yield from _walk("spec", schema, ("spec",), wanted)


def _walk(
    name: str, schema: dict[str, Any], place: Place, wanted: Callable[[str, dict[str, Any]], bool]
) -> Iterator[Place]:
    if wanted(name, schema):
        yield place
    for child, inner in schema.get("properties", {}).items():
        yield from _walk(child, inner, (*place, child), wanted)
    if "items" in schema:
        yield from _walk("[]", schema["items"], (*place, "[]"), wanted)
    if isinstance(values := schema.get("additionalProperties"), dict):
        if wanted("{key}", {"type": "string"}):
            yield (*place, "{key}")
        yield from _walk("{value}", values, (*place, "{value}"), wanted)


def manifest_with(kind: str, place: Place, value: Any) -> Manifest:
    """A valid manifest but for the value in this place."""
    made = copy.deepcopy(BASES[kind]())
    node: Any = made
    for index, key in enumerate(place):
        last = index == len(place) - 1
        if key in _IN_PLACE_OF:
            node.pop(_IN_PLACE_OF[key], None)
        parent = place[index - 1] if index else ""
        if key == "[]":
            position = _position(parent, place)
            while len(node) <= position:
                node.append(copy.deepcopy(_ITEMS.get(parent, {})))
            if last:
                node[position] = value
            node = node[position]
        elif key == "{key}":
            node[value] = "1"
        elif key == "{value}":
            node["example"] = value
        elif last:
            node[key] = value
        else:
            empty: Any = [] if place[index + 1] == "[]" else copy.deepcopy(_NEIGHBOURS.get(key, {}))
            if not node.get(key):
                node[key] = empty
            node = node[key]
    return made


def _position(parent: str, place: Place) -> int:
    """Of the item: the stage that has the type in question; `lora` needs one that starts from another."""
    if parent == "stages" and "lora" in place:
        return _TYPES.index("sft")
    return next((i for i, name in enumerate(_TYPES) if parent == "stages" and name in place), 0)
