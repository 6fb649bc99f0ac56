"""How soon a change of a child is dealt with: by the operator's clock where nothing is to do, else by the server's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from bench.operator.audit import OPERATOR, Write
from prometheus_client import Metric

_JOB_CONTROLLER = "system:serviceaccount:kube-system:job-controller"

_WAKE_UP = "trimtab_operator_wake_up_seconds"
Buckets = Counter[float]
"""How many values were at most so many seconds."""


def wake_ups(families: Mapping[str, Metric]) -> Buckets:
    """The operator's own histogram: from the event to the end of the reconciliation, of those that wrote nothing."""
    chosen = {"kind": "FineTuneJob", "outcome": "unchanged"}
    return Counter(
        {
            float(sample.labels["le"]): int(sample.value)
            for sample in families[_WAKE_UP].samples
            if sample.name.endswith("_bucket") and chosen.items() <= sample.labels.items()
        }
    )


def bound(before: Buckets, after: Buckets, share: float) -> float:
    """A time that so large a share of the values between two looks did not exceed: the bound of a bucket."""
    counts = {edge: after[edge] - before[edge] for edge in after}
    return min(edge for edge, count in counts.items() if count >= share * counts[math.inf])


def latencies(writes: Sequence[Write], owners: Sequence[str]) -> list[float]:
    """Seconds from the Job controller's Complete of a child to the answer to the status write that follows from it.

    Both writes are within that time, and so are the watch, the queue and the reconciliation.
    """
    found = []
    for owner in owners:
        ended: dict[str, float] = {}
        for write in writes:
            if (write.user, write.resource) == (_JOB_CONTROLLER, "jobs/status") and write.name.startswith(f"{owner}-"):
                ended[write.name] = write.received  # the last one is Complete
        told = [w for w in writes if (w.user, w.resource, w.name) == (OPERATOR, "finetunejobs/status", owner)]
        for moment in ended.values():
            later = [write.answered for write in told if write.received > moment]
            if later:
                found.append(min(later) - moment)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]
