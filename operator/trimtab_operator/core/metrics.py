"""What the operator says about itself: `trimtab_operator_*`, for Prometheus."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab_operator.core.kube import CHILDREN, CLAIM, FINETUNEJOB, OWNERS
from trimtab_operator.core.store import Store

PREFIX = "trimtab_operator_"
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """One registry, so that two runtimes in a process don't meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            PREFIX + "reconcile_total", "Reconciliations.", ["kind", "outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            PREFIX + "reconcile_seconds",
            "Duration of a reconciliation.",
            ["kind"],
            buckets=_BUCKETS,
            registry=self.registry,
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
        self.synced = Gauge(PREFIX + "synced", "1 once every kind has been listed.", registry=self.registry)

    def observe_request(self, verb: str, code: int) -> None:
        """Count one request to the API server."""
        self.requests.labels(verb, str(code)).inc()


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
        counts: dict[tuple[str, ...], float] = {(kind.kind,): len(self._store.all_of(kind)) for kind in kinds}
        yield _gauge("store_objects", "Objects in the store.", counts, ["kind"])
        phases: Tally[tuple[str, ...]] = Tally(
            (str(job.get("status", {}).get("phase", "")),) for job in self._store.all_of(FINETUNEJOB)
        )
        yield _gauge("jobs", "FineTuneJobs by phase; empty before the first status.", dict(phases), ["phase"])


def _gauge(
    name: str, text: str, values: Mapping[tuple[str, ...], float], labels: Sequence[str] = ()
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
