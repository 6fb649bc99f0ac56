"""Store, queue, workers and the periodic list, put together: the same on a cluster and in local mode."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

import structlog

from trimtab_operator.core.controller import Reader
from trimtab_operator.core.errors import KubeError
from trimtab_operator.core.events import EventRecorder
from trimtab_operator.core.kube import CHILDREN, CLAIM, KINDS, OWNERS, Change, Feed, Kind, Kube, Object, Ref, ref_of
from trimtab_operator.core.metrics import Metrics, RuntimeCollector
from trimtab_operator.core.names import LABEL_MANAGED_BY, MANAGED_BY
from trimtab_operator.core.reconcile import AnyController, Environment, Outcome, Result, reconcile
from trimtab_operator.core.settings import Settings
from trimtab_operator.core.store import Store, controller_of
from trimtab_operator.core.workqueue import QueueClosed, WorkQueue

WATCHED = (*OWNERS, *CHILDREN, CLAIM)
_WATCHED_NAMES = frozenset(kind.kind for kind in WATCHED)
_LABELLED_NAMES = frozenset(kind.kind for kind in CHILDREN)
CHILD_LABELS = {LABEL_MANAGED_BY: MANAGED_BY}
"""What children are listed and watched by."""
FIRST_RESYNC_SECONDS = 30.0
"""The first list soon after the start closes the gap between our own list and the feed's."""
_STUCK_SECONDS = 300.0
_LONGEST_PAUSE_SECONDS = 1.0
_RETRY_SECONDS = 1.0

log = structlog.stdlib.get_logger(__name__)


class Companion(Protocol):
    """Work beside the loop, such as asking pods for their progress."""

    async def run(self, reader: Reader, wake: Callable[[Ref], None]) -> None:
        """Run until cancelled; `wake` has an owner planned for anew."""


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
        self._controllers = {controller.kind.kind: controller for controller in controllers}
        self._companions = companions
        self._now = now
        self._loop = asyncio.get_running_loop()
        self._queue: WorkQueue[Ref] = WorkQueue(self._loop, cap_seconds=settings.backoff_cap_seconds)
        self._events = EventRecorder(kube, f"{socket.gethostname()}-{os.getpid()}", now)
        self._environment = Environment(kube, self.store, settings, now, self.deliver, self._events)
        self._heard: dict[str, float] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        self._stopping = False
        self.synced = False

    async def start(self) -> None:
        """Subscribe, list every kind until that has worked, wake all owners, and start the workers."""
        self._feed.subscribe(self.deliver)
        await asyncio.gather(*(self._list(kind) for kind in WATCHED))
        self.synced = True
        self.metrics.synced.set(1)
        self.metrics.registry.register(
            RuntimeCollector(self.store, lambda: self._queue.depth, lambda: self._queue.oldest_seconds, self.watch_ages)
        )
        for kind in OWNERS:
            for owner in self.store.all_of(kind):
                self.wake(ref_of(owner))
        self._workers = [asyncio.create_task(self._work(), name=f"worker-{n}") for n in range(self.settings.workers)]
        self._tasks = [
            asyncio.create_task(self._events.run(), name="events"),
            asyncio.create_task(self._resync(), name="resync"),
            *(asyncio.create_task(each.run(self.store, self.wake), name="companion") for each in self._companions),
        ]
        for task in (*self._workers, *self._tasks):
            task.add_done_callback(self._report_end)
        log.info("synced", objects={kind.kind: len(self.store.all_of(kind)) for kind in WATCHED})

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """Take no more work, let workers finish what they have and Events be written, then cancel the rest."""
        self._stopping = True
        self._queue.close()
        if self._workers:
            await asyncio.wait(self._workers, timeout=grace_seconds)
            try:
                async with asyncio.timeout(grace_seconds):
                    await self._events.drain()
            except TimeoutError:
                log.warning("events not written before the end")
        for task in (*self._workers, *self._tasks):
            task.cancel()
        await asyncio.gather(*self._workers, *self._tasks, return_exceptions=True)

    def deliver(self, change: Change, obj: Object) -> None:
        """Take an event, or what a write returned: a `Sink`.

        Kinds that are not watched are ignored. A child without our label counts as gone, as for a watch by label.
        """
        if obj["kind"] not in _WATCHED_NAMES:
            return
        if obj["kind"] in _LABELLED_NAMES and not CHILD_LABELS.items() <= obj["metadata"].get("labels", {}).items():
            change = Change.DELETE
        self._heard[obj["kind"]] = self._loop.time()
        wakes = self._concerned(obj)
        changed = self.store.upsert(obj) if change is Change.UPSERT else self.store.remove(obj)
        if changed and not self._stopping:
            for ref in wakes:
                self.wake(ref)

    def wake(self, ref: Ref) -> None:
        """Have an owner planned for, if a controller is there for its kind."""
        if ref.kind in self._controllers and not self._stopping:
            self._queue.add(ref)

    def watch_ages(self) -> dict[str, float]:
        """Seconds since the last event or complete list of each kind."""
        now = self._loop.time()
        return {kind: now - heard for kind, heard in sorted(self._heard.items())}

    def unhealthy(self) -> str | None:
        """What is wrong with the process, such that a restart may mend it; None where nothing is."""
        dead = [task.get_name() for task in (*self._workers, *self._tasks) if task.done()]
        if dead and not self._stopping:
            return f"ended: {', '.join(dead)}"
        if self._queue.oldest_seconds > _STUCK_SECONDS:
            return f"the oldest key has waited for {self._queue.oldest_seconds:.0f} s"
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
        for controller in self._controllers.values():
            refs.update(controller.interested(obj))
        return {ref for ref in refs if ref.kind in self._controllers}

    async def _work(self) -> None:
        while True:
            try:
                ref = await self._queue.get()
            except QueueClosed:
                return
            pause = 0.0
            try:
                pause = self._settle(ref, await self._reconcile(ref))
            finally:
                self._queue.done(ref, pause=pause)

    async def _reconcile(self, ref: Ref) -> Outcome:
        with structlog.contextvars.bound_contextvars(kind=ref.kind, namespace=ref.namespace, name=ref.name):
            with self.metrics.seconds.labels(ref.kind).time():
                try:
                    outcome = await reconcile(self._controllers[ref.kind], ref, self._environment)
                except Exception:  # whatever one object does to us, the others go on
                    log.exception("reconciliation failed")
                    outcome = Outcome(Result.ERROR)
            self.metrics.reconciles.labels(ref.kind, outcome.result.value).inc()
            return outcome

    def _settle(self, ref: Ref, outcome: Outcome) -> float:
        """Decide when the key comes back; the pause holds even if it was woken meanwhile, as by our own writes."""
        if outcome.requeue_after is not None:
            self._queue.add_after(ref, outcome.requeue_after)
        match outcome.result:
            case Result.GONE | Result.UNCHANGED:
                self._queue.forget(ref)
                return 0.0
            case Result.WRITTEN:
                # A plan that never comes to rest must not become a hot loop.
                return min(self._queue.fail(ref), _LONGEST_PAUSE_SECONDS)
            case _:
                self._queue.add_after(ref, max(self._queue.fail(ref), outcome.retry_after or 0.0))
                return 0.0

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
            await asyncio.sleep(_jittered(delay))
            delay = self.settings.resync_seconds
            for kind in WATCHED:
                try:
                    await self._diff(kind)
                except KubeError as error:
                    log.warning("periodic list failed", kind=kind.kind, reason=str(error))

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

    def _report_end(self, task: asyncio.Task[None]) -> None:
        if not self._stopping and not task.cancelled():
            log.error("a task ended", task=task.get_name(), error=repr(task.exception()))


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311
