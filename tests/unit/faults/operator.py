"""The product's one loop on a `Cluster`, driven request by request: each may fail, hang behind, or be the last."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.unit.faults.cluster import Cluster

from trimtab_operator.core.errors import Conflict, Unavailable
from trimtab_operator.core.events import EventRecorder
from trimtab_operator.core.kube import CHILDREN, CLAIM, OWNERS, Change, Kind, Object, Ref, ref_of
from trimtab_operator.core.reconcile import Environment, reconcile
from trimtab_operator.core.runtime import CHILD_LABELS
from trimtab_operator.core.settings import Settings
from trimtab_operator.core.store import Store
from trimtab_operator.kinds import kinds

WATCHED = (*OWNERS, *CHILDREN, CLAIM)
T = TypeVar("T")


class Crash(BaseException):
    """The process is gone."""


@dataclass(frozen=True)
class Trouble:
    """What befalls one request of a reconciliation.

    `kind`: `crash before`, `crash after`, `refused` (503), `busy` (429), `conflict` (409), `lost` (carried out, no
    answer), or `meanwhile` (someone else acts just before it).
    """

    request: int
    kind: str
    meanwhile: Callable[[], None] | None = None


class Requests:
    """`Kube` for one operator: counts its requests and lets its trouble befall them."""

    def __init__(self, cluster: Cluster, wrote: Callable[[str, Ref, Object | None], None]) -> None:
        self.cluster = cluster
        self.trouble: Trouble | None = None
        self.writes = 0
        self._count = 0
        self._wrote = wrote

    def begin(self, trouble: Trouble | None) -> None:
        """The next reconciliation."""
        self.trouble, self._count = trouble, 0

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        return await self._send(lambda: self.cluster.get(kind, namespace, name))

    async def list_objects(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        return await self._send(lambda: self.cluster.list_objects(kind, namespace=namespace, labels=labels))

    list_metadata = list_objects

    async def create(self, obj: Object, *, manager: str) -> Object:
        return await self._write("create", obj, lambda: self.cluster.create(obj, manager=manager))

    async def apply(self, obj: Object, *, manager: str) -> Object:
        return await self._write("apply", obj, lambda: self.cluster.apply(obj, manager=manager))

    async def apply_status(self, obj: Object, *, manager: str) -> Object:
        return await self._write("status", obj, lambda: self.cluster.apply_status(obj, manager=manager))

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> None:
        def deletion() -> Coroutine[Any, Any, None]:
            target = Ref(kind.kind, namespace, name)
            live = self.cluster.objects.get(target)
            required = {"uid": uid, "resourceVersion": version}
            if live is not None and all(live["metadata"][key] == value for key, value in required.items() if value):
                self._wrote("delete", target, live)
            return self.cluster.delete(kind, namespace, name, uid=uid, version=version)

        await self._send(deletion)
        self.writes += 1

    async def _write(self, verb: str, obj: Object, request: Callable[[], Coroutine[Any, Any, Object]]) -> Object:
        async def carried_out() -> Object:
            before = self.cluster.objects.get(ref_of(obj))
            answer = await request()
            if before is None or before["metadata"]["resourceVersion"] != answer["metadata"]["resourceVersion"]:
                self._wrote(verb, ref_of(obj), before)
                self.writes += 1
            return answer

        return await self._send(carried_out)

    async def _send(self, request: Callable[[], Coroutine[Any, Any, T]]) -> T:
        trouble = self.trouble if self.trouble and self.trouble.request == self._count else None
        self._count += 1
        match trouble.kind if trouble else "":
            case "crash before":
                raise Crash
            case "refused":
                raise Unavailable(503, "ServiceUnavailable", "try again")
            case "busy":
                raise Unavailable(429, "TooManyRequests", "slow down", 1.0)
            case "conflict":
                raise Conflict(409, "Conflict", "the object has been modified")
            case "meanwhile" if trouble and trouble.meanwhile:
                trouble.meanwhile()
        answer = await request()
        match trouble.kind if trouble else "":
            case "crash after":
                raise Crash
            case "lost":
                raise Unavailable(0, "ClientConnectionError", "no answer")
        return answer


class Operator:
    """One process of the operator: a store that lags as the test wants it, and the loop."""

    def __init__(
        self, cluster: Cluster, wrote: Callable[[Operator, str, Ref, Object | None], None], settings: Settings
    ) -> None:
        self._cluster = cluster
        self._wrote = wrote
        self._settings = settings
        self.restart(0)

    def restart(self, behind: int, kinds_behind: Sequence[Kind] = WATCHED) -> None:
        """A new process, whose first lists, or some of them, are so many changes behind."""
        self.requests = Requests(self._cluster, lambda *told: self._wrote(self, *told))
        self.store = Store()
        self.seen: dict[str, str] = {}
        """Uid to version of what there is, as its newest plan saw it."""
        self.controllers = {controller.kind.kind: controller for controller in kinds(self.requests, self._settings)[0]}
        events = EventRecorder(self.requests, "test", lambda: self._cluster.now)
        self._environment = Environment(
            self.requests, self.store, self._settings, lambda: self._cluster.now, self.deliver, events
        )
        now = len(self._cluster.log)
        self._cursors = {kind.kind: max(0, now - behind * (kind in kinds_behind)) for kind in WATCHED}
        for kind in WATCHED:
            for obj in self._cluster.view(self._cursors[kind.kind], kind.kind):
                self.deliver(Change.UPSERT, obj)

    def deliver(self, change: Change, obj: Object) -> None:
        """As the runtime takes events and answers."""
        if obj["kind"] not in self._cursors:
            return
        labels = obj["metadata"].get("labels", {})
        if obj["kind"] in [kind.kind for kind in CHILDREN] and not CHILD_LABELS.items() <= labels.items():
            change = Change.DELETE
        if change is Change.UPSERT:
            self.store.upsert(obj)
        else:
            self.store.remove(obj)

    def hear(self, kind: str | None = None, most: int | None = None) -> None:
        """Take the next events of a watch; of all and to the end by default."""
        for each in self._cursors if kind is None else [kind]:
            taken = 0
            while self._cursors[each] < len(self._cluster.log) and (most is None or taken < most):
                change, obj = self._cluster.log[self._cursors[each]]
                self._cursors[each] += 1
                if obj["kind"] == each:
                    self.deliver(change, obj)
                    taken += 1

    def miss(self, kind: str) -> None:
        """What a watch would have told next is lost."""
        self._cursors[kind] = len(self._cluster.log)

    def resync(self) -> None:
        """The periodic list, which makes up for what was missed."""
        for kind in WATCHED:
            before = self.store.versions(kind)
            labels = CHILD_LABELS if kind in CHILDREN else None
            drift = self.store.drift(before, drive(self._cluster.list_metadata(kind, labels=labels)))
            for obj in drift.deleted:
                self.deliver(Change.DELETE, obj)
            for ref in drift.changed:
                self.deliver(Change.UPSERT, self._cluster.objects[ref])

    def work(self, ref: Ref, trouble: Trouble | None = None) -> bool:
        """Reconcile one owner; True where something was written. `Crash` restarts the process."""
        self.requests.begin(trouble)
        known = [obj["metadata"] for kind in WATCHED for obj in self.store.all_of(kind)]
        self.seen = {each["uid"]: each["resourceVersion"] for each in known}
        before = self.requests.writes
        try:
            drive(reconcile(self.controllers[ref.kind], ref, self._environment))
        except Crash:
            self.restart(0)
            return True
        return self.requests.writes > before

    def owners(self) -> list[Ref]:
        """Those that it knows of."""
        return sorted(ref_of(obj) for kind in OWNERS for obj in self.store.all_of(kind))


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("it waits")
