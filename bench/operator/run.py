"""One size of the benchmark: the operator on a new control plane, from the first POST to rest and through a restart."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench.operator.audit import OPERATOR, AuditLog
from bench.operator.floor import Floor, Recording, play, record
from bench.operator.process import Watched
from bench.operator.workload import NAMESPACE, at_once, client, manifest, names, prepare_cluster
from tests.controlplane.cluster import HERE, ControlPlane
from tests.controlplane.operator import Operator

STATUS = "finetunejobs/status"
QUIET_SECONDS = 5.0
RESYNC_WITHIN_SECONDS = 45.0
"""The first periodic list comes within this time of a start."""
_SCRAPE_SECONDS = 2.0


class BenchError(Exception):
    """The jobs did not get where they should; the message says how far they came."""


@dataclass
class Run:
    """What was measured with so many jobs. Seconds, MB, and shares of one core in percent."""

    jobs: int
    children_seconds: float = 0.0
    complete_seconds: float = 0.0
    floor_children_seconds: float = 0.0
    writes_per_job: dict[str, float] = field(default_factory=dict)
    status_writes_most: int = 0
    queue_depth_most: int = 0
    connections_most: int = 0
    resident_most: float = 0.0
    resident_at_rest: float = 0.0
    cpu_at_rest: float = 0.0
    restart_seconds: float = 0.0
    writes_at_rest: int = 0
    cpu_busy_seconds: float = 0.0


@contextmanager
def cluster(binaries: Path, jobs: int, policy: Path) -> Iterator[ControlPlane]:
    """A new control plane with the namespace, the claim and the nodes; pods stay Pending until `release`."""
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder,
        ControlPlane(Path(folder, "control-plane"), binaries, audit_policy=policy) as running,
    ):
        running.start_kwok(HERE / "stages" / "nodes.yaml")
        prepare_cluster(running, jobs)
        yield running


def release(control_plane: ControlPlane) -> None:
    """Pods run from now on."""
    control_plane.start_kwok()


async def record_one(binaries: Path) -> Recording:
    """The operator's writes for one job."""
    with cluster(binaries, 1, HERE / "audit-policy.yaml") as control_plane:
        release(control_plane)
        name = "job-record"
        async with client(control_plane.kubeconfig()) as kube:
            with Operator(control_plane):
                job = await kube.create(manifest(name), manager="bench")
                control_plane.kubectl(
                    "wait", "--for=condition=Complete", f"ftj/{name}", "--timeout=120s", f"--namespace={NAMESPACE}"
                )
                await asyncio.sleep(QUIET_SECONDS)
        return record(control_plane.audit(), name, job["metadata"]["uid"])


async def measure_floor(binaries: Path, policy: Path, recording: Recording, jobs: int) -> Floor:
    """The bare loop on a control plane of its own, where no operator runs."""
    with cluster(binaries, jobs, policy) as control_plane:
        async with client(control_plane.kubeconfig()) as kube:
            return await play(kube, recording, names(jobs))


class Sampler:
    """Looks at the operator every two seconds, and keeps the largest values."""

    def __init__(self, operator: Operator, process: Watched, run: Run) -> None:
        self._operator = operator
        self._process = process
        self._run = run
        self.succeeded = 0

    async def sample(self) -> None:
        """Look once."""
        families = await asyncio.to_thread(self._operator.metrics)
        depth = int(families["trimtab_operator_queue_depth"].samples[0].value)
        phases = {each.labels["phase"]: int(each.value) for each in families["trimtab_operator_jobs"].samples}
        self.succeeded = phases.get("Succeeded", 0)
        self._run.queue_depth_most = max(self._run.queue_depth_most, depth)
        self._run.connections_most = max(self._run.connections_most, self._process.connections())
        self._run.resident_most = self._process.most_resident()
        if phases.get("Failed"):
            raise BenchError(f"{phases['Failed']} of {self._run.jobs} jobs failed")

    async def until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Look until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise BenchError(f"{what}: not so after {seconds:.0f} s; {self.succeeded} jobs are complete")
            await self.sample()
            await asyncio.sleep(_SCRAPE_SECONDS)


async def measure(binaries: Path, policy: Path, jobs: int, rest_seconds: float) -> Run:
    """The operator with so many jobs."""
    run = Run(jobs)
    patience = 120 + jobs * 0.3
    with cluster(binaries, jobs, policy) as control_plane, Operator(control_plane) as operator:
        log = AuditLog(control_plane.root / "audit.log")
        process = Watched(operator.pid)
        sampler = Sampler(operator, process, run)

        def told() -> bool:
            counts = Counter(write.name for write in log.by(OPERATOR, STATUS))
            return sum(count >= 2 for count in counts.values()) >= jobs

        async with client(control_plane.kubeconfig()) as kube:
            pieces = [partial(_submit, kube, name) for name in names(jobs)]
            submission = asyncio.create_task(at_once(pieces))
            await sampler.until(told, "the children of all jobs exist", patience)
            await submission
        began = min(write.received for write in log.by("admin", "finetunejobs"))
        run.children_seconds = _second_status(log) - began
        released = time.time()
        await asyncio.to_thread(release, control_plane)
        await sampler.until(lambda: sampler.succeeded == jobs, "all jobs are complete", patience)
        run.complete_seconds = run.children_seconds + max(w.answered for w in log.by(OPERATOR, STATUS)) - released
        run.cpu_busy_seconds = process.cpu_seconds()
        await asyncio.sleep(QUIET_SECONDS)
        _count(log, run)
        await _at_rest(operator, process, run, rest_seconds)
        await _restart(operator, log, run)
    return run


async def _submit(kube: Any, name: str) -> None:
    await kube.create(manifest(name), manager="bench")


def _second_status(log: AuditLog) -> float:
    """When the last job's status told of its first children."""
    seen: Counter[str] = Counter()
    last = 0.0
    for write in log.by(OPERATOR, STATUS):
        seen[write.name] += 1
        if seen[write.name] == 2:
            last = max(last, write.answered)
    return last


def _count(log: AuditLog, run: Run) -> None:
    ours = [write for write in log.read() if write.user == OPERATOR]
    run.writes_per_job = {
        resource: count / run.jobs for resource, count in sorted(Counter(w.resource for w in ours).items())
    }
    run.status_writes_most = max(Counter(w.name for w in ours if w.resource == STATUS).values())


async def _at_rest(operator: Operator, process: Watched, run: Run, seconds: float) -> None:
    """Nothing happens; Prometheus asks every 15 s."""
    before, began = process.cpu_seconds(), time.monotonic()
    while (left := began + seconds - time.monotonic()) > 0:
        await asyncio.sleep(min(15.0, left))
        await asyncio.to_thread(operator.metrics)
    run.cpu_at_rest = 100 * (process.cpu_seconds() - before) / (time.monotonic() - began)
    run.resident_at_rest = process.resident()


async def _restart(operator: Operator, log: AuditLog, run: Run) -> None:
    """A restart, and the first periodic list after it."""
    before = sum(write.user == OPERATOR for write in log.read())
    await asyncio.to_thread(operator.stop)
    began = time.monotonic()
    await asyncio.to_thread(operator.start)
    run.restart_seconds = time.monotonic() - began
    await asyncio.sleep(RESYNC_WITHIN_SECONDS)
    run.writes_at_rest = sum(write.user == OPERATOR for write in log.read()) - before
