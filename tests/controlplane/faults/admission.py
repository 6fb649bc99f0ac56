"""The real API server as the judge of specs; nothing of what is asked stays."""

from __future__ import annotations

import uuid

import yaml
from tests.controlplane.crds import CRDS
from tests.controlplane.faults.bases import BASES
from tests.controlplane.faults.field_sweep import Findings, Sweep
from tests.controlplane.faults.lives import World

from trimtab_operator.core.kube import KINDS, Object

SEEN_ELSEWHERE = {
    "stages.sft.data.replay": "goes with fraction, which counts: neither is taken without the other",
    "model.source.jobName": "for people; the operator goes by jobUID, since names are used again",
}
"""Fields that change neither children nor status, with where they count."""
LASTING = {
    "suspend": "what is resumed is a new attempt, with the next number",
    "model.digest": "status.history says what was served",
    "model.source.jobUID": "status.history says which job's model was served",
}
"""Fields whose change leaves a trace that is wanted, with the trace."""


class Admission:
    """Asks the API server, with `dryRun`, in one namespace."""

    def __init__(self, world: World, namespace: str) -> None:
        self._world = world
        self._namespace = namespace

    async def __call__(self, obj: Object, old: Object | None) -> Object | str:
        """The object as it would be stored, or the refusal's message. `old` is stored for a moment."""
        kind = KINDS[obj["kind"]]
        path = f"{kind.path}/namespaces/{self._namespace}/{kind.plural}"
        if old is None:
            return await self._ask("POST", path, self._here(obj, obj["metadata"]["name"]))
        name = f"edited-{uuid.uuid4().hex[:8]}"
        made = await self._world.request("POST", path, self._here(old, name))
        put = self._here(obj, name)
        put["metadata"]["resourceVersion"] = made["metadata"]["resourceVersion"]
        answer = await self._ask("PUT", f"{path}/{name}", put)
        await self._world.request("DELETE", f"{path}/{name}")
        return answer

    async def _ask(self, method: str, path: str, obj: Object) -> Object | str:
        code, answer = await self._world.send(method, f"{path}?dryRun=All&fieldValidation=Strict", obj)
        if code >= 400:
            return str(answer["message"])
        return {**obj, "spec": answer["spec"]}

    def _here(self, obj: Object, name: str) -> Object:
        body = {key: value for key, value in obj.items() if key != "status"}
        return {**body, "metadata": {"name": name, "namespace": self._namespace}}


async def sweep_fields(world: World, namespace: str, step: int) -> dict[str, Findings]:
    """Every so manieth field of both kinds."""
    found = {}
    for kind, bases in BASES.items():
        definition = yaml.safe_load((CRDS / f"trimtab.dev_{KINDS[kind].plural}.yaml").read_text())
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        found[kind] = await Sweep(schema, bases, Admission(world, namespace)).run(step)
    return found


def check(findings: Findings) -> None:
    """Raise AssertionError where a field does nothing, or takes what it should not."""
    found = {
        "change nothing": findings.idle - SEEN_ELSEWHERE.keys(),
        "take no value": findings.unset,
        "should have been refused": findings.taken,
        "are refused without their name": findings.mute,
        "leave something else when changed and changed back": set(findings.lasting) - LASTING.keys(),
    }
    assert not any(found.values()), {what: fields for what, fields in found.items() if fields}


def check_tables(found: dict[str, Findings]) -> None:
    """Raise AssertionError where an entry of a table has outlived its reason; after a sweep of all fields."""
    assert set().union(*(each.idle for each in found.values())) == SEEN_ELSEWHERE.keys()
    assert set().union(*(each.lasting for each in found.values())) == LASTING.keys()
