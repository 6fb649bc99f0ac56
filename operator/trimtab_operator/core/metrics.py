"""What the operator says about itself: `trimtab_operator_*`, for Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab_operator.api.stage import STAGE_TYPES
from trimtab_operator.api.status import StagePhase
from trimtab_operator.core.actions import Spent
from trimtab_operator.core.kube import CHILDREN, CLAIM, FINETUNEJOB, OWNERS, Object
from trimtab_operator.core.store import Store

PREFIX = "trimtab_operator_"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_MAX_REASONS = 64


class Metrics:
    """One registry, so that two runtimes in a process don't meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            PREFIX + "reconcile_total",
            "Reconciliations; reason is the API server's, or the error's class, and empty where all went well.",
            ["kind", "outcome", "reason"],
            registry=self.registry,
        )
        self.seconds = self._histogram("reconcile_seconds", "Duration of a reconciliation.")
        self.wake_up = self._histogram(
            "wake_up_seconds",
            "From the first change that concerns an owner to the end of its reconciliation: queue and writes included.",
        )
        self.requests = Counter(
            PREFIX + "api_requests_total",
            "Requests to the API server; code 0 where there was no answer.",
            ["verb", "code"],
            registry=self.registry,
        )
        self.missed = Counter(
            PREFIX + "missed_changes_total",
            "Changes that no event told of and the periodic list found.",
            ["kind"],
            registry=self.registry,
        )
        self.accelerator_seconds = Counter(
            PREFIX + "accelerator_seconds_total",
            "Seconds for which training pods held accelerators, times their number, by how the attempt ended.",
            ["namespace", "outcome"],
            registry=self.registry,
        )
        self.watch_restarts = Counter(
            PREFIX + "watch_restarts_total", "How often the watches ended and were begun anew.", registry=self.registry
        )
        self.synced = Gauge(PREFIX + "synced", "1 once every kind has been listed.", registry=self.registry)
        self._reasons: set[str] = set()

    def observe_reconcile(self, kind: str, outcome: str, reason: str, *, seconds: float, since_wake_up: float) -> None:
        """Count one reconciliation. A webhook may refuse with any reason, so only the first ones get a series."""
        if len(self._reasons) < _MAX_REASONS:
            self._reasons.add(reason)
        self.reconciles.labels(kind, outcome, reason if reason in self._reasons else "Other").inc()
        self.seconds.labels(kind, outcome).observe(seconds)
        self.wake_up.labels(kind, outcome).observe(since_wake_up)

    def show_leadership(self, leading: Callable[[], bool], transitions: Callable[[], int]) -> None:
        """Have `leader` and `leader_transitions_total` read from here."""
        self.registry.register(_LeaderCollector(leading, transitions))

    def observe_spent(self, namespace: str, spent: Spent) -> None:
        """Count what an attempt has cost."""
        self.accelerator_seconds.labels(namespace, spent.outcome).inc(spent.accelerator_seconds)

    def observe_request(self, verb: str, code: int) -> None:
        """Count one request to the API server."""
        self.requests.labels(verb, str(code)).inc()

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(PREFIX + name, text, ["kind", "outcome"], buckets=_BUCKETS, registry=self.registry)


class _LeaderCollector(Collector):
    def __init__(self, leading: Callable[[], bool], transitions: Callable[[], int]) -> None:
        self._leading = leading
        self._transitions = transitions

    def collect(self) -> Iterable[Metric]:
        yield _gauge("leader", "1 while this replica may write.", {(): float(self._leading())})
        yield CounterMetricFamily(
            PREFIX + "leader_transitions", "How often this replica became the leader.", value=self._transitions()
        )


class RuntimeCollector(Collector):
    """What is read when Prometheus asks: queue, store, watches, jobs."""

    def __init__(
        self,
        store: Store,
        depth: Callable[[], int],
        oldest_seconds: Callable[[], float],
        watch_ages: Callable[[], dict[str, float]],
    ) -> None:
        self._store = store
        self._depth = depth
        self._oldest_seconds = oldest_seconds
        self._watch_ages = watch_ages

    def collect(self) -> Iterable[Metric]:
        """The families, in the order of their names' meaning."""
        yield _gauge("queue_depth", "Keys that wait for a worker.", {(): self._depth()})
        yield _gauge("queue_oldest_seconds", "How long the oldest key has waited.", {(): self._oldest_seconds()})
        yield _gauge(
            "watch_age_seconds",
            "Time since the last event or complete list of a kind.",
            {(kind,): age for kind, age in self._watch_ages().items()},
            ["kind"],
        )
        kinds = (*OWNERS, *CHILDREN, CLAIM)
        counts: dict[tuple[str, ...], float] = {(kind.kind,): self._store.count(kind) for kind in kinds}
        yield _gauge("store_objects", "Objects in the store.", counts, ["kind"])
        phases: Tally[tuple[str, ...]] = Tally(map(_phase_and_type, self._store.all_of(FINETUNEJOB)))
        yield _gauge(
            "jobs",
            "FineTuneJobs by phase (empty before the first status) and type of the stage that they are at.",
            dict(phases),
            ["phase", "stage_type"],
        )


def _phase_and_type(job: Object) -> tuple[str, str]:
    """The job's phase, and the type of its first stage that has not succeeded, or of the last one."""
    status = job.get("status", {})
    done = {stage["name"] for stage in status.get("stages", []) if stage.get("phase") == StagePhase.SUCCEEDED}
    stages = job["spec"]["stages"]
    at = next((stage for stage in stages if stage["name"] not in done), stages[-1])
    return str(status.get("phase", "")), next((each for each in STAGE_TYPES if each in at), "")


def _gauge(
    name: str, text: str, values: Mapping[tuple[str, ...], float], labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
