"""A tiny cluster for one endpoint: carries out its plans, and plays the Deployment controller."""

from __future__ import annotations

import copy
import itertools
import json
from datetime import UTC, datetime
from typing import Any

from tests.unit.core.guarded import guarded

from trimtab_operator.core.actions import Create, Delete
from trimtab_operator.core.kube import Kind, Object, Ref
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.settings import Settings
from trimtab_operator.modelendpoint.controller import ModelEndpointController

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


def model(letter: str, job: str | None = None) -> dict[str, Any]:
    source = {"source": {"jobName": "job", "jobUID": job}} if job else {}
    return {"uri": f"pvc://models/m/{letter}/model", "digest": digest(letter), **source}


class World:
    def __init__(self, model: dict[str, Any], settings: Settings | None = None, **spec: Any) -> None:
        self.settings = settings or Settings()
        self.controller = ModelEndpointController()
        self.objects: dict[Ref, Object] = {}
        self.refused: Refusal | None = None
        self._uids = itertools.count(1)
        self.key = Ref("ModelEndpoint", "team", "chat")
        self.add("ModelEndpoint", "chat", spec={"servedModelName": "chat", "model": model, "replicas": 1, **spec})

    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        found = self.objects.get(Ref(kind.kind, namespace, name))
        return found and guarded(found)

    def owned(self, kind: Kind, namespace: str, uid: str) -> list[Object]:
        children = self.of_kind(kind.kind)
        return [guarded(o) for o in children if o["metadata"].get("ownerReferences", [{}])[0].get("uid") == uid]

    def labelled(self, kind: Kind, namespace: str, label: str, value: str) -> list[Object]:
        return [guarded(o) for o in self.of_kind(kind.kind) if o["metadata"].get("labels", {}).get(label) == value]

    def refusal(self, ref: Ref) -> Refusal | None:
        return self.refused

    @property
    def owner(self) -> Object:
        return self.objects[self.key]

    @property
    def status(self) -> dict[str, Any]:
        return self.owner.get("status", {})

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})

    def of_kind(self, kind: str) -> list[Object]:
        return [o for ref, o in sorted(self.objects.items()) if ref.kind == kind]

    def deployment(self, letter: str) -> Object | None:
        named = {o["metadata"]["labels"]["trimtab.dev/revision"]: o for o in self.of_kind("Deployment")}
        return named.get(letter * 12)

    def selected(self) -> str:
        return self.of_kind("Service")[0]["spec"]["selector"]["trimtab.dev/revision"][0]

    def add(self, kind: str, name: str, **fields: Any) -> Object:
        number = next(self._uids)
        metadata = {"name": name, "namespace": "team", "generation": 1}
        metadata |= {"uid": f"{number:08x}-uid", "resourceVersion": str(number)}
        version = "trimtab.dev/v1alpha1" if kind in ("ModelEndpoint", "FineTuneJob") else "v1"
        made = {"apiVersion": version, "kind": kind, "metadata": metadata | fields.pop("metadata", {}), **fields}
        self.objects[Ref(kind, "team", name)] = made
        return made

    def edit(self, **spec: Any) -> None:
        self.owner["spec"] |= spec
        self.owner["metadata"]["generation"] += 1

    def reconcile(self) -> bool:
        plan = self.controller.plan(self.owner, self.controller.observe(self, self.owner), self.settings, NOW)
        changed = False
        for action in plan.actions:
            if isinstance(action, Delete):
                changed |= self.objects.pop(Ref(action.kind.kind, "team", action.name), None) is not None
                continue
            desired = copy.deepcopy(action.obj)
            live = self.objects.get(Ref(desired["kind"], "team", desired["metadata"]["name"]))
            if live is None:
                fields = {key: value for key, value in desired.items() if key not in ("apiVersion", "kind")}
                name = desired["metadata"]["name"]
                made = self.add(desired["kind"], name, **fields)
                if desired["kind"] == "Service":
                    made["spec"] |= {"clusterIP": "10.96.0.7"}
                changed = True
            elif not isinstance(action, Create) and {**live["spec"], **desired["spec"]} != live["spec"]:
                live["spec"] |= desired["spec"]
                live["metadata"]["generation"] += 1
                changed = True
        if plan.status is not None and plan.status != self.status:
            self.owner["status"] = json.loads(json.dumps(plan.status))
            changed = True
        return changed

    def settle(self) -> None:
        for _ in range(20):
            if not self.reconcile():
                return
        raise AssertionError(f"no rest: {self.status}")

    def ready(self, letter: str, count: int | None = None) -> None:
        """The Deployment controller says that so many pods are ready; all by default."""
        deployment = self.deployment(letter)
        assert deployment is not None
        replicas = deployment["spec"]["replicas"]
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": replicas,
            "updatedReplicas": replicas,
            "readyReplicas": replicas if count is None else count,
        }

    def pod(self, letter: str, **status: Any) -> None:
        labels = {"trimtab.dev/endpoint": "chat", "trimtab.dev/revision": letter * 12}
        self.add("Pod", f"pod-{letter}", metadata={"labels": labels}, spec={}, status={"phase": "Running", **status})
