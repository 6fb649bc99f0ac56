"""Scheduler and kubelet of local mode: pods as processes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.local import podstatus, slots
from trimtab.local.addresses import Addresses
from trimtab.local.container import Place, Process, Unsupported, main_container, process
from trimtab.local.kube import LocalKube
from trimtab.local.objects import now
from trimtab.local.podstatus import PodState
from trimtab.local.probes import Ask, asker, verdicts
from trimtab.local.processes import Child, Ended, start
from trimtab.local.volumes import mount, secret_value
from trimtab.local.workdir import Workdir
from trimtab_operator.core.kube import POD, Change, Object

BACKOFF_SECONDS = (1, 2, 5, 10, 20, 40, 80, 160, 300)
"""Between the restarts of a container; shorter than a kubelet's at first, since nothing is pulled."""


class Running:
    """A pod on this machine."""

    def __init__(self, pod: Object, demand: slots.Demand) -> None:
        self.pod = pod
        self.demand = demand
        self.state = PodState()
        self.child: Child | None = None
        self.devices: tuple[int, ...] = ()
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class Kubelet:
    """Starts scheduled pods, watches them, and stops them."""

    def __init__(
        self, kube: LocalKube, workdir: Workdir, addresses: Addresses, lock: int, tasks: asyncio.TaskGroup
    ) -> None:
        """Pods run as tasks of `tasks`: an unforeseen error of one ends the run. `lock` is the working folder's."""
        self._kube = kube
        self._workdir = workdir
        self._addresses = addresses
        self._lock = lock
        self._tasks = tasks
        self._pods: dict[str, Running] = {}
        self._machine = slots.this_machine()
        self._planned = False
        self._closed = False
        self.hold_serving = False
        """Pods that serve wait; set while training goes on."""
        self.draining = False
        """No traffic comes any more, so preStop need not wait for it to end."""

    def begin(self) -> None:
        """Report pods that a former run left behind as lost, then follow the API."""
        for pod in self._kube.select(POD):
            if pod["status"]["phase"] in ("Succeeded", "Failed"):
                continue
            lost = PodState("Failed", container=podstatus.terminated(137, b"", now(), oom_killed=False))
            lost.disruption = "DeletionByPodGC"
            self._kube.set_status(pod, podstatus.status(pod, lost))
        for pod in self._kube.select(POD):
            self._heed(Change.UPSERT, pod)
        self._kube.subscribe(self._heed)

    async def close(self) -> None:
        """Stop every pod, with its grace period; what had not ended by itself was disrupted, not failed."""
        self._closed = self.draining = True
        for running in self._pods.values():
            running.state.disruption = "TerminationByKubelet"
            running.stop.set()
        tasks = [running.task for running in self._pods.values() if running.task]
        await asyncio.gather(*tasks, return_exceptions=True)

    def kill(self) -> None:
        """Kill every process now."""
        for running in self._pods.values():
            if running.child:
                running.child.kill()

    def reschedule(self) -> None:
        """Look again which pods may start."""
        if not self._planned and not self._closed:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._schedule)

    def _heed(self, change: Change, obj: Object) -> None:
        if obj["kind"] != POD.kind or change is Change.DELETE:
            return
        running = self._pods.get(obj["metadata"]["uid"])
        if "deletionTimestamp" in obj["metadata"]:
            if running:
                running.stop.set()
            else:
                self._kube.remove(obj)
        elif running is None and not obj["spec"].get("nodeName"):
            self.reschedule()

    def _schedule(self) -> None:
        self._planned = False
        if self._closed:
            return
        pods = [pod for pod in self._kube.select(POD) if not pod["spec"].get("nodeName")]
        pods.sort(key=lambda pod: (pod["metadata"]["creationTimestamp"], int(pod["metadata"]["resourceVersion"])))
        demands = {pod["metadata"]["uid"]: slots.demand(pod, self._machine) for pod in pods}
        active = [running.demand for running in self._pods.values()]
        answers = slots.admit(active, demands.values(), self._machine, hold_serving=self.hold_serving)
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if (reason := answers[uid]) is not None:
                self._kube.set_status(pod, podstatus.unschedulable(pod, f"0/1 nodes are available: {reason}"))
                continue
            running = Running(pod, demands[uid])
            self._pods[uid] = running
            bound = self._kube.merge(pod, {"spec": {"nodeName": "local"}})
            if bound is None:
                del self._pods[uid]
                continue
            running.pod = bound
            running.devices = self._free_devices(running.demand.accelerators)
            running.task = self._tasks.create_task(self._run(running), name=f"pod {pod['metadata']['name']}")

    def _free_devices(self, count: int) -> tuple[int, ...]:
        taken = {device for running in self._pods.values() for device in running.devices}
        return tuple(device for device in range(self._machine.accelerators) if device not in taken)[:count]

    def _report(self, running: Running) -> None:
        live = self._kube.set_status(running.pod, podstatus.status(running.pod, running.state))
        if live:
            running.pod = live

    async def _run(self, running: Running) -> None:
        """A pod's life: its container, again and again under `restartPolicy: Always`, then the end."""
        uid = running.pod["metadata"]["uid"]
        try:
            running.state.address = self._address(running.pod)
            running.state.started_at = now()
            self._report(running)
            await self._live(running)
        finally:
            del self._pods[uid]
            self._addresses.release(running.state.address)
            live = self._kube.find(POD, running.pod["metadata"]["namespace"], running.pod["metadata"]["name"])
            if live and live["metadata"]["uid"] == uid and "deletionTimestamp" in live["metadata"]:
                self._kube.remove(live)
            self.reschedule()

    async def _live(self, running: Running) -> None:
        state = running.state
        while not running.stop.is_set():
            ended = await self._run_container(running)
            if ended is None:
                continue
            state.ready = state.started = False
            if running.pod["spec"]["restartPolicy"] != "Always" or running.stop.is_set():
                good = ended.exit_code == 0
                state.phase = "Succeeded" if good else "Failed"
                if good:
                    state.disruption = None
                self._report(running)
                return
            delay = BACKOFF_SECONDS[min(state.restarts, len(BACKOFF_SECONDS) - 1)]
            state.restarts += 1
            state.last = state.container
            text = f"back-off {delay}s restarting failed container"
            state.container = podstatus.waiting("CrashLoopBackOff", text)
            self._report(running)
            await self._stopped(running, delay)
        state.phase = "Failed"
        self._report(running)

    async def _stopped(self, running: Running, seconds: float) -> bool:
        with suppress(TimeoutError):
            await asyncio.wait_for(running.stop.wait(), seconds)
        return running.stop.is_set()

    def _address(self, pod: Object) -> str:
        spec = pod["spec"]
        if "hostname" in spec and "subdomain" in spec:
            return self._addresses.of_host(f"{spec['hostname']}.{spec['subdomain']}.{pod['metadata']['namespace']}")
        return self._addresses.take()

    async def _run_container(self, running: Running) -> Ended | None:
        """One life of the container; None where it can't be started yet, after a pause."""
        pod, state = running.pod, running.state
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        scratch = Path(tempfile.mkdtemp(prefix="trimtab-pod-"))  # short: sockets in it have 108 characters
        try:
            paths = mount(self._kube, self._workdir, pod, scratch)
            address = state.address or ""
            place = Place(paths, address, self._addresses.of_host, scratch)
            made = process(pod, place, partial(secret_value, self._kube, namespace))
            if running.devices:
                visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, running.devices))}
                made = Process(made.command, {**made.environment, **visible}, made.directory)
        except Unsupported as error:
            shutil.rmtree(scratch)
            state.container = podstatus.waiting("CreateContainerConfigError", str(error))
            self._report(running)
            await self._stopped(running, 1)
            return None
        result = self._workdir.pod(namespace, name) / "exit.json"
        log = self._workdir.log(namespace, name)
        child = await start(made, result=result, scratch=scratch, log=log, lock=self._lock)
        started_at = now()
        running.child, state.container, state.phase = child, podstatus.running(started_at), "Running"
        ask = asker(made, place, main_container(pod), result.with_name("probe.json"))
        ended = await self._until_end(running, child, ask)
        running.child = None
        shutil.rmtree(scratch, ignore_errors=True)
        message = (self._workdir.pod(namespace, name) / "termination-log").read_bytes()
        state.container = podstatus.terminated(ended.exit_code, message, started_at, oom_killed=ended.oom_killed)
        return ended

    async def _until_end(self, running: Running, child: Child, ask: Ask) -> Ended:
        end = asyncio.create_task(child.ended())
        stop = asyncio.create_task(running.stop.wait())
        health = asyncio.create_task(self._watch(running, ask))
        try:
            await asyncio.wait({end, stop, health}, return_when=asyncio.FIRST_COMPLETED)
            if health.done():
                health.result()
            health.cancel()
            if not end.done():
                await self._terminate(running, child, end)
            return await end
        except asyncio.CancelledError:
            child.kill()
            raise
        finally:
            for task in (stop, health):
                task.cancel()

    async def _terminate(self, running: Running, child: Child, end: asyncio.Task[Ended]) -> None:
        """PreStop's sleep, SIGTERM, the grace period, SIGKILL; sleep and grace run on one clock."""
        grace = float(running.pod["spec"]["terminationGracePeriodSeconds"])
        deadline = asyncio.get_running_loop().time() + grace
        pause = main_container(running.pod).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if pause and not self.draining:
            await asyncio.wait({end}, timeout=min(pause, grace))
        child.terminate()
        await asyncio.wait({end}, timeout=max(deadline - asyncio.get_running_loop().time(), 1))
        if not end.done():
            child.kill()

    async def _watch(self, running: Running, ask: Ask) -> None:
        """Startup, then readiness and liveness; returns when the container must be ended."""
        container: dict[str, Any] = main_container(running.pod)
        self._report(running)
        if probe := container.get("startupProbe"):
            fault = await anext(verdicts(probe, ask))
            if fault is not None:
                return self._log(running, f"startup probe failed: {fault}")
        running.state.started = True
        if "readinessProbe" not in container:
            self._ready(running, None)
        readiness = asyncio.create_task(self._watch_readiness(running, container.get("readinessProbe"), ask))
        try:
            if probe := container.get("livenessProbe"):
                async for fault in verdicts(probe, ask):
                    if fault is not None:
                        return self._log(running, f"liveness probe failed: {fault}")
            await asyncio.Event().wait()
        finally:
            readiness.cancel()

    async def _watch_readiness(self, running: Running, probe: dict[str, Any] | None, ask: Ask) -> None:
        if probe:
            async for fault in verdicts(probe, ask):
                self._ready(running, fault)

    def _ready(self, running: Running, fault: str | None) -> None:
        running.state.ready = fault is None
        self._report(running)

    def _log(self, running: Running, text: str) -> None:
        metadata = running.pod["metadata"]
        with self._workdir.log(metadata["namespace"], metadata["name"]).open("a", encoding="utf-8") as log:
            log.write(f"{now()} {text}\n")
