"""The controllers for Jobs and Deployments, as far as the plans use them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from trimtab.local.kube import LocalKube
from trimtab.local.objects import controller_uid, is_true, now
from trimtab_operator.core.conditions import set_condition
from trimtab_operator.core.errors import AlreadyExists
from trimtab_operator.core.kube import DEPLOYMENT, JOB, POD, Change, Object
from trimtab_operator.core.podtemplate import owner_reference

INDEX = "batch.kubernetes.io/job-completion-index"
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


class Workloads:
    """Makes and removes the pods of Jobs and Deployments."""

    def __init__(self, kube: LocalKube, wanted: Callable[[Object], bool]) -> None:
        """`wanted` tells whether a Deployment's pods should run in this run of local mode."""
        self._kube = kube
        self._wanted = wanted
        self._failed: dict[str, set[str]] = {}
        self._dropped: set[str] = set()
        """Pods that a controller ended; their end is no failure of their Job."""
        self._planned = False

    def begin(self) -> None:
        """Bring everything in line with what is stored, then follow the API."""
        for pod in self._kube.select(POD):
            self._count(pod)
        self._kube.subscribe(self._heed)
        self.sync()

    def plan_sync(self) -> None:
        """Look at everything again, soon."""
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self.sync)

    def sync(self) -> None:
        """Bring every Job and Deployment in line."""
        self._planned = False
        for job in self._kube.select(JOB):
            if "deletionTimestamp" not in job["metadata"]:
                self._sync_job(job)
        for deployment in self._kube.select(DEPLOYMENT):
            self._sync_deployment(deployment)

    def _heed(self, change: Change, obj: Object) -> None:
        if obj["kind"] == POD.kind:
            self._count(obj, gone=change is Change.DELETE)
        if obj["kind"] in (POD.kind, JOB.kind, DEPLOYMENT.kind):
            self.plan_sync()

    def _count(self, pod: Object, *, gone: bool = False) -> None:
        """A pod that failed, or that somebody deleted before it succeeded, is a failure of its Job."""
        uid, owner, phase = pod["metadata"]["uid"], controller_uid(pod), pod["status"]["phase"]
        if owner and uid not in self._dropped and (phase == "Failed" or (gone and phase != "Succeeded")):
            self._failed.setdefault(owner, set()).add(uid)

    def _drop(self, pod: Object) -> None:
        self._dropped.add(pod["metadata"]["uid"])
        self._kube.drop(pod)

    def _create(self, owner: Object, name: str, labels: dict[str, str], **spec: str) -> Object | None:
        """A pod of the owner's template; None where chance chose a name that is taken."""
        template = owner["spec"]["template"]
        metadata = template.get("metadata", {})
        suffix = "".join(secrets.choice(_ALPHABET) for _ in range(5))
        pod: Object = {
            "apiVersion": POD.api_version,
            "kind": POD.kind,
            "metadata": {
                "name": f"{name}-{suffix}",
                "namespace": owner["metadata"]["namespace"],
                "labels": metadata.get("labels", {}) | labels,
                "annotations": metadata.get("annotations", {}) | {k: v for k, v in labels.items() if k == INDEX},
                "ownerReferences": [owner_reference(owner)],
            },
            "spec": template["spec"] | spec,
        }
        try:
            return self._kube.put(pod)
        except AlreadyExists:
            self.plan_sync()
            return None

    # Jobs

    def _sync_job(self, job: Object) -> None:
        spec, status = job["spec"], dict(job.get("status", {}))
        if is_true(job, "Complete") or is_true(job, "Failed"):
            return
        pods = self._kube.owned(POD, job["metadata"]["uid"])
        active = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        failed = len(self._failed.get(job["metadata"]["uid"], ()))
        done = {_index(pod) for pod in pods if pod["status"]["phase"] == "Succeeded"}
        completions = spec.get("completions", 1)
        conditions: dict[str, tuple[bool, str, str]] = {}
        if spec.get("suspend"):
            for pod in active:
                self._drop(pod)
            conditions["Suspended"] = (True, "JobSuspended", "Job suspended")
            status.pop("startTime", None)
        elif failed > spec.get("backoffLimit", 6):
            why = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
            for pod in active:
                self._drop(pod)
            conditions["FailureTarget"] = (True, *why)
            if not [pod for pod in self._kube.owned(POD, job["metadata"]["uid"]) if _alive(pod)]:
                conditions["Failed"] = (True, *why)
        elif len(done) >= completions:
            for kind in ("SuccessCriteriaMet", "Complete"):
                conditions[kind] = (True, "CompletionsReached", "Reached expected number of succeeded pods")
            status["completionTime"] = now()
        else:
            status.setdefault("startTime", now())
            if is_true(job, "Suspended"):
                conditions["Suspended"] = (False, "JobResumed", "Job resumed")
            for index in range(completions):
                if index not in done and index not in {_index(pod) for pod in active}:
                    self._create_index(job, index)
        alive = [pod for pod in self._kube.owned(POD, job["metadata"]["uid"]) if _alive(pod)]
        status["active"] = sum("deletionTimestamp" not in pod["metadata"] for pod in alive)
        status["ready"] = sum(is_true(pod, "Ready") for pod in alive)
        status["terminating"] = len(alive) - status["active"]
        status |= {"succeeded": len(done), "failed": failed}
        status["conditions"] = _merged(job, conditions)
        self._kube.set_status(job, status)

    def _create_index(self, job: Object, index: int) -> None:
        name = job["metadata"]["name"]
        labels = {"batch.kubernetes.io/job-name": name, "batch.kubernetes.io/controller-uid": job["metadata"]["uid"]}
        if job["spec"].get("completionMode") != "Indexed":
            self._create(job, name, labels)
            return
        made = {**job, "spec": {**job["spec"], "template": _indexed(job["spec"]["template"])}}
        self._create(made, f"{name}-{index}", {**labels, INDEX: str(index)}, hostname=f"{name}-{index}")

    # Deployments

    def _sync_deployment(self, deployment: Object) -> None:
        spec = deployment["spec"]
        template = json.dumps(spec["template"], sort_keys=True).encode()
        revision = hashlib.sha256(template).hexdigest()[:10]
        replicas = spec.get("replicas", 1) if self._wanted(deployment) else 0
        current: list[Object] = []
        former: list[Object] = []
        for pod in self._kube.owned(POD, deployment["metadata"]["uid"]):
            if not _alive(pod):
                self._drop(pod)
            elif "deletionTimestamp" not in pod["metadata"]:
                same = pod["metadata"]["labels"].get("pod-template-hash") == revision
                (current if same else former).append(pod)
        current.sort(key=lambda pod: not is_true(pod, "Ready"))
        for pod in current[replicas:]:
            self._drop(pod)
        current = current[:replicas]
        for _ in range(replicas - len(current)):
            name = f"{deployment['metadata']['name']}-{revision}"
            made = self._create(deployment, name, {"pod-template-hash": revision})
            current += [made] if made else []
        ready = [pod for pod in current if is_true(pod, "Ready")]
        if len(ready) >= replicas:
            for pod in former:
                self._drop(pod)
            former = []
        enough = len(ready) >= replicas
        available = ("MinimumReplicasAvailable", "") if enough else ("MinimumReplicasUnavailable", "")
        status: Object = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": len(current) + len(former),
            "updatedReplicas": len(current),
            "readyReplicas": len(ready) + sum(is_true(pod, "Ready") for pod in former),
            "availableReplicas": len(ready),
            "unavailableReplicas": replicas - len(ready),
        }
        status["conditions"] = _merged(deployment, {"Available": (enough, *available)})
        self._kube.set_status(deployment, status)


def _indexed(template: dict[str, Any]) -> dict[str, Any]:
    """The template with JOB_COMPLETION_INDEX in each container, as the Job controller adds it."""
    field = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
    entry = {"name": "JOB_COMPLETION_INDEX", "valueFrom": field}
    containers = [each | {"env": [*each.get("env", []), entry]} for each in template["spec"]["containers"]]
    return {**template, "spec": {**template["spec"], "containers": containers}}


def _index(pod: Object) -> int:
    return int(pod["metadata"].get("annotations", {}).get(INDEX, 0))


def _alive(pod: Object) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def _merged(obj: Object, verdicts: dict[str, tuple[bool, str, str]]) -> list[Object]:
    """The object's conditions with these set."""
    conditions: list[Object] = obj.get("status", {}).get("conditions", [])
    for kind, (true, reason, message) in verdicts.items():
        conditions = set_condition(conditions, kind, true, reason, message, 0, datetime.now(UTC))
    return conditions
