"""A working folder as a running cluster: the API, the controllers, the kubelet and the operator's own runtime."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trimtab.local.addresses import Addresses
from trimtab.local.kube import LocalKube
from trimtab.local.kubelet import Kubelet
from trimtab.local.objects import Key, is_true, key
from trimtab.local.services import Services
from trimtab.local.state import State
from trimtab.local.workdir import Workdir
from trimtab.local.workloads import Workloads
from trimtab_operator.core.actions import Plan
from trimtab_operator.core.controller import Controller, Reader
from trimtab_operator.core.kube import FINETUNEJOB, MODELENDPOINT, POD, SERVICE, Change, Kind, Object, Ref
from trimtab_operator.core.names import LABEL_ENDPOINT, label_value
from trimtab_operator.core.runtime import Runtime
from trimtab_operator.core.settings import ServiceAddress, Settings
from trimtab_operator.kinds import kinds

_SETTLE_SECONDS = 5.0
"""After the last pod has gone, how long the operator may take to say so in the endpoints' status."""


class Cluster:
    """One working folder, held alone."""

    def __init__(self, workdir: Workdir, lock: int) -> None:
        """Open the folder's state; nothing runs before `running`. Needs a running event loop."""
        self.workdir = workdir
        self._lock = lock
        self._addresses = Addresses(workdir.root, self._used_addresses)
        self.state = State(workdir.state)
        self.kube = LocalKube(self.state, self._addresses.take)
        self.services = Services(self.kube)
        self.serving: set[Key] = set()
        """Namespace and name of the endpoints whose pods may run."""
        self.training: set[Key] = set()
        """Namespace and name of the jobs that go on; the folder's others stay as they are."""
        self.changed = asyncio.Event()
        """Set at each change of an object; whoever waits clears it."""
        self.interrupted = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run everything; on the way out every pod is stopped, with its grace period.

        The first SIGINT or SIGTERM sets `interrupted`, the second kills every process.

        Raises:
            ExceptionGroup: a part of local mode failed; a `LocalError` in it is meant for people.
        """
        async with asyncio.TaskGroup() as tasks:
            kubelet = Kubelet(self.kube, self.workdir, self._addresses, self._lock, tasks)
            workloads = Workloads(self.kube, self._is_wanted)
            controllers, companions = kinds(self.kube, SETTINGS)
            selected: list[Controller[Any]] = [
                _Selected(each.kind, each, self.training) if each.kind == FINETUNEJOB else each for each in controllers
            ]
            runtime = Runtime(self.kube, self.kube, selected, SETTINGS, companions=companions)
            services = tasks.create_task(self.services.run(), name="services")

            def heed(change: Change, obj: Object) -> None:
                if obj["kind"] == FINETUNEJOB.kind:
                    self._hold_serving(kubelet)
                self.changed.set()

            self._hold_serving(kubelet)
            kubelet.begin()
            workloads.begin()
            self.kube.subscribe(heed)
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._interrupt, kubelet)
            await runtime.start()
            runtime.workers.begin()
            try:
                yield
                if not any(_alive(pod) and not _serves(pod) for pod in self.kube.select(POD)):
                    await self._end_serving(kubelet, workloads)
            finally:
                await runtime.stop()
                await kubelet.close()
                services.cancel()

    def _interrupt(self, kubelet: Kubelet) -> None:
        if self.interrupted.is_set():
            kubelet.kill()
        self.interrupted.set()
        self.changed.set()

    async def until_or_interrupted(self, question: Callable[[], bool]) -> None:
        """As `until`, but an interruption ends it too."""
        await self.until(lambda: self.interrupted.is_set() or question())

    async def _end_serving(self, kubelet: Kubelet, workloads: Workloads) -> None:
        """Let the operator see the endpoints' pods go, so that their status tells the truth afterwards."""
        kubelet.draining = True
        self.serving.clear()
        workloads.plan_sync()
        await self.until(lambda: not any(_serves(pod) and _alive(pod) for pod in self.kube.select(POD)))
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                await self.until(lambda: not any(is_true(obj, "Ready") for obj in self.kube.select(MODELENDPOINT)))
        except TimeoutError:
            return

    async def until(self, question: Callable[[], bool]) -> None:
        """Wait until the answer is yes; asked again at each change."""
        while True:
            self.changed.clear()
            if question():
                return
            await self.changed.wait()

    def _hold_serving(self, kubelet: Kubelet) -> None:
        held = any(_trains(job) for job in self.kube.select(FINETUNEJOB) if key(job) in self.training)
        if held != kubelet.hold_serving:
            kubelet.hold_serving = held
            kubelet.reschedule()

    def _is_wanted(self, deployment: Object) -> bool:
        namespace, labels = deployment["metadata"]["namespace"], deployment["metadata"].get("labels", {})
        wanted = {label_value(name) for space, name in self.serving if space == namespace}
        return labels.get(LABEL_ENDPOINT) in wanted

    def _used_addresses(self) -> Iterator[str]:
        for pod in self.kube.select(POD):
            if pod["status"]["phase"] in ("Pending", "Running"):
                yield pod["status"].get("podIP", "")
        for service in self.kube.select(SERVICE):
            yield service["spec"]["clusterIP"]


SETTINGS = Settings(
    service_address=ServiceAddress.CLUSTER_IP,
    allow_file_uris=True,
    queues=False,
    network_policies=False,
    progress_poll_seconds=1,
    workers=2,
    backoff_cap_seconds=5,
    cpu_threads=len(os.sched_getaffinity(0)),
)


@dataclass
class _Selected:
    """A controller that plans for some owners only."""

    kind: Kind
    controller: Controller[Any]
    keys: set[Key]

    def observe(self, reader: Reader, obj: Object) -> Any:
        """As the controller observes."""
        return self.controller.observe(reader, obj)

    def plan(self, obj: Object, observation: Any, settings: Settings, now: datetime) -> Plan:
        """The controller's plan, or to leave everything as it is."""
        return self.controller.plan(obj, observation, settings, now) if key(obj) in self.keys else Plan()

    def interested(self, obj: Object) -> list[Ref]:
        """As the controller is interested."""
        return self.controller.interested(obj)


def _trains(job: Object) -> bool:
    """Whether the job has stages to run."""
    if job["spec"]["suspend"] or is_true(job, "Complete") or is_true(job, "Failed"):
        return False
    phases = [stage["phase"] for stage in job.get("status", {}).get("stages", [])]
    return len(phases) < len(job["spec"]["stages"]) or any(phase != "Succeeded" for phase in phases)


def _serves(pod: Object) -> bool:
    return LABEL_ENDPOINT in pod["metadata"].get("labels", {})


def _alive(pod: Object) -> bool:
    return bool(pod["status"]["phase"] == "Running")
