"""What the contract suite needs of an implementation of `Kube`, and the objects that it writes."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trimtab_operator.core.kube import (
    CONFIGMAP,
    DEPLOYMENT,
    FINETUNEJOB,
    JOB,
    MODELENDPOINT,
    Change,
    Kind,
    Kube,
    Object,
)

PATIENCE_SECONDS = 60.0
"""How long something that must happen may take: far more than it does, for busy machines."""

Value = TypeVar("Value")


@dataclass
class Recorder:
    """A `Sink` that keeps what it is given."""

    events: list[tuple[Change, Object]] = field(default_factory=list)

    def __call__(self, change: Change, obj: Object) -> None:
        self.events.append((change, obj))

    def of(self, uid: str) -> list[tuple[Change, Object]]:
        """The events of one object, in order."""
        return [event for event in self.events if event[1]["metadata"]["uid"] == uid]


@dataclass
class Api:
    """One implementation under test; a fixture named `api` gives it.

    Its namespace is empty. The CRDs are installed, the controllers for Jobs, Deployments and garbage run, and pods run
    on something: `pod_template` asks for it in the words of both a kubelet and tests/controlplane/stages. `recorder`
    has been given every event of ConfigMaps since before the test began.
    """

    kube: Kube
    namespace: str
    recorder: Recorder


async def eventually(question: Callable[[], Awaitable[Value | None]]) -> Value:
    """The first true answer; AssertionError where there is none in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        answer = await question()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not so after {PATIENCE_SECONDS:.0f} s; the last answer was {answer!r}"
        await asyncio.sleep(0.05)


async def until_gone(api: Api, kind: Kind, name: str) -> None:
    """Wait until there is no such object."""

    async def gone() -> bool:
        return await api.kube.get(kind, api.namespace, name) is None

    await eventually(gone)


def unique(stem: str) -> str:
    """A name that no other test has."""
    return f"{stem}-{uuid.uuid4().hex[:6]}"


def manifest(api: Api, kind: Kind, name: str, /, **body: Any) -> Object:
    """An object's start; `metadata` in `body` is merged into its metadata."""
    metadata = {"name": name, "namespace": api.namespace, **body.pop("metadata", {})}
    return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **body}


def configmap(api: Api, name: str, data: dict[str, str] | None = None, **metadata: Any) -> Object:
    """A ConfigMap."""
    return manifest(api, CONFIGMAP, name, metadata=metadata, data=data or {})


def finetunejob(api: Api, name: str, **spec: Any) -> Object:
    """A FineTuneJob of one stage."""
    stage = {"name": "first", "pretrain": {"data": [{"uri": "pvc://data/text.txt"}]}}
    base = {
        "model": {"uri": "pvc://models/base"},
        "artifacts": {"uri": "pvc://artifacts/runs"},
        "stages": [stage],
    }
    return manifest(api, FINETUNEJOB, name, spec=base | spec)


def modelendpoint(api: Api, name: str, **spec: Any) -> Object:
    """A ModelEndpoint."""
    return manifest(
        api, MODELENDPOINT, name, spec={"servedModelName": "m", "model": {"uri": "job://other/first"}} | spec
    )


def owner_reference(owner: Object) -> dict[str, Any]:
    """A controller ownerReference to `owner`."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


FOREVER = "import time; time.sleep(3600)"


def pod_template(component: str, exit_code: int | None, labels: dict[str, str]) -> dict[str, Any]:
    """A pod that exits at once with `exit_code`; with None it runs until it is deleted."""
    script = FOREVER if exit_code is None else f"raise SystemExit({exit_code})"
    annotations = {"test.trimtab.dev/exit-code": str(exit_code)} if exit_code else {}
    container = {"name": "main", "image": "none", "command": ["python", "-c", script]}
    return {
        "metadata": {"labels": {"app.kubernetes.io/component": component, **labels}, "annotations": annotations},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 1},
    }


def indexed_job(api: Api, name: str, *, completions: int, exit_code: int | None) -> Object:
    """An Indexed Job as the operator makes them; its pods carry the label `contract: NAME`."""
    template = pod_template("train" if exit_code is not None else "endless", exit_code, {"contract": name})
    template["spec"]["restartPolicy"] = "Never"
    spec = {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": completions,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "template": template,
    }
    return manifest(api, JOB, name, spec=spec)


def deployment(api: Api, name: str, *, replicas: int) -> Object:
    """A Deployment whose pods carry the label `contract: NAME`."""
    template = pod_template("serve", None, {"contract": name})
    selector = {"matchLabels": {"contract": name}}
    return manifest(api, DEPLOYMENT, name, spec={"replicas": replicas, "selector": selector, "template": template})


def condition(obj: Object, kind: str) -> dict[str, Any]:
    """A condition by its type; empty where it is not set."""
    for entry in obj.get("status", {}).get("conditions", []):
        if entry["type"] == kind:
            return dict(entry)
    return {}
