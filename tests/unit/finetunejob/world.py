"""A tiny cluster for plans: carries out their actions on raw objects, and plays Job controller and kubelet."""

from __future__ import annotations

import copy
import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.unit.core.guarded import guarded

from trimtab_operator.core.actions import Action, Apply, Confirm, Create, Delete, Plan
from trimtab_operator.core.apply import target_of
from trimtab_operator.core.conditions import timestamp
from trimtab_operator.core.kube import Kind, Object, Ref
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob.controller import FineTuneJobController

DIGEST = "sha256:" + "a" * 64
START = datetime(2026, 1, 1, tzinfo=UTC)


class Crash(Exception):
    """The operator dies between two writes."""


class World:
    def __init__(self, spec: dict[str, Any], settings: Settings | None = None, name: str = "job") -> None:
        self.now = START
        self.settings = settings or Settings()
        self.objects: dict[Ref, Object] = {}
        self._uids = itertools.count(1)
        self.controller = FineTuneJobController()
        self.refused: Refusal | None = None
        self.status_writes: list[Object] = []
        self.spent: list[tuple[str, float]] = []
        self.created: list[Object] = []
        """Every Job ever created, as it was when the API server took it, with the owner's status of that moment."""
        self.owner_at_creation: list[Object] = []
        self.key = Ref("FineTuneJob", "team", name)
        self.add(
            {
                "apiVersion": "trimtab.dev/v1alpha1",
                "kind": "FineTuneJob",
                "metadata": {"name": name, "namespace": "team", "generation": 1},
                "spec": spec,
            }
        )
        self.add_claim("models")

    # -- what a Reader offers
    def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        found = self.objects.get(Ref(kind.kind, namespace, name))
        return found and guarded(found)

    def owned(self, kind: Kind, namespace: str, uid: str) -> list[Object]:
        return [guarded(o) for o in self.of_kind(kind.kind) if uid in _controllers(o)]

    def labelled(self, kind: Kind, namespace: str, label: str, value: str) -> list[Object]:
        return [guarded(o) for o in self.of_kind(kind.kind) if o["metadata"].get("labels", {}).get(label) == value]

    def refusal(self, ref: Ref) -> Refusal | None:
        return self.refused

    # -- objects
    @property
    def owner(self) -> Object:
        return self.objects[self.key]

    @property
    def status(self) -> dict[str, Any]:
        return self.owner.get("status", {})

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status.get("conditions", []) if c["type"] == kind), {})

    def stage(self, name: str) -> dict[str, Any]:
        return next(s for s in self.status["stages"] if s["name"] == name)

    def of_kind(self, kind: str) -> list[Object]:
        return [o for ref, o in sorted(self.objects.items()) if ref.kind == kind]

    def jobs(self, role: str | None = None) -> list[Object]:
        return [o for o in self.of_kind("Job") if role is None or _role(o) == role]

    def pods(self, role: str | None = None) -> list[Object]:
        return [o for o in self.of_kind("Pod") if role is None or _role(o) == role]

    def config(self, role: str) -> dict[str, Any]:
        """The stage's JSON of the attempt that runs."""
        (job,) = self.jobs(role)
        (found,) = (o for o in self.of_kind("ConfigMap") if o["metadata"]["name"] == job["metadata"]["name"])
        return dict(json.loads(found["data"]["stage.json"]))

    def add(self, obj: Object) -> Object:
        made = copy.deepcopy(obj)
        number = next(self._uids)
        made["metadata"] |= {"uid": f"{number:08x}-uid", "resourceVersion": str(number)}
        made["metadata"] |= {"creationTimestamp": timestamp(self.now)}
        self.objects[Ref(made["kind"], made["metadata"]["namespace"], made["metadata"]["name"])] = made
        return made

    def add_claim(self, name: str, *modes: str) -> None:
        self.add(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name, "namespace": "team"},
                "spec": {"accessModes": list(modes or ("ReadWriteMany",))},
            }
        )

    def remove(self, obj: Object) -> None:
        """Delete with all that it controls; pods with a node end gracefully first."""
        uid = obj["metadata"]["uid"]
        self.objects.pop(Ref(obj["kind"], "team", obj["metadata"]["name"]), None)
        for child in [o for o in self.objects.values() if uid in _controllers(o)]:
            if child["kind"] == "Pod" and child["status"]["phase"] == "Running":
                child["metadata"]["deletionTimestamp"] = timestamp(self.now)
            else:
                self.remove(child)

    def edit(self, **spec: Any) -> None:
        self.owner["spec"] |= spec
        self.owner["metadata"]["generation"] += 1

    def sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    # -- the operator
    def plan(self) -> Plan:
        return self.controller.plan(self.owner, self.controller.observe(self, self.owner), self.settings, self.now)

    def reconcile(self, crash_after: int | None = None) -> bool:
        """One plan; True where it changed something. Crashes after so many writes."""
        if self.key not in self.objects:
            return False
        plan = self.plan()
        written = 0
        for action in plan.actions:
            if written == crash_after:
                raise Crash
            written += self.carry_out(action)
        if plan.status is not None and plan.status != self.status:
            if written == crash_after:
                raise Crash
            self._write_status(plan)
            written += 1
        return written > 0

    def refuse(self) -> None:
        """One plan whose first write the API server refuses, as where a quota is used up: the status tells of it."""
        plan = self.plan()
        if not plan.actions:
            return
        self.refused = Refusal(target_of(plan.actions[0]), "Forbidden", "exceeded quota: pods")
        self._write_status(self.plan())
        self.refused = None

    def _write_status(self, plan: Plan) -> None:
        if plan.status is None or plan.status == self.status:
            return
        self.owner["status"] = json.loads(json.dumps(plan.status))
        self.status_writes.append(self.owner["status"])
        self.spent += [(each.outcome, each.accelerator_seconds) for each in plan.spent]

    def settle(self, most: int = 50) -> None:
        """Reconcile until nothing changes."""
        for _ in range(most):
            if not self.reconcile():
                return
        raise AssertionError(f"no rest after {most} plans: {self.status}")

    def carry_out(self, action: Action) -> int:
        if isinstance(action, Confirm):
            wanted = action.labels.items()
            assert not [o for o in self.of_kind(action.kind.kind) if wanted <= o["metadata"]["labels"].items()]
            return 0
        if isinstance(action, Delete):
            obj = self.objects.get(Ref(action.kind.kind, action.namespace, action.name))
            if obj is None or obj["metadata"]["uid"] != action.uid:
                return 0
            self.remove(obj)
            return 1
        ref = Ref(action.obj["kind"], action.obj["metadata"]["namespace"], action.obj["metadata"]["name"])
        live = self.objects.get(ref)
        if live is None:
            made = self.add(action.obj)
            if ref.kind == "Job":
                self.created.append(copy.deepcopy(made))
                self.owner_at_creation.append(copy.deepcopy(self.owner))
                self._start(made)
            return 1
        if isinstance(action, Create):
            return 0
        assert isinstance(action, Apply)
        before = copy.deepcopy(live)
        live["spec"] |= action.obj["spec"]
        return int(live != before)

    # -- Job controller and kubelet
    def _start(self, job: Object) -> None:
        if job["spec"].get("suspend"):
            self._suspended(job, "True")
            return
        for index in range(job["spec"]["completions"]):
            template = job["spec"]["template"]
            name = f"{job['metadata']['name']}-{index}-x"
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name,
                    "namespace": "team",
                    "labels": {
                        **template["metadata"]["labels"],
                        "batch.kubernetes.io/job-completion-index": str(index),
                    },
                    "finalizers": ["batch.kubernetes.io/job-tracking"],
                    "ownerReferences": [
                        {
                            "apiVersion": "batch/v1",
                            "kind": "Job",
                            "name": job["metadata"]["name"],
                            "uid": job["metadata"]["uid"],
                            "controller": True,
                        }
                    ],
                },
                "spec": {**template["spec"], "nodeName": "node-1"},
                "status": {
                    "phase": "Running",
                    "podIP": "10.0.0.1",
                    "containerStatuses": [
                        {"name": "trainer", "state": {"running": {"startedAt": timestamp(self.now)}}}
                    ],
                },
            }
            self.add(pod)

    def end(self, pod: Object, code: int, message: str = "", reason: str = "Error", *, disrupted: bool = False) -> None:
        """A pod's container ends; the Job controller draws the conclusion."""
        self.finish(pod, code, message, reason, disrupted=disrupted)
        uid = pod["metadata"]["ownerReferences"][0]["uid"]
        job = next((o for o in self.jobs() if o["metadata"]["uid"] == uid), None)
        if "deletionTimestamp" in pod["metadata"]:
            self.remove(pod)
        if job is None:
            return
        if not pod["metadata"]["finalizers"]:
            if not job["spec"].get("suspend") and not [p for p in self.pods() if uid in _controllers(p)]:
                self._start(job)
            return
        if code != 0:
            for other in [p for p in self.pods() if uid in _controllers(p) and p["status"]["phase"] == "Running"]:
                other["metadata"]["deletionTimestamp"] = timestamp(self.now)
            self._conclude(job, "Failed", "BackoffLimitExceeded")
        elif all(p["status"]["phase"] == "Succeeded" for p in self.pods() if uid in _controllers(p)):
            self._conclude(job, "Complete", "CompletionsReached")

    def finish(
        self, pod: Object, code: int, message: str = "", reason: str = "Error", *, disrupted: bool = False
    ) -> None:
        """A pod's container ends, and nobody has looked yet."""
        states = [c["state"] for c in pod["status"].get("containerStatuses", [])]
        since = next((s["startedAt"] for state in states for s in state.values() if "startedAt" in s), "")
        pod["status"] |= {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [
                {
                    "name": "trainer",
                    "state": {
                        "terminated": {
                            "exitCode": code,
                            "reason": "Completed" if code == 0 else reason,
                            "message": message,
                            "startedAt": since,
                            "finishedAt": timestamp(self.now),
                        }
                    },
                }
            ],
        }
        if disrupted:
            pod["status"]["conditions"] = [
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
            ]

    # -- Kueue
    def admit(self, role: str, **node_selector: str) -> None:
        """The queue has room: the Job goes on, its pods where Kueue says, once the former ones are gone."""
        (job,) = self.jobs(role)
        assert job["spec"]["suspend"]
        job["spec"]["suspend"] = False
        job["spec"]["template"]["spec"].setdefault("nodeSelector", {}).update(node_selector)
        self._suspended(job, "False")
        if not self.pods(role):
            self._start(job)

    def evict(self, role: str) -> None:
        """The quota is taken back: the Job controller no longer counts the pods, and deletes them."""
        (job,) = self.jobs(role)
        job["spec"]["suspend"] = True
        self._suspended(job, "True")
        for pod in self.pods(role):
            pod["metadata"] |= {"finalizers": [], "deletionTimestamp": timestamp(self.now)}

    def _suspended(self, job: Object, status: str) -> None:
        job["status"] = {
            "conditions": [{"type": "Suspended", "status": status, "lastTransitionTime": timestamp(self.now)}]
        }

    def _conclude(self, job: Object, kind: str, reason: str) -> None:
        job["status"] = {
            "conditions": [
                {"type": kind, "status": "True", "reason": reason, "lastTransitionTime": timestamp(self.now)}
            ]
        }

    def succeed(self, role: str) -> None:
        """All pods of a role end well, the first with the right report."""
        for pod in self.pods(role):
            if pod["status"]["phase"] == "Running":
                self.end(pod, 0, self.report(role))

    def report(self, role: str) -> str:
        if role == "prepare":
            model = self.owner["spec"]["model"].get("uri")
            found = {"digest": DIGEST, "records": 10, "tokens": 100, "steps": 20, "memoryBytes": 2**30, "seconds": 5}
            found["tokensPerSecond"] = 20
            report = {"kind": "prepare", "stages": [found for _ in self.owner["spec"]["stages"]]}
            if model:
                report["model"] = {"uri": "pvc://models/m/models/x", "digest": DIGEST}
            return json.dumps(report)
        return json.dumps({"kind": "train", "digest": DIGEST, "step": 20, "totalSteps": 20})


def _controllers(obj: Object) -> list[str]:
    return [ref["uid"] for ref in obj["metadata"].get("ownerReferences", []) if ref.get("controller")]


def _role(obj: Object) -> str:
    labels = obj["metadata"]["labels"]
    return labels.get("trimtab.dev/stage", "prepare")


def stage(name: str = "one", *, source: str | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        **({"from": source} if source else {}),
        "pretrain": {"data": [{"uri": "pvc://models/data/text.jsonl"}]},
        **fields,
    }


def spec(*stages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "model": {"config": {"model_type": "llama"}, "tokenizer": {"train": {}}},
        "artifacts": {"uri": "pvc://models/m"},
        "suspend": False,
        "stages": list(stages) or [stage()],
        **fields,
    }
