"""Why a pod does not start, or does not stay up; worded so that it does not change while the cause stays."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from trimtab_operator.core.kube import Object

_CREATE_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_IMAGE_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
_BACK_OFF = re.compile(r'^Back-off pulling image "[^"]*"(: \w+)?(: )?')
"""The kubelet's words alternate between the cause and this with the cause behind it."""
_RANDOM_NAME = re.compile(r'^(Error creating: )?pods? "[^"]*" is forbidden: |^Error creating: ')
"""The pod that was refused has a new name each time."""


@dataclass(frozen=True)
class Stuck:
    """What keeps a pod from running."""

    reason: str
    message: str


def stuck(name: str, node: str | None, status: Object, container: Object) -> Stuck | None:
    """What keeps a pod from running; None where nothing is known to.

    Args:
        name: Of the pod.
        node: Where it was put; None: nowhere yet.
        status: The pod's.
        container: Status of its main container.
    """
    conditions = {condition["type"]: condition for condition in status.get("conditions") or []}
    return (
        _initialising(name, status.get("initContainerStatuses") or [])
        or _waiting(name, container)
        or _unscheduled(name, conditions)
        or _silent_node(name, node, status, conditions)
    )


def refusal_words(note: str) -> str:
    """What admission said of a pod that a controller wanted to create.

    >>> refusal_words('Error creating: pods "job-0-x7k2p" is forbidden: exceeded quota: gpus')
    'exceeded quota: gpus'
    """
    return _RANDOM_NAME.sub("", note)


def refused(who: str, words: str) -> Stuck:
    """Admission refuses the pods of `who`."""
    return Stuck("QuotaExceeded" if "exceeded quota" in words else "PodsRefused", f"{who} gets no pod: {words}")


def _waiting(name: str, container: Object) -> Stuck | None:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, told = waiting.get("reason", ""), waiting.get("message") or ""
    if reason in _IMAGE_REASONS:
        words = _BACK_OFF.sub("", told)
        return Stuck(
            "ImagePullFailed",
            f"pod {name}: the image {container.get('image', '')!r} can't be pulled; check its name, and "
            f"imagePullSecrets for a private one{': ' if words else ''}{words}",
        )
    if reason in _CREATE_REASONS:
        return Stuck("CreateFailed", f"pod {name}: {told or reason}")
    if reason == "CrashLoopBackOff":
        return Stuck("CrashLoop", f"pod {name} ends again and again; see kubectl logs {name} --previous")
    return None


def _initialising(name: str, containers: Iterable[Object]) -> Stuck | None:
    """Our pods have no init containers; admission webhooks of others add some."""
    for container in containers:
        which = container.get("name", "")
        ended = {**(container.get("lastState") or {}), **(container.get("state") or {})}.get("terminated") or {}
        if ended.get("exitCode", 0) != 0:
            told = f"pod {name}: init container {which} ended with exit code {ended['exitCode']}"
            return Stuck("InitFailed", f"{told}; see kubectl logs {name} -c {which}")
        if found := _waiting(name, container):
            return Stuck(found.reason, f"{found.message} (init container {which})")
    return None


def _unscheduled(name: str, conditions: Mapping[str, Object]) -> Stuck | None:
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False" and scheduled.get("reason") in ("Unschedulable", "SchedulingGated"):
        return Stuck(scheduled["reason"], f"pod {name}: {scheduled.get('message') or 'no node fits'}")
    return None


def _silent_node(name: str, node: str | None, status: Object, conditions: Mapping[str, Object]) -> Stuck | None:
    """The node controller sets Ready to False on a node that does not answer; all else stays as it was last heard."""
    ready = conditions.get("Ready", {})
    if (
        status.get("phase") == "Running"
        and ready.get("status") == "False"
        and not ready.get("reason")
        and conditions.get("ContainersReady", {}).get("status") == "True"
    ):
        told = f"pod {name}: node {node} does not answer; after some minutes its pods are taken away"
        return Stuck("NodeNotReady", told)
    return None
