"""What only the leader does: workers on a queue of owners, the writer of Events, the companions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from trimtab_operator.core.controller import Reader
from trimtab_operator.core.kube import FINETUNEJOB, OWNERS, Object, Ref, ref_of
from trimtab_operator.core.metrics import Metrics
from trimtab_operator.core.reconcile import AnyController, Environment, Outcome, Result, reconcile
from trimtab_operator.core.waiting import cancelled
from trimtab_operator.core.workqueue import QueueClosed, WorkQueue

_LONGEST_PAUSE_SECONDS = 1.0

log = structlog.stdlib.get_logger(__name__)


class Companion(Protocol):
    """Work beside the loop, such as asking pods for their progress."""

    async def run(self, reader: Reader, wake: Callable[[Ref], None]) -> None:
        """Run until cancelled, and perhaps again later; `wake` has an owner planned for anew."""


class Workers:
    """Begins and ends with the leadership, any number of times: a `leader.Work`."""

    def __init__(
        self,
        environment: Environment,
        controllers: Sequence[AnyController],
        companions: Sequence[Companion],
        metrics: Metrics,
    ) -> None:
        self._env = environment
        self._controllers = {controller.kind.kind: controller for controller in controllers}
        self._companions = companions
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._queue = self._new_queue()
        self._workers: list[asyncio.Task[None]] = []
        self._others: list[asyncio.Task[None]] = []
        self._broken: asyncio.Future[str] = self._loop.create_future()
        self.working = False

    def begin(self) -> asyncio.Future[str]:
        """Start with every owner in the queue; the future is done, with a task's name, when a task ends by itself."""
        self._queue = self._new_queue()
        self._broken = self._loop.create_future()
        self._env.events.forget()
        self.working = True
        for kind in OWNERS:
            for owner in self._env.store.all_of(kind):
                self.wake(ref_of(owner))
        workers = self._env.settings.workers
        self._workers = [asyncio.create_task(self._work(), name=f"worker-{n}") for n in range(workers)]
        self._others = [
            asyncio.create_task(self._env.events.run(), name="events"),
            *(asyncio.create_task(each.run(self._env.store, self.wake), name="companion") for each in self._companions),
        ]
        for task in (*self._workers, *self._others):
            task.add_done_callback(self._report_end)
        return self._broken

    async def end(self, grace_seconds: float) -> None:
        """Take no more work; within the grace finish what is at hand and write its Events; then cancel the rest."""
        self.working = False
        self._queue.close()
        tasks = (*self._workers, *self._others)
        try:
            if self._workers and grace_seconds > 0:
                async with asyncio.timeout(grace_seconds):
                    await asyncio.wait(self._workers)
                    await self._env.events.drain()
        except TimeoutError:
            log.warning("not all was finished before the end")
        finally:
            await cancelled(*tasks)

    def wake(self, ref: Ref) -> None:
        """Have an owner planned for, if this process works and a controller is there for its kind."""
        if self.working and ref.kind in self._controllers:
            self._queue.add(ref)

    def interested(self, obj: Object) -> set[Ref]:
        """Owners that ask to be woken when this object changes, though they don't own it."""
        return {ref for controller in self._controllers.values() for ref in controller.interested(obj)}

    @property
    def depth(self) -> int:
        """How many owners wait for a worker."""
        return self._queue.depth

    @property
    def oldest_seconds(self) -> float:
        """How long the first of them has waited."""
        return self._queue.oldest_seconds

    @property
    def ended(self) -> list[str]:
        """The names of tasks that should run and don't."""
        return [task.get_name() for task in (*self._workers, *self._others) if self.working and task.done()]

    def _new_queue(self) -> WorkQueue[Ref]:
        return WorkQueue(self._loop, cap_seconds=self._env.settings.backoff_cap_seconds)

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
        with structlog.contextvars.bound_contextvars(**_log_context(ref)):
            begun = self._loop.time()
            try:
                outcome = await reconcile(self._controllers[ref.kind], ref, self._env)
            except Exception as error:  # whatever one object does to us, the others go on
                log.exception("reconciliation failed")
                outcome = Outcome(Result.ERROR, reason=type(error).__name__)
            ended = self._loop.time()
            self._metrics.observe_reconcile(
                ref.kind,
                outcome.result,
                outcome.reason,
                seconds=ended - begun,
                since_wake_up=ended - self._queue.since(ref),
            )
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

    def _report_end(self, task: asyncio.Task[None]) -> None:
        if self.working:
            error = None if task.cancelled() else task.exception()
            log.error("a task ended", task=task.get_name(), error=repr(error))
            if not self._broken.done():
                self._broken.set_result(task.get_name())


def _log_context(ref: Ref) -> dict[str, str]:
    """What each message about an owner carries."""
    context = {"kind": ref.kind, "namespace": ref.namespace, "name": ref.name}
    return context | {"job": ref.name} if ref.kind == FINETUNEJOB.kind else context
