"""The status that a kubelet would write for a pod: a pure function of what is known about its container."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from trimtab.local.objects import now
from trimtab_operator.core.conditions import set_condition
from trimtab_operator.core.kube import Object

MESSAGE_LIMIT = 4096


@dataclass
class PodState:
    """What the kubelet knows of one pod."""

    phase: str = "Pending"
    address: str | None = None
    started_at: str | None = None
    ready: bool = False
    started: bool = False
    restarts: int = 0
    container: dict[str, Any] = field(default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}})
    last: dict[str, Any] = field(default_factory=dict)
    disruption: str | None = None
    """Why the pod was ended from outside, in one word; None where it was not."""


def running(started_at: str) -> dict[str, Any]:
    """The state of a running container."""
    return {"running": {"startedAt": started_at}}


def waiting(reason: str, message: str) -> dict[str, Any]:
    """The state of a container that does not run."""
    return {"waiting": {"reason": reason, "message": message[:MESSAGE_LIMIT]}}


def terminated(exit_code: int, message: bytes, started_at: str, *, oom_killed: bool) -> dict[str, Any]:
    """The state of a container that has ended; the message is cut as a kubelet cuts it."""
    reason = "Completed" if exit_code == 0 else "OOMKilled" if oom_killed else "Error"
    ended = {"exitCode": exit_code, "reason": reason, "startedAt": started_at, "finishedAt": now()}
    text = message[-MESSAGE_LIMIT:].decode(errors="replace")
    return {"terminated": ended | ({"message": text} if text else {})}


def unschedulable(pod: Object, message: str) -> Object:
    """The status of a pod that waits for a place."""
    return {"phase": "Pending", "conditions": _conditions(pod, {"PodScheduled": (False, "Unschedulable", message)})}


def status(pod: Object, state: PodState) -> Object:
    """The whole status."""
    verdicts = {
        "PodScheduled": (True, "Scheduled", ""),
        "Initialized": (True, "PodCompleted", ""),
        "ContainersReady": (state.ready, "Containers", ""),
        "Ready": (state.ready, "Containers", ""),
    }
    if state.disruption:
        message = "the pod was ended with local mode, not by a fault of its own"
        verdicts["DisruptionTarget"] = (True, state.disruption, message)
    container = pod["spec"]["containers"][0]
    entry = {
        "name": container["name"],
        "image": container.get("image", ""),
        "imageID": "",
        "ready": state.ready,
        "started": state.started,
        "restartCount": state.restarts,
        "state": state.container,
        "lastState": state.last,
    }
    out: Object = {"phase": state.phase, "conditions": _conditions(pod, verdicts), "containerStatuses": [entry]}
    if state.address:
        out |= {"podIP": state.address, "podIPs": [{"ip": state.address}], "hostIP": "127.0.0.1"}
    if state.started_at:
        out["startTime"] = state.started_at
    return out


def _conditions(pod: Object, verdicts: dict[str, tuple[bool, str, str]]) -> list[Object]:
    conditions: list[Object] = pod["status"].get("conditions", [])
    for kind, (true, reason, message) in verdicts.items():
        conditions = set_condition(conditions, kind, true, reason, message, 0, datetime.now(UTC))
    return conditions
