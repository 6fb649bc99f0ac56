"""An API server in memory whose every past state can be seen again, with the controllers and pods that plans rely on.

Nothing here happens by itself or by chance: a test says what happens next, so that a failure can be told again.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab_operator.core.conditions import timestamp
from trimtab_operator.core.errors import AlreadyExists, Conflict, NotFound
from trimtab_operator.core.kube import Change, Kind, Object, Ref, ref_of

NAMESPACE = "team"
START = datetime(2026, 1, 1, tzinfo=UTC)
Entry = tuple[Change, Object]


class Cluster:
    """`Kube` in memory: versions, generations, preconditions, garbage collection; and what users and nodes do.

    Attributes:
        objects: What is live.
        log: Every change so far; the first n entries are a view as of then.
        now: The time.
    """

    def __init__(self) -> None:
        self.now = START
        self.objects: dict[Ref, Object] = {}
        self.log: list[Entry] = []
        self._uids = itertools.count(1)
        self._versions = itertools.count(1)
        self._spawned: dict[str, set[int]] = {}

    # -- Kube
    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return copy.deepcopy(self.objects.get(Ref(kind.kind, namespace, name)))

    async def list_objects(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        return [copy.deepcopy(obj) for obj in self.of_kind(kind.kind) if _selected(obj, labels or {})]

    list_metadata = list_objects

    async def create(self, obj: Object, *, manager: str) -> Object:
        if ref_of(obj) in self.objects:
            raise AlreadyExists(409, "AlreadyExists", f"{ref_of(obj)} already exists")
        return self.add(obj)

    async def apply(self, obj: Object, *, manager: str) -> Object:
        live = self.objects.get(ref_of(obj))
        _check(ref_of(obj), obj["metadata"], live)
        if live is None:
            return self.add(obj)
        changed = copy.deepcopy(live)
        for key, value in obj.items():
            if key == "spec":
                changed["spec"] |= copy.deepcopy(value)
            elif key == "metadata":
                for part in ("labels", "annotations"):
                    changed["metadata"].setdefault(part, {}).update(value.get(part, {}))
                changed["metadata"]["ownerReferences"] = value.get("ownerReferences", [])
        return self.replace(changed)

    async def apply_status(self, obj: Object, *, manager: str) -> Object:
        live = self.objects.get(ref_of(obj))
        if live is None:
            raise NotFound(404, "NotFound", f"{ref_of(obj)} not found")
        _check(ref_of(obj), obj["metadata"], live)
        return self.replace({**live, "status": copy.deepcopy(obj["status"])})

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> None:
        live = self.objects.get(Ref(kind.kind, namespace, name))
        if live is None:
            return
        _check(ref_of(live), {"uid": uid, "resourceVersion": version}, live)
        self.remove(live)

    # -- what anybody does
    def of_kind(self, kind: str) -> list[Object]:
        return [obj for ref, obj in sorted(self.objects.items()) if ref.kind == kind]

    def find(self, kind: str, name: str) -> Object | None:
        return self.objects.get(Ref(kind, NAMESPACE, name))

    def owned(self, kind: str, uid: str) -> list[Object]:
        return [obj for obj in self.of_kind(kind) if uid in owners(obj)]

    def add(self, obj: Object) -> Object:
        made = copy.deepcopy(obj)
        made["metadata"] = {key: value for key, value in made["metadata"].items() if key != "resourceVersion"}
        made["metadata"] |= {"uid": f"{next(self._uids):08x}-uid", "creationTimestamp": timestamp(self.now)}
        made["metadata"] |= {"generation": 1, "namespace": NAMESPACE}
        if made["kind"] == "Service":
            made["spec"].setdefault("clusterIP", "10.0.0.8")
        return self._write(made)

    def replace(self, obj: Object) -> Object:
        """Write a changed object; nothing where it is as before."""
        live = self.objects[ref_of(obj)]
        if obj == live:
            return copy.deepcopy(live)
        changed = copy.deepcopy(obj)
        if changed.get("spec") != live.get("spec"):
            changed["metadata"]["generation"] = live["metadata"]["generation"] + 1
        return self._write(changed)

    def edit(self, obj: Object, **spec: Any) -> Object:
        return self.replace({**obj, "spec": {**obj["spec"], **spec}})

    def remove(self, obj: Object) -> None:
        """Delete: a pod that runs ends gracefully, anything else is gone at once; then what it owned goes."""
        if obj["kind"] == "Pod" and obj["status"]["phase"] in ("Pending", "Running"):
            if "deletionTimestamp" not in obj["metadata"]:
                leaving = {**obj["metadata"], "deletionTimestamp": timestamp(self.now)}
                self.replace({**obj, "metadata": leaving})
            return
        gone = copy.deepcopy(self.objects.pop(ref_of(obj)))
        gone["metadata"]["resourceVersion"] = str(next(self._versions))
        self.log.append((Change.DELETE, gone))
        self.collect()

    def orphan(self, obj: Object) -> None:
        """Delete, and let what it owned live on without an owner."""
        uid = obj["metadata"]["uid"]
        for child in [child for child in self.objects.values() if uid in owners(child)]:
            kept = [ref for ref in child["metadata"]["ownerReferences"] if ref["uid"] != uid]
            self.replace({**child, "metadata": {**child["metadata"], "ownerReferences": kept}})
        self.remove(obj)

    def collect(self) -> None:
        """Garbage collection."""
        alive = {obj["metadata"]["uid"] for obj in self.objects.values()}
        for obj in list(self.objects.values()):
            if ref_of(obj) in self.objects and owners(obj) and not alive & set(owners(obj)):
                self.remove(self.objects[ref_of(obj)])

    def _write(self, obj: Object) -> Object:
        obj["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[ref_of(obj)] = obj
        self.log.append((Change.UPSERT, copy.deepcopy(obj)))
        return copy.deepcopy(obj)

    def view(self, entries: int, kind: str) -> list[Object]:
        """The objects of a kind as they were after so many entries of the log."""
        seen: dict[Ref, Object] = {}
        for change, obj in self.log[:entries]:
            if obj["kind"] == kind:
                if change is Change.DELETE:
                    seen.pop(ref_of(obj), None)
                else:
                    seen[ref_of(obj)] = obj
        return list(seen.values())

    # -- Job controller, Deployment controller, kubelet
    def tick(self) -> None:
        """The controllers look at everything once."""
        for job in self.of_kind("Job"):
            self._drive_job(job)

    def _drive_job(self, job: Object) -> None:
        uid, pods = job["metadata"]["uid"], self.owned("Pod", job["metadata"]["uid"])
        if job.get("status", {}).get("conditions"):
            return
        spawned = self._spawned.setdefault(uid, set())
        for index in sorted(set(range(job["spec"]["completions"])) - spawned):
            spawned.add(index)
            self.add(_pod(job, index))
        pods = self.owned("Pod", uid)
        bad = [pod for pod in pods if pod["status"]["phase"] == "Failed"]
        if bad or len(pods) < len(spawned):
            for pod in pods:
                if pod["status"]["phase"] == "Running":
                    self.remove(pod)
            if not any(pod["status"]["phase"] == "Running" for pod in pods):
                self._conclude(job, "Failed", "BackoffLimitExceeded")
        elif all(pod["status"]["phase"] == "Succeeded" for pod in pods):
            self._conclude(job, "Complete", "CompletionsReached")

    def _conclude(self, job: Object, kind: str, reason: str) -> None:
        held = {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": timestamp(self.now)}
        self.replace({**job, "status": {"conditions": [held]}})

    def running(self) -> list[Object]:
        return [pod for pod in self.of_kind("Pod") if pod["status"]["phase"] == "Running"]

    def end(self, pod: Object, code: int, message: str = "", *, disrupted: bool = False) -> None:
        """A pod's container ends; a pod that was deleted goes."""
        ended = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "message": message,
            "finishedAt": timestamp(self.now),
        }
        status: Object = {
            **pod["status"],
            "phase": "Failed" if code else "Succeeded",
            "containerStatuses": [{"name": "trainer", "state": {"terminated": ended}}],
        }
        if disrupted:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}]
        self.replace({**pod, "status": status})
        if "deletionTimestamp" in pod["metadata"]:
            self.remove(self.objects[ref_of(pod)])
        self.tick()

    def lose(self, pod: Object) -> None:
        """Its node is gone: the pod vanishes without a last word."""
        self.replace({**pod, "status": {**pod["status"], "phase": "Failed", "reason": "NodeLost"}})
        self.remove(self.objects[ref_of(pod)])
        self.tick()

    def serve(self, deployment: Object, ready: bool = True) -> None:
        """All pods of a Deployment are ready, or none is."""
        replicas = deployment["spec"].get("replicas", 1)
        status = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": replicas,
            "updatedReplicas": replicas,
            "readyReplicas": replicas if ready else 0,
        }
        self.replace({**deployment, "status": status})

    def sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def _check(ref: Ref, required: Mapping[str, Any], live: Object | None) -> None:
    """The preconditions of a write."""
    for key in ("uid", "resourceVersion"):
        wanted = required.get(key)
        if wanted is not None and (live is None or wanted != live["metadata"][key]):
            raise Conflict(409, "Conflict", f"{ref}: {key} {wanted} is not the live one")


def owners(obj: Object) -> list[str]:
    """Uids of the controllers."""
    return [ref["uid"] for ref in obj["metadata"].get("ownerReferences", []) if ref.get("controller")]


def labelled(obj: Object, **labels: str | None) -> Object:
    """A copy with `trimtab.dev/` labels changed; None takes one away."""
    given = dict(obj["metadata"].get("labels", {}))
    for key, value in labels.items():
        name = "app.kubernetes.io/managed-by" if key == "managed_by" else f"trimtab.dev/{key}"
        given.pop(name, None) if value is None else given.update({name: value})
    return {**obj, "metadata": {**obj["metadata"], "labels": given}}


def _selected(obj: Object, labels: Mapping[str, str | None]) -> bool:
    given = obj["metadata"].get("labels", {})
    return all(key in given and value in (None, given[key]) for key, value in labels.items())


def _pod(job: Object, index: int) -> Object:
    template = job["spec"]["template"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
    labels = {**template["metadata"]["labels"], "batch.kubernetes.io/job-completion-index": str(index)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{job['metadata']['name']}-{index}-{job['metadata']['uid'][:8]}",
            "namespace": NAMESPACE,
            "labels": labels,
            "ownerReferences": [{**owner, "controller": True}],
        },
        "spec": {**template["spec"], "nodeName": "node-1"},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }
