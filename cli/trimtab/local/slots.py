"""What the machine has, shared out: which waiting pods may start now."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trimtab.local.objects import controller_uid
from trimtab_operator.core.kube import JOB, Object
from trimtab_operator.core.quantity import number


@dataclass(frozen=True)
class Machine:
    """CPU cores and accelerators."""

    cores: float
    accelerators: int


@dataclass(frozen=True)
class Demand:
    """What one pod asks for. Pods of one Job are a `group`: they wait for each other, so they start together."""

    uid: str
    group: str
    serving: bool
    cores: float
    accelerators: int


def this_machine() -> Machine:
    """Cores that this process may use, and NVIDIA devices."""
    devices = [path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()]
    return Machine(len(os.sched_getaffinity(0)), len(devices))


def demand(pod: Object, machine: Machine) -> Demand:
    """What a pod asks for; a pod of a Job that names no CPUs is taken to want all of them, one that serves just one."""
    asked: dict[str, int | str] = {}
    for container in pod["spec"]["containers"]:
        resources = container.get("resources", {})
        asked |= resources.get("limits", {}) | resources.get("requests", {})
    references = pod["metadata"].get("ownerReferences", [])
    serving = not any(reference["kind"] == JOB.kind for reference in references)
    cores = float(number(str(asked["cpu"]))) if "cpu" in asked else (1.0 if serving else machine.cores)
    accelerators = sum(int(value) for name, value in asked.items() if name.endswith("/gpu"))
    uid = pod["metadata"]["uid"]
    return Demand(uid, controller_uid(pod) or uid, serving, cores, accelerators)


def admit(
    running: Iterable[Demand], waiting: Iterable[Demand], machine: Machine, *, hold_serving: bool
) -> dict[str, str | None]:
    """Who may start: uid of each waiting pod -> None, or why not, in a scheduler's words.

    Jobs start in the order of `waiting`, none overtakes; one starts in any case when no other runs. Pods that serve are
    small: they wait while training goes on (`hold_serving`), but not for each other. Accelerators are never shared.
    """
    active = list(running)
    verdicts: dict[str, str | None] = {}
    groups: dict[str, list[Demand]] = {}
    for pod in waiting:
        groups.setdefault(pod.group, []).append(pod)
    blocked = False
    for group, pods in groups.items():
        cores, accelerators = sum(pod.cores for pod in pods), sum(pod.accelerators for pod in pods)
        used = sum(pod.cores for pod in active if not pod.serving)
        free = machine.accelerators - sum(pod.accelerators for pod in active)
        begun = any(pod.group == group for pod in active)
        left = max(machine.cores - used, 0)
        reason = None
        if accelerators > free:
            reason = f"Insufficient accelerators: {accelerators} asked for, {free} of {machine.accelerators} free here"
        elif pods[0].serving:
            if hold_serving:
                reason = "serving waits until training has ended"
        elif not begun and used and (blocked or used + cores > machine.cores):
            reason = f"Insufficient cpu: {cores:g} asked for, {left:g} of {machine.cores:g} free"
        blocked |= reason is not None and not pods[0].serving
        verdicts |= {pod.uid: reason for pod in pods}
        if reason is None:
            active += pods
    return verdicts
