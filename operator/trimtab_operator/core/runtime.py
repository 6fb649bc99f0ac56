"""The store, kept warm by events and lists, and the workers on it: the same on a cluster and in local mode.

Every replica keeps its store warm; `workers` begins and ends with the leadership, on the store that is there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import structlog

from trimtab_operator.core.errors import KubeError
from trimtab_operator.core.events import EventRecorder
from trimtab_operator.core.kube import CHILDREN, CLAIM, KINDS, OWNERS, Change, Feed, Kind, Kube, Object, Ref, ref_of
from trimtab_operator.core.metrics import Metrics, RuntimeCollector
from trimtab_operator.core.names import LABEL_MANAGED_BY, MANAGED_BY
from trimtab_operator.core.reconcile import AnyController, Environment
from trimtab_operator.core.settings import Settings
from trimtab_operator.core.store import Store, controller_of
from trimtab_operator.core.waiting import cancelled, set_within
from trimtab_operator.core.workers import Companion, Workers

WATCHED = (*OWNERS, *CHILDREN, CLAIM)
_WATCHED_NAMES = frozenset(kind.kind for kind in WATCHED)
_LABELLED_NAMES = frozenset(kind.kind for kind in CHILDREN)
CHILD_LABELS = {LABEL_MANAGED_BY: MANAGED_BY}
"""What children are listed and watched by."""
FIRST_RESYNC_SECONDS = 30.0
"""The first list soon after the start closes the gap between our own list and the feed's."""
_SETTLE_SECONDS = 2.0
"""From the first sign that the feed has listed anew to our own list: the feed's is then complete."""
_STUCK_SECONDS = 300.0
_RETRY_SECONDS = 1.0

log = structlog.stdlib.get_logger(__name__)


class Runtime:
    """The operator without kopf. `start` returns when every kind has been listed; `stop` ends all it started."""

    def __init__(
        self,
        kube: Kube,
        feed: Feed,
        controllers: Sequence[AnyController],
        settings: Settings,
        *,
        companions: Sequence[Companion] = (),
        metrics: Metrics | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store = Store()
        self.metrics = metrics or Metrics()
        self.settings = settings
        self._kube = kube
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        events = EventRecorder(kube, settings.identity, now)
        environment = Environment(kube, self.store, settings, now, self.deliver, events, self.metrics.observe_spent)
        self.workers = Workers(environment, controllers, companions, self.metrics)
        self._heard: dict[str, float] = {}
        self._resyncing: asyncio.Task[None] | None = None
        self._suspicious = asyncio.Event()
        self.synced = False

    async def start(self) -> None:
        """Subscribe, and list every kind until that has worked: the store is warm, and stays so."""
        self._feed.subscribe(self.deliver)
        for kind in WATCHED:  # one by one: a list is held in memory beside what is stored
            await self._list(kind)
        self.synced = True
        self.metrics.synced.set(1)
        self.metrics.registry.register(
            RuntimeCollector(
                self.store, lambda: self.workers.depth, lambda: self.workers.oldest_seconds, self.watch_ages
            )
        )
        self._resyncing = asyncio.create_task(self._resync(), name="resync")
        log.info("synced", objects={kind.kind: self.store.count(kind) for kind in WATCHED})

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End the workers, should they still work, and the periodic list."""
        await self.workers.end(grace_seconds)
        if self._resyncing is not None:
            await cancelled(self._resyncing)

    def suspect(self) -> None:
        """The feed has begun anew, so that it may have missed deletions: compare with a list of ours, soon."""
        self._suspicious.set()

    async def compare(self) -> None:
        """Compare the store with a list of each kind, and deliver what it has missed."""
        for kind in WATCHED:
            try:
                await self._diff(kind)
            except KubeError as error:
                log.warning("periodic list failed", kind=kind.kind, reason=str(error))

    def deliver(self, change: Change, obj: Object) -> None:
        """Take an event, or what a write returned: a `Sink`.

        Kinds that are not watched are ignored. A child without our label counts as gone, as for a watch by label.
        """
        if obj["kind"] not in _WATCHED_NAMES:
            return
        if obj["kind"] in _LABELLED_NAMES and not CHILD_LABELS.items() <= obj["metadata"].get("labels", {}).items():
            change = Change.DELETE
        self._heard[obj["kind"]] = self._loop.time()
        wakes = self._concerned(obj) if self.workers.working else ()
        changed = self.store.upsert(obj) if change is Change.UPSERT else self.store.remove(obj)
        for ref in wakes if changed else ():
            self.workers.wake(ref)

    def watch_ages(self) -> dict[str, float]:
        """Seconds since the last event or complete list of each kind."""
        now = self._loop.time()
        return {kind: now - heard for kind, heard in sorted(self._heard.items())}

    def unhealthy(self) -> str | None:
        """What is wrong with the process, such that a restart may mend it; None where nothing is."""
        dead = self.workers.ended
        if self._resyncing is not None and self._resyncing.done():
            dead.append(self._resyncing.get_name())
        if dead:
            return f"ended: {', '.join(dead)}"
        if self.workers.working and self.workers.oldest_seconds > _STUCK_SECONDS:
            return f"the oldest key has waited for {self.workers.oldest_seconds:.0f} s"
        return None

    def _concerned(self, obj: Object) -> set[Ref]:
        """The owners to wake when this object changes: itself, its controllers upwards, and whoever asks for it."""
        refs = {ref_of(obj)}
        above = controller_of(obj)
        namespace = obj["metadata"]["namespace"]
        while above is not None:
            ref = Ref(str(above["kind"]), namespace, str(above["name"]))
            if ref in refs:
                break
            refs.add(ref)
            owner = self.store.find(ref)
            above = controller_of(owner) if owner is not None else None
        return refs | self.workers.interested(obj)

    async def _list(self, kind: Kind) -> None:
        """Fill the store with one kind; again until it works."""
        delay = _RETRY_SECONDS
        while True:
            try:
                for namespace in self.settings.watch_namespaces or (None,):
                    labels = CHILD_LABELS if kind in CHILDREN else None
                    for obj in await self._kube.list_objects(kind, namespace=namespace, labels=labels):
                        self.store.upsert(obj)
                self._heard[kind.kind] = self._loop.time()
                return
            except KubeError as error:
                log.warning(
                    "kind not listed; are the CRDs installed and the API server up?", kind=kind.kind, reason=str(error)
                )
                await asyncio.sleep(_jittered(delay))
                delay = min(delay * 2, 30.0)

    async def _resync(self) -> None:
        delay = min(FIRST_RESYNC_SECONDS, self.settings.resync_seconds)
        while True:
            if await set_within(self._suspicious, _jittered(delay)):
                await asyncio.sleep(min(_SETTLE_SECONDS, delay))
                self._suspicious.clear()
            delay = self.settings.resync_seconds
            await self.compare()

    async def _diff(self, kind: Kind) -> None:
        """Make up for what no event told of: deletions above all."""
        for namespace in self.settings.watch_namespaces or (None,):
            before = self.store.versions(kind, namespace)
            labels = CHILD_LABELS if kind in CHILDREN else None
            drift = self.store.drift(before, await self._kube.list_metadata(kind, namespace=namespace, labels=labels))
            self._heard[kind.kind] = self._loop.time()
            for obj in drift.deleted:
                log.info("missed a deletion", target=str(ref_of(obj)))
                self.metrics.missed.labels(kind.kind).inc()
                self.deliver(Change.DELETE, obj)
            for ref in drift.changed:
                live = await self._kube.get(KINDS[ref.kind], ref.namespace, ref.name)
                if live is not None:
                    self.metrics.missed.labels(kind.kind).inc()
                    self.deliver(Change.UPSERT, live)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311
