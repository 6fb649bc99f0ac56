"""One size of the benchmark: the operator on a new control plane, from the first POST to rest and through a restart."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.operator.audit import OPERATOR, USER, AuditLog
from bench.operator.floor import Floor, Recording, play, record
from bench.operator.process import Watched
from bench.operator.wakeup import bound, latencies, wake_ups
from bench.operator.workload import NAMESPACE, at_once, client, names, prepare_cluster, submit
from tests.controlplane.cluster import HERE, ControlPlane
from tests.controlplane.faults.proxy import proxy
from tests.controlplane.operator import Operator

from trimtab_operator.core.api_server import ApiServer
from trimtab_operator.core.kube import FINETUNEJOB, JOB

STATUS = "finetunejobs/status"
QUIET_SECONDS = 5.0
RESYNC_WITHIN_SECONDS = 45.0
"""The first periodic list comes within this time of a start."""
NUDGES, NUDGE_SECONDS = 300, 0.05
"""Changes of children that call for no write, and the pause between two, while all is at rest."""
PROBES, PROBES_AT_ONCE = 60, 3
"""Jobs that live while all the others are at rest."""
LATE_JOBS = 20
"""Jobs that are created during the outage."""
_SCRAPE_SECONDS = 5.0
"""Looking costs the operator, too: a tally of all its jobs."""


class BenchError(Exception):
    """The jobs did not get where they should; the message says how far they came."""


@dataclass
class Run:
    """What was measured with so many jobs. Seconds, MB, and shares of one core in percent."""

    jobs: int
    children_seconds: float = 0.0
    complete_seconds: float = 0.0
    floor: Floor | None = None
    writes_per_job: dict[str, float] = field(default_factory=dict)
    status_writes_most: int = 0
    queue_depth_most: int = 0
    connections_most: int = 0
    resident_most: float = 0.0
    resident_at_rest: float = 0.0
    cpu_at_rest: float = 0.0
    cpu_busy_seconds: float = 0.0
    wake_up_bound: float = 0.0
    wake_ups_counted: int = 0
    told_after: list[float] = field(default_factory=list)
    restart_seconds: float = 0.0
    writes_at_rest: int = 0
    outage_seconds: float = 0.0
    back_seconds: float = 0.0


@contextmanager
def cluster(binaries: Path, jobs: int, policy: Path) -> Iterator[ControlPlane]:
    """A new control plane with the namespace, claim and nodes; pods stay Pending until `start_kwok` is called."""
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder,
        ControlPlane(Path(folder, "control-plane"), binaries, audit_policy=policy) as running,
    ):
        running.start_kwok(HERE / "stages" / "nodes.yaml")
        prepare_cluster(running, jobs)
        yield running


async def record_one(binaries: Path) -> Recording:
    """The operator's writes for one job."""
    with cluster(binaries, 1, HERE / "audit-policy.yaml") as control_plane:
        control_plane.start_kwok()
        async with client(control_plane.kubeconfig()) as kube:
            with Operator(control_plane):
                job = await submit(kube, "job-record")
                arguments = ("--for=condition=Complete", "ftj/job-record", "--timeout=180s", f"--namespace={NAMESPACE}")
                await asyncio.to_thread(control_plane.kubectl, "wait", *arguments)
                await asyncio.sleep(QUIET_SECONDS)
        return record(control_plane.audit(), "job-record", job["metadata"]["uid"])


async def measure_floor(binaries: Path, policy: Path, recording: Recording, jobs: int) -> Floor:
    """The bare loop on a control plane of its own, where no operator runs."""
    with cluster(binaries, jobs, policy) as control_plane:
        async with client(control_plane.kubeconfig()) as user, client(control_plane.kubeconfig(OPERATOR)) as operator:
            return await play(user, operator, recording, names(jobs))


class Sampler:
    """Looks at the operator now and then, and keeps the largest values."""

    def __init__(self, operator: Operator, run: Run) -> None:
        self._operator = operator
        self._run = run
        self.process = Watched(operator.pid)
        self.succeeded = 0

    async def sample(self) -> None:
        """Look once."""
        families = await asyncio.to_thread(self._operator.metrics)
        depth = int(families["trimtab_operator_queue_depth"].samples[0].value)
        phases: Counter[str] = Counter()
        for each in families["trimtab_operator_jobs"].samples:
            phases[each.labels["phase"]] += int(each.value)
        self.succeeded = phases["Succeeded"]
        self._run.queue_depth_most = max(self._run.queue_depth_most, depth)
        self._run.connections_most = max(self._run.connections_most, self.process.connections())
        self._run.resident_most = max(self._run.resident_most, self.process.most_resident())
        if phases["Failed"]:
            raise BenchError(f"{phases['Failed']} of {self._run.jobs} jobs failed")

    async def until(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Look until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise BenchError(f"{what}: not so after {seconds:.0f} s; {self.succeeded} jobs are complete")
            await self.sample()
            await asyncio.sleep(_SCRAPE_SECONDS)


async def measure(binaries: Path, policy: Path, jobs: int, rest_seconds: float, outage_seconds: float) -> Run:
    """The operator with so many jobs; an outage of no seconds is left out."""
    run = Run(jobs)
    with cluster(binaries, jobs, policy) as control_plane:
        log = AuditLog(control_plane.root / "audit.log")
        async with client(control_plane.kubeconfig()) as user:
            with Operator(control_plane) as operator:
                sampler = Sampler(operator, run)
                await _children(user, log, sampler, run)
                await _complete(control_plane, log, sampler, run)
                await _at_rest(operator, sampler.process, run, rest_seconds)
                await _nudge(user, operator, run)
                await _probe(user, log, sampler, run)
                await _restart(operator, log, run)
            if outage_seconds > 0:
                await _outage(control_plane, user, log, run, outage_seconds)
    return run


async def measure_children(binaries: Path, policy: Path, jobs: int) -> Run:
    """The operator with so many jobs, until their first children exist."""
    run = Run(jobs)
    with cluster(binaries, jobs, policy) as control_plane:
        log = AuditLog(control_plane.root / "audit.log")
        async with client(control_plane.kubeconfig()) as user:
            with Operator(control_plane) as operator:
                await _children(user, log, Sampler(operator, run), run)
    return run


async def _children(user: ApiServer, log: AuditLog, sampler: Sampler, run: Run) -> None:
    """All jobs at once, while no pod may run."""

    def told() -> bool:
        counts = Counter(write.name for write in log.by(OPERATOR, STATUS))
        return sum(count >= 2 for count in counts.values()) >= run.jobs

    creation = asyncio.create_task(at_once([partial(submit, user, name) for name in names(run.jobs)]))
    await sampler.until(told, "the children of all jobs exist", _patience(run))
    await creation
    began = min(write.received for write in log.by(USER, "finetunejobs"))
    run.children_seconds = _last_second_status(log) - began


def _patience(run: Run) -> float:
    """Seconds for one phase of all jobs."""
    return 180 + run.jobs * 0.3


async def _complete(control_plane: ControlPlane, log: AuditLog, sampler: Sampler, run: Run) -> None:
    """Pods may run, until all jobs are complete."""
    released = time.time()
    await asyncio.to_thread(control_plane.start_kwok)
    await sampler.until(lambda: sampler.succeeded >= run.jobs, "all jobs are complete", _patience(run))
    run.complete_seconds = run.children_seconds + max(write.answered for write in log.by(OPERATOR, STATUS)) - released
    run.cpu_busy_seconds = sampler.process.cpu_seconds()
    await _quiet(log)
    ours = [write for write in log.read() if write.user == OPERATOR]
    counts = Counter(write.resource for write in ours)
    run.writes_per_job = {resource: count / run.jobs for resource, count in sorted(counts.items())}
    run.status_writes_most = max(Counter(write.name for write in ours if write.resource == STATUS).values())


async def _quiet(log: AuditLog) -> None:
    """Wait until the operator has written nothing for a while: its last Events come after the last status."""
    before = -1
    while (written := _writes(log)) > before:
        before = written
        await asyncio.sleep(QUIET_SECONDS)


def _last_second_status(log: AuditLog) -> float:
    """When the last job's status told of its first children: that is the second write of each."""
    seen: Counter[str] = Counter()
    last = 0.0
    for write in log.by(OPERATOR, STATUS):
        seen[write.name] += 1
        if seen[write.name] == 2:
            last = max(last, write.answered)
    return last


async def _at_rest(operator: Operator, process: Watched, run: Run, seconds: float) -> None:
    """Nothing happens; Prometheus asks every 15 s."""
    before, began = process.cpu_seconds(), time.monotonic()
    while (left := began + seconds - time.monotonic()) > 0:
        await asyncio.sleep(min(15.0, left))
        await asyncio.to_thread(operator.metrics)
    run.cpu_at_rest = 100 * (process.cpu_seconds() - before) / (time.monotonic() - began)
    run.resident_at_rest = process.resident()


async def _nudge(user: ApiServer, operator: Operator, run: Run) -> None:
    """Jobs of the complete get an annotation, one after the other: the operator looks, and writes nothing."""
    children = await user.list_metadata(JOB, namespace=NAMESPACE)
    before = wake_ups(await asyncio.to_thread(operator.metrics))
    for number in range(NUDGES):
        metadata = children[number % len(children)]["metadata"]
        named = {"name": metadata["name"], "namespace": NAMESPACE, "annotations": {"bench/number": str(number)}}
        await user.apply({"apiVersion": JOB.api_version, "kind": JOB.kind, "metadata": named}, manager="bench")
        await asyncio.sleep(NUDGE_SECONDS)
    await asyncio.sleep(QUIET_SECONDS)
    after = wake_ups(await asyncio.to_thread(operator.metrics))
    run.wake_up_bound = bound(before, after, 0.99)
    run.wake_ups_counted = after[math.inf] - before[math.inf]


async def _probe(user: ApiServer, log: AuditLog, sampler: Sampler, run: Run) -> None:
    """A few more jobs, a few at a time, beside those at rest."""

    async def probe(name: str) -> None:
        await submit(user, name)
        while True:
            await asyncio.sleep(0.5)
            job = await user.get(FINETUNEJOB, NAMESPACE, name)
            if job is not None and job.get("status", {}).get("phase") == "Succeeded":
                return

    probes = names(PROBES, "probe")
    async with asyncio.timeout(600):
        await at_once([partial(probe, name) for name in probes], PROBES_AT_ONCE)
    run.told_after = latencies(log.read(), probes)
    await sampler.sample()


async def _restart(operator: Operator, log: AuditLog, run: Run) -> None:
    """A restart, and the first periodic list after it."""
    await asyncio.sleep(QUIET_SECONDS)
    before = _writes(log)
    await asyncio.to_thread(operator.stop)
    began = time.monotonic()
    await asyncio.to_thread(operator.start)
    run.restart_seconds = time.monotonic() - began
    await asyncio.sleep(RESYNC_WITHIN_SECONDS)
    run.writes_at_rest = _writes(log) - before
    run.resident_most = max(run.resident_most, Watched(operator.pid).most_resident())


async def _outage(control_plane: ControlPlane, user: ApiServer, log: AuditLog, run: Run, seconds: float) -> None:
    """Every request of the operator is answered 503 for a while, and jobs are created meanwhile."""
    through = control_plane.root / "through-the-proxy.kubeconfig"
    late = names(LATE_JOBS, "late")
    async with proxy(control_plane.kubeconfig(OPERATOR), through) as between:
        operator = Operator(control_plane, kubeconfig=through)
        await asyncio.to_thread(operator.__enter__)
        try:
            process = Watched(operator.pid)
            await asyncio.sleep(QUIET_SECONDS)
            between.failing = True
            await at_once([partial(submit, user, name) for name in late])
            await asyncio.sleep(seconds)
            over = time.time()
            between.failing = False

            def taken_up() -> bool:
                return {write.name for write in log.by(OPERATOR, STATUS)} >= set(late)

            sampler = Sampler(operator, run)
            await sampler.until(taken_up, "the jobs of the outage are taken up", 300)
            first = {write.name: write.answered for write in reversed(log.by(OPERATOR, STATUS)) if write.name in late}
            run.outage_seconds, run.back_seconds = seconds, max(first.values()) - over
            process.resident()  # raises where it is another process
        finally:
            await asyncio.to_thread(operator.__exit__, None, None, None)


def _writes(log: AuditLog) -> int:
    return sum(write.user == OPERATOR for write in log.read())
