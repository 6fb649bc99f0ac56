"""What must hold whatever happens: checked at each write of an operator, with what it knew and what was so."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.unit.faults.cluster import Cluster, owners
from tests.unit.faults.operator import Operator

from trimtab_operator.core.kube import Object, Ref
from trimtab_operator.core.names import MANAGED_BY

Role = tuple[str, str]
"""Uid of the job, and the stage; empty for prepare."""
ENDED = ("Succeeded", "Failed")


class History:
    """The writes so far, and what may never be seen in them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._recorded: dict[Role, dict[int, str]] = defaultdict(dict)
        """Attempt to the uid of its Job, as a status has had it."""
        self.writes = 0

    def wrote(self, operator: Operator, verb: str, ref: Ref, before: Object | None) -> None:
        """After a write, or right before a deletion. `before`: what was live."""
        self.writes += 1
        if verb == "delete":
            assert before is not None
            planned_for = operator.seen.get(before["metadata"]["uid"])
            assert planned_for == before["metadata"]["resourceVersion"], f"{ref} was deleted, newer than what was seen"
            self._is_ours(ref, before)
            return
        live = self._cluster.objects[ref]
        if verb == "status":
            self._status(ref, before or {}, live)
        elif before is not None and ref.kind not in ("ModelEndpoint",):
            self._is_ours(ref, before)
        elif verb == "create" and ref.kind == "Job":
            self._job(live)

    def _is_ours(self, ref: Ref, obj: Object) -> None:
        ours = obj["metadata"].get("labels", {}).get("app.kubernetes.io/managed-by") == MANAGED_BY or owners(obj)
        assert ours or ref.kind == "FineTuneJob", f"{ref} belongs to someone else and was written"

    def _job(self, job: Object) -> None:
        role, attempt = role_of(job), attempt_of(job)
        assert attempt not in self._recorded[role], f"attempt {attempt} of {role} has had a Job"
        owner = next((o for o in self._cluster.of_kind("FineTuneJob") if o["metadata"]["uid"] == role[0]), None)
        if owner is None:
            return  # it went between our look and our write; the garbage collector takes the Job
        record = record_of(owner.get("status", {}), role[1])
        assert record.get("attempt") == attempt, f"attempt {attempt} of {role} is not recorded: {record}"
        alive = [pod["metadata"]["name"] for pod in self._cluster.running() if self._is_of(pod, role)]
        assert not alive, f"attempt {attempt} of {role} starts while {alive} run"

    def _is_of(self, pod: Object, role: Role) -> bool:
        """By the pod's name, which follows from its Job's: neither labels nor owners that a person may have changed."""
        return any(
            pod["metadata"]["name"].startswith(f"{job['metadata']['name']}-")
            for change, job in self._cluster.log
            if job["kind"] == "Job" and role_of(job) == role and "trimtab.dev/attempt" in job["metadata"]["labels"]
        )

    def _status(self, ref: Ref, before: Object, live: Object) -> None:
        old, new = before.get("status", {}), live["status"]
        if ref.kind != "FineTuneJob":
            return
        uid = live["metadata"]["uid"]
        for role in ("", *(stage["name"] for stage in new.get("stages", []))):
            was, now = record_of(old, role), record_of(new, role)
            assert now.get("attempt", 0) >= was.get("attempt", 0), f"{ref} {role}: its attempt fell: {was} {now}"
            assert failures(now) >= failures(was), f"{ref} {role}: its failures fell: {was} {now}"
            assert now.get("artifact") or not was.get("artifact"), f"{ref} {role}: its result is forgotten"
            forgotten = [key for key in ("jobUID", "prepared") if key in was and key not in now]
            assert not forgotten or now["attempt"] > was["attempt"], f"{ref} {role}: {forgotten} of it forgotten"
            if "jobUID" in now:
                known = self._recorded[uid, role].setdefault(now["attempt"], now["jobUID"])
                assert known == now["jobUID"], f"{ref} {role}: attempt {now['attempt']} has had another Job"
        if old.get("phase") in ENDED:
            assert without(new) == without(old), f"{ref} had ended"
        held = {c["type"] for c in new["conditions"] if c["status"] == "True"}
        assert ("Complete" in held) == (new["phase"] == "Succeeded")
        assert ("Failed" in held) == (new["phase"] == "Failed")


def without(status: dict[str, Any]) -> dict[str, Any]:
    """A status but for the generation that it is about."""
    return {key: value for key, value in status.items() if key != "observedGeneration"}


def failures(record: dict[str, Any]) -> int:
    return int(record.get("failures", {}).get("count", 0))


def record_of(status: dict[str, Any], role: str) -> dict[str, Any]:
    if not role:
        return dict(status.get("prepare", {}))
    return next((dict(s) for s in status.get("stages", []) if s["name"] == role), {})


def role_of(job: Object) -> Role:
    return owners(job)[0] if owners(job) else "", job["metadata"]["labels"].get("trimtab.dev/stage", "")


def attempt_of(job: Object) -> int:
    return int(job["metadata"]["labels"]["trimtab.dev/attempt"])
