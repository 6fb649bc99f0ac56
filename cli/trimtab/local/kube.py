"""The Kubernetes API in memory, each write at once on disk: what the plans rely on, and no more."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trimtab.local.fields import SERVER_FIELDS, apply, built_in_list_keys, owned_part
from trimtab.local.objects import at, controller_uid, now
from trimtab.local.state import Record, State
from trimtab.manifests.admission import ADMISSIONS
from trimtab_operator.core.errors import AlreadyExists, Conflict, Invalid, NotFound
from trimtab_operator.core.kube import CLAIM, CONFIGMAP, KINDS, POD, SERVICE, Change, Kind, Object, Ref, Sink, ref_of

SECRET = Kind("v1", "Secret", "secrets")
LOCAL_KINDS = {**KINDS, SECRET.kind: SECRET}
_WITHOUT_STATUS = {CONFIGMAP.kind, SECRET.kind, "Event"}
_WITHOUT_GENERATION = {*_WITHOUT_STATUS, SERVICE.kind, CLAIM.kind, POD.kind}


class LocalKube:
    """`Kube` and `Feed` over a `State`.

    The methods without `async` are the same writes for the controllers and the kubelet of local mode: nothing else runs
    between their look and their write, so they need no preconditions.
    """

    def __init__(self, state: State, take_address: Callable[[], str]) -> None:
        """Load what the state holds. `take_address` gives each Service its clusterIP."""
        self._state = state
        self._take_address = take_address
        self._records = dict(state.load())
        self._version = state.version()
        self._sinks: list[Sink] = []
        self._untold: deque[tuple[Change, Object]] = deque()
        self._telling = False
        self._sweep_planned = False
        self._sweep()

    def subscribe(self, sink: Sink) -> None:
        """Deliver every later event to `sink`, of all kinds."""
        self._sinks.append(sink)

    # What controllers and kubelet use.

    def find(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """A copy of the object."""
        record = self._records.get(Ref(kind.kind, namespace, name))
        return copy.deepcopy(record.obj) if record else None

    def select(
        self, kind: Kind, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        """Copies of the objects with these labels, by namespace and name; a value of None asks for presence."""
        return [
            copy.deepcopy(record.obj)
            for ref, record in sorted(self._records.items())
            if ref.kind == kind.kind
            and namespace in (None, ref.namespace)
            and _selected(record.obj["metadata"].get("labels", {}), labels or {})
        ]

    def owned(self, kind: Kind, uid: str) -> list[Object]:
        """Copies of the objects whose controller has this uid, by name."""
        return [obj for obj in self.select(kind) if controller_uid(obj) == uid]

    def put(self, obj: Object) -> Object:
        """Create the object.

        Raises:
            AlreadyExists: the name is taken.
            Invalid: the object breaks its schema.
        """
        ref = ref_of(obj)
        if ref in self._records:
            raise AlreadyExists(409, "AlreadyExists", f'{LOCAL_KINDS[ref.kind].plural} "{ref.name}" already exists')
        return self._insert(obj, {})

    def set_status(self, obj: Object, status: Object) -> Object | None:
        """Replace the status of the object of that uid; None where it is gone."""
        record = self._records.get(ref_of(obj))
        if record is None or record.obj["metadata"]["uid"] != obj["metadata"]["uid"]:
            return None
        return self._replace(record, {**record.obj, "status": copy.deepcopy(status)}, record.owners)

    def merge(self, obj: Object, part: Object) -> Object | None:
        """Add `part`'s fields to the object of that uid, its status apart; None where it is gone."""
        record = self._records.get(ref_of(obj))
        if record is None or record.obj["metadata"]["uid"] != obj["metadata"]["uid"]:
            return None
        merged, _ = apply(record.obj, part, {}, "node", self._list_keys(obj["kind"]))
        return self._replace(record, merged, record.owners)

    def remove(self, obj: Object) -> None:
        """Remove the object of that uid at once, and then what it owned."""
        ref = ref_of(obj)
        record = self._records.get(ref)
        if record is None or record.obj["metadata"]["uid"] != obj["metadata"]["uid"]:
            return
        del self._records[ref]
        self._version += 1
        record.obj["metadata"]["resourceVersion"] = str(self._version)
        self._state.remove(ref, self._version)
        self._tell(Change.DELETE, record.obj)
        self._plan_sweep()

    def drop(self, obj: Object) -> None:
        """Delete the object of that uid; a pod on its node stays until the kubelet has stopped it."""
        record = self._records.get(ref_of(obj))
        if record is None or record.obj["metadata"]["uid"] != obj["metadata"]["uid"]:
            return
        metadata, spec = record.obj["metadata"], record.obj.get("spec", {})
        if obj["kind"] != POD.kind or not spec.get("nodeName"):
            self.remove(obj)
        elif "deletionTimestamp" not in metadata:
            leaving = {"deletionTimestamp": now(), "deletionGracePeriodSeconds": spec["terminationGracePeriodSeconds"]}
            self._replace(record, {**record.obj, "metadata": {**metadata, **leaving}}, record.owners)

    # Kube

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """See `Kube.get`."""
        return self.find(kind, namespace, name)

    async def list_objects(
        self,
        kind: Kind,
        *,
        namespace: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> list[Object]:
        """See `Kube.list_objects`."""
        found = self.select(kind, namespace, labels)
        return [obj for obj in found if all(at(obj, path) == value for path, value in (fields or {}).items())]

    async def list_metadata(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        """See `Kube.list_metadata`."""
        keys = ("apiVersion", "kind", "metadata")
        return [{key: obj[key] for key in keys} for obj in self.select(kind, namespace, labels)]

    async def create(self, obj: Object, *, manager: str) -> Object:
        """See `Kube.create`."""
        return self.put(obj)

    async def apply(self, obj: Object, *, manager: str) -> Object:
        """See `Kube.apply`."""
        ref = ref_of(obj)
        record = self._records.get(ref)
        _check_preconditions(obj, record)
        desired = _without(obj, "status") if ref.kind not in _WITHOUT_STATUS else copy.deepcopy(obj)
        owner = f"{manager}/apply"
        keys = self._list_keys(ref.kind)
        if record is None:
            return self._insert(desired, apply({}, owned_part(desired), {}, owner, keys)[1])
        merged, owners = apply(record.obj, owned_part(desired), record.owners, owner, keys)
        return self._replace(record, merged, owners)

    async def apply_status(self, obj: Object, *, manager: str) -> Object:
        """See `Kube.apply_status`."""
        ref = ref_of(obj)
        record = self._records.get(ref)
        if record is None:
            raise NotFound(404, "NotFound", f'{LOCAL_KINDS[ref.kind].plural} "{ref.name}" not found')
        _check_preconditions(obj, record)
        part = {"status": obj.get("status", {})}
        merged, owners = apply(record.obj, part, record.owners, f"{manager}/status", self._list_keys(ref.kind))
        return self._replace(record, merged, owners)

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> None:
        """See `Kube.delete`."""
        obj = self.find(kind, namespace, name)
        if obj is None:
            return
        for key, required in (("uid", uid), ("resourceVersion", version)):
            if required is not None and required != (live := obj["metadata"][key]):
                raise Conflict(409, "Conflict", f"{kind.plural} {name}: {key} {required} is not the live {live}")
        self.drop(obj)

    # Writing

    def _insert(self, obj: Object, owners: dict[str, list[str]]) -> Object:
        metadata = {key: value for key, value in obj["metadata"].items() if key not in SERVER_FIELDS}
        made: Object = {**copy.deepcopy(obj), "metadata": metadata}
        if obj["kind"] not in _WITHOUT_STATUS:
            made.pop("status", None)
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if obj["kind"] not in _WITHOUT_GENERATION:
            metadata["generation"] = 1
        made = self._admitted(made, None)
        self._with_node_defaults(made)
        record = Record(made, owners)
        self._records[ref_of(made)] = record
        self._write(record)
        if metadata.get("ownerReferences"):
            self._plan_sweep()
        return copy.deepcopy(record.obj)

    def _replace(self, record: Record, obj: Object, owners: dict[str, list[str]]) -> Object:
        """Store the new object, unless nothing changed."""
        obj = self._admitted(obj, record.obj)
        if obj == record.obj:
            if owners != record.owners:
                record.owners = owners
                self._state.put(ref_of(obj), record)
            return copy.deepcopy(obj)
        metadata = dict(obj["metadata"])
        if obj["kind"] not in _WITHOUT_GENERATION and _spec_part(obj) != _spec_part(record.obj):
            metadata["generation"] += 1
        record.obj, record.owners = {**copy.deepcopy(obj), "metadata": metadata}, owners
        self._write(record)
        return copy.deepcopy(record.obj)

    def _write(self, record: Record) -> None:
        self._version += 1
        record.obj["metadata"]["resourceVersion"] = str(self._version)
        self._state.put(ref_of(record.obj), record)
        self._tell(Change.UPSERT, record.obj)

    def _tell(self, change: Change, obj: Object) -> None:
        self._untold.append((change, copy.deepcopy(obj)))
        if self._telling:
            return  # a sink has written: its event comes after the one that is being told, for every sink
        self._telling = True
        try:
            while self._untold:
                change, obj = self._untold.popleft()
                for sink in tuple(self._sinks):
                    sink(change, copy.deepcopy(obj))
        finally:
            self._telling = False

    def _admitted(self, obj: Object, old: Object | None) -> Object:
        admission = ADMISSIONS.get(obj["kind"])
        if admission is None:
            return obj
        complete = admission.complete(obj)
        if faults := admission.faults(complete, old):
            name = f'{obj["kind"]}.trimtab.dev "{obj["metadata"]["name"]}"'
            raise Invalid(422, "Invalid", f"{name} is invalid: {'; '.join(faults)}")
        return complete

    def _with_node_defaults(self, obj: Object) -> None:
        """What a cluster fills in and the plans or the kubelet read."""
        if obj["kind"] == SERVICE.kind and "clusterIP" not in obj["spec"]:
            obj["spec"]["clusterIP"] = self._take_address()
        elif obj["kind"] == POD.kind:
            obj["spec"].setdefault("terminationGracePeriodSeconds", 30)
            obj["spec"].setdefault("restartPolicy", "Always")
            obj["status"] = {"phase": "Pending"}
        elif obj["kind"] == CLAIM.kind:
            obj["status"] = {"phase": "Bound", "accessModes": obj["spec"]["accessModes"]}

    def _list_keys(self, kind: str) -> Callable[[tuple[str, ...]], tuple[str, ...] | None]:
        admission = ADMISSIONS.get(kind)
        if admission is None:
            return built_in_list_keys
        keys = admission.list_keys
        return lambda path: built_in_list_keys(path) if path[0] == "metadata" else keys.get(path)

    # Garbage collection

    def _plan_sweep(self) -> None:
        if not self._sweep_planned:
            self._sweep_planned = True
            asyncio.get_running_loop().call_soon(self._sweep)

    def _sweep(self) -> None:
        """Delete what no living owner has any more, until nothing is left to delete."""
        self._sweep_planned = False
        while orphans := list(self._orphans()):
            for obj in orphans:
                self.drop(obj)

    def _orphans(self) -> Iterator[Object]:
        alive = {record.obj["metadata"]["uid"] for record in self._records.values()}
        for record in self._records.values():
            metadata = record.obj["metadata"]
            owners = [reference["uid"] for reference in metadata.get("ownerReferences", [])]
            if owners and not alive.intersection(owners) and "deletionTimestamp" not in metadata:
                yield record.obj


def _selected(labels: Mapping[str, str], wanted: Mapping[str, str | None]) -> bool:
    return all(name in labels and value in (None, labels[name]) for name, value in wanted.items())


def _check_preconditions(obj: Object, record: Record | None) -> None:
    for key in ("uid", "resourceVersion"):
        wanted = obj["metadata"].get(key)
        live = record.obj["metadata"][key] if record else None
        if wanted is not None and wanted != live:
            raise Conflict(409, "Conflict", f"{ref_of(obj)}: {key} {wanted} is not the live {live}")


def _without(obj: Object, key: str) -> Object:
    return {name: copy.deepcopy(value) for name, value in obj.items() if name != key}


def _spec_part(obj: Object) -> dict[str, Any]:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}
