"""A small controller, and a `Kube` that fails when it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from trimtab.local.kube import LocalKube
from trimtab.local.state import State
from trimtab_operator.core.actions import Action, Apply, Create, EventNote, EventType, Plan
from trimtab_operator.core.controller import Reader
from trimtab_operator.core.kube import CONFIGMAP, FINETUNEJOB, JOB, Feed, Kind, Kube, Object, Ref, Sink, ref_of
from trimtab_operator.core.names import LABEL_MANAGED_BY, MANAGED_BY
from trimtab_operator.core.refusals import Refusal
from trimtab_operator.core.runtime import Runtime
from trimtab_operator.core.settings import Settings

SETTINGS = Settings(workers=2, backoff_cap_seconds=0.05, resync_seconds=600)


@dataclass(frozen=True)
class Seen:
    configmaps: list[Object]
    jobs: list[Object]
    refusal: Refusal | None


class Toy:
    """Gives each FineTuneJob a ConfigMap and, once the status says so, a Job; then the status counts both."""

    kind = FINETUNEJOB

    def observe(self, reader: Reader, obj: Object) -> Seen:
        namespace, uid = obj["metadata"]["namespace"], obj["metadata"]["uid"]
        owned = (reader.owned(kind, namespace, uid) for kind in (CONFIGMAP, JOB))
        return Seen(*owned, reader.refusal(ref_of(obj)))

    def plan(self, obj: Object, observation: Seen, settings: Settings, now: datetime) -> Plan:
        if obj["metadata"]["name"] == "poison":
            raise ZeroDivisionError("no plan for this one")
        child = {**self._child(obj, CONFIGMAP, "config"), "data": {"suspend": str(obj["spec"]["suspend"])}}
        actions: list[Action] = [Apply(child)]
        running = obj.get("status", {}).get("phase") == "Running"
        if running and not obj["spec"]["suspend"]:
            actions.append(Create(self._child(obj, JOB, "job") | {"spec": JOB_SPEC}))
        reason = f"{len(observation.configmaps)}+{len(observation.jobs)}"
        if observation.refusal is not None:
            reason = f"{observation.refusal.reason} {observation.refusal.target.name}: {observation.refusal.message}"[
                :128
            ]
        generation = obj["metadata"]["generation"]
        status = {**obj.get("status", {}), "phase": "Running", "reason": reason, "observedGeneration": generation}
        notes = () if running else (EventNote(EventType.NORMAL, "Started", "the toy has started"),)
        return Plan(tuple(actions), status, notes)

    def interested(self, obj: Object) -> list[Ref]:
        return []

    def _child(self, owner: Object, kind: Kind, suffix: str) -> Object:
        metadata = owner["metadata"]
        reference = {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        return {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": {
                "name": f"{metadata['name']}-{suffix}",
                "namespace": metadata["namespace"],
                "labels": {LABEL_MANAGED_BY: MANAGED_BY},
                "ownerReferences": [reference],
            },
        }


JOB_SPEC = {
    "completionMode": "Indexed",
    "completions": 1,
    "parallelism": 1,
    "backoffLimit": 0,
    "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "main", "image": "none"}]}},
}


@dataclass
class Faulty:
    """A `Kube` that notes each write and, before or after it, does what the test asks for."""

    kube: Kube
    writes: list[tuple[str, Ref]] = field(default_factory=list)
    before: Callable[[str, Ref], None] = lambda verb, ref: None
    after: Callable[[str, Ref], None] = lambda verb, ref: None

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return await self.kube.get(kind, namespace, name)

    async def list_objects(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        return await self.kube.list_objects(kind, namespace=namespace, labels=labels)

    async def list_metadata(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        return await self.kube.list_metadata(kind, namespace=namespace, labels=labels)

    async def create(self, obj: Object, *, manager: str) -> Object:
        return await self._write("create", obj, manager)

    async def apply(self, obj: Object, *, manager: str) -> Object:
        return await self._write("apply", obj, manager)

    async def apply_status(self, obj: Object, *, manager: str) -> Object:
        return await self._write("apply_status", obj, manager)

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> None:
        ref = Ref(kind.kind, namespace, name)
        self.writes.append(("delete", ref))
        self.before("delete", ref)
        await self.kube.delete(kind, namespace, name, uid=uid, version=version)
        self.after("delete", ref)

    async def _write(self, verb: str, obj: Object, manager: str) -> Object:
        ref = ref_of(obj)
        self.writes.append((verb, ref))
        self.before(verb, ref)
        answer: Object = await getattr(self.kube, verb)(obj, manager=manager)
        self.after(verb, ref)
        return answer


@dataclass
class Deaf:
    """A `Feed` that passes nothing on while `deaf`."""

    feed: Feed
    deaf: bool = False

    def subscribe(self, sink: Sink) -> None:
        self.feed.subscribe(lambda change, obj: None if self.deaf else sink(change, obj))


@dataclass
class World:
    """An in-memory API, and the operator on it."""

    local: LocalKube
    kube: Faulty
    feed: Deaf

    @asynccontextmanager
    async def operator(self, settings: Settings = SETTINGS, **options: Any) -> AsyncIterator[Runtime]:
        """A running operator of Toys."""
        runtime = Runtime(self.kube, self.feed, [Toy()], settings, **options)
        await runtime.start()
        runtime.workers.begin()
        try:
            yield runtime
        finally:
            await runtime.stop()

    async def submit(self, name: str = "job", **spec: Any) -> Object:
        """A user creates a FineTuneJob, or changes its spec."""
        stage = {"name": "first", "pretrain": {"data": [{"uri": "pvc://data/text.txt"}]}}
        base = {"model": {"uri": "pvc://m/b"}, "artifacts": {"uri": "pvc://a/r"}, "stages": [stage]}
        metadata = {"name": name, "namespace": "default"}
        obj = {"apiVersion": FINETUNEJOB.api_version, "kind": FINETUNEJOB.kind, "metadata": metadata}
        return await self.local.apply({**obj, "spec": base | spec}, manager="user")

    def job(self, name: str = "job") -> Object | None:
        return self.local.find(FINETUNEJOB, "default", name)

    def status(self, name: str = "job") -> Object:
        return dict((self.job(name) or {}).get("status", {}))

    def config(self, name: str = "job") -> Object | None:
        return self.local.find(CONFIGMAP, "default", f"{name}-config")


def world(folder: Path) -> World:
    """A new, empty one."""
    local = LocalKube(State(folder / "state.db"), lambda: "127.0.0.2")
    return World(local, Faulty(local), Deaf(local))
