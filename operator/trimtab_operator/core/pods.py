"""A pod as decisions see it: how its container ended, why it does not start, whether it was disrupted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from trimtab_operator.core.kube import Object
from trimtab_operator.core.podproblems import Stuck, stuck

_LOST_REASONS = ("Evicted", "NodeLost", "NodeShutdown", "Terminated", "Preempting")
"""`status.reason` of a pod that its node or the scheduler ended."""
_TRACKING = "batch.kubernetes.io/job-tracking"
_MAIN = ("trainer", "vllm")
"""Our containers; admission webhooks of others add some."""


@dataclass(frozen=True)
class Ended:
    """How the container ended."""

    exit_code: int
    reason: str = ""
    """The kubelet's word, e.g. OOMKilled."""
    message: str = ""
    """The termination message, as written by the container: hostile."""
    finished_at: str = ""


@dataclass(frozen=True)
class PodView:
    """One pod and its main container."""

    name: str
    uid: str = ""
    owner_uid: str = ""
    owner_name: str = ""
    """Uid and name of the controller."""
    labels: Mapping[str, str] = field(default_factory=dict)
    index: int = 0
    """Completion index of an Indexed Job's pod."""
    phase: str = "Pending"
    reason: str = ""
    message: str = ""
    node: str | None = None
    ip: str | None = None
    created: str = ""
    ready: bool = False
    deleting: bool = False
    gone_by: str = ""
    """When a deleted pod should be gone: its grace period included."""
    tracked: bool = False
    """The Job controller will count how it ends: it has its finalizer."""
    memory_limit: str = ""
    disrupted: str | None = None
    """Why the cluster took the pod away (eviction, preemption, a lost node); None where it did not."""
    running_since: str = ""
    """When the container started, whether or not it still runs."""
    ended: Ended | None = None
    previous: Ended | None = None
    """How the container ended before its last restart."""
    stuck: Stuck | None = None

    @property
    def failed(self) -> bool:
        """The pod is over, and not well."""
        return self.phase == "Failed" or (self.ended is not None and self.ended.exit_code != 0)

    @property
    def last_ended(self) -> Ended | None:
        """How the container ended last, whether or not it runs again."""
        return self.ended or self.previous

    @property
    def over(self) -> bool:
        """Nothing runs in the pod any more."""
        return self.phase in ("Failed", "Succeeded")


def pod_view(pod: Object) -> PodView:
    """The view of a raw Pod; what is missing in it counts as not said."""
    metadata, status = pod["metadata"], pod.get("status", {})
    owner: Object = next((o for o in metadata.get("ownerReferences", []) if o.get("controller")), {})
    spec: Object = pod.get("spec", {})
    container = _main(status.get("containerStatuses"))
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    labels = metadata.get("labels") or {}
    index = labels.get("batch.kubernetes.io/job-completion-index") or (metadata.get("annotations") or {}).get(
        "batch.kubernetes.io/job-completion-index", "0"
    )
    node = spec.get("nodeName")
    return PodView(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        owner_uid=owner.get("uid", ""),
        owner_name=owner.get("name", ""),
        labels=labels,
        index=int(index) if index.isdecimal() else 0,  # a label: a person may have changed it
        phase=status.get("phase", "Pending"),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        node=node,
        ip=status.get("podIP"),
        created=metadata.get("creationTimestamp", ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        deleting="deletionTimestamp" in metadata,
        gone_by=metadata.get("deletionTimestamp", ""),
        tracked=_TRACKING in (metadata.get("finalizers") or ()),
        memory_limit=str(
            ((_main(spec.get("containers")).get("resources") or {}).get("limits") or {}).get("memory", "")
        ),
        disrupted=_disrupted(status, conditions),
        running_since=next((s["startedAt"] for s in (container.get("state") or {}).values() if s.get("startedAt")), ""),
        ended=_ended(container.get("state")),
        previous=_ended(container.get("lastState")),
        stuck=stuck(metadata["name"], node, status, container),
    )


def _main(containers: Sequence[Object] | None) -> Object:
    """Our container, or the status of it; empty where there is none yet."""
    found = containers or []
    return next((c for c in found if c.get("name") in _MAIN), next(iter(found), {}))


def pod_age(pod: PodView, now: datetime) -> float:
    """Seconds since the pod was created; 0 where that is not known."""
    return (now - datetime.fromisoformat(pod.created)).total_seconds() if pod.created else 0.0


def _disrupted(status: Object, conditions: Mapping[str, Object]) -> str | None:
    target = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True":
        return target.get("reason") or "Disrupted"
    reason = status.get("reason", "")
    return reason if reason in _LOST_REASONS else None


def _ended(state: Object | None) -> Ended | None:
    terminated = (state or {}).get("terminated")
    if terminated is None:
        return None
    return Ended(
        exit_code=terminated.get("exitCode", 1),
        reason=terminated.get("reason") or "",
        message=terminated.get("message") or "",
        finished_at=terminated.get("finishedAt") or "",
    )
