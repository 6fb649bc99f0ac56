"""How soon a child's event has moved its owner, by the API server's own clock."""

from __future__ import annotations

from collections.abc import Sequence

from bench.operator.audit import OPERATOR, Write

_JOB_CONTROLLER = "system:serviceaccount:kube-system:job-controller"


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
