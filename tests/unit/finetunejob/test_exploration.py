"""Random faults against the plan: crashes between writes, every way a pod can end, deletions, suspension."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.unit.finetunejob.world import Crash, World, spec, stage

from trimtab_operator.core.actions import Create
from trimtab_operator.core.kube import Ref

RETRIES = 2
COUNTED = (1, 71, 74, 137)
ENDED = ("Succeeded", "Failed")


class Faults(RuleBasedStateMachine):
    @initialize(rollout=st.booleans(), nodes=st.sampled_from([1, 2]))
    def start(self, rollout: bool, nodes: int) -> None:
        stages = [stage("base"), stage("left", source="base"), stage("right", source="base"), stage("own", nodes=nodes)]
        more: dict[str, Any] = {"defaults": {"retries": RETRIES}}
        if rollout:
            more["rollout"] = {"from": "left", "endpointName": "chat", "create": {"servedModelName": "chat"}}
        self.world = World(spec(*stages, **more))
        self.final_status: dict[str, Any] | None = None
        self.counted: dict[str, set[str]] = {}
        """Role to the Jobs that failed by a code that counts."""

    @rule(crash=st.integers(0, 6), times=st.integers(1, 4))
    def reconcile(self, crash: int, times: int) -> None:
        for _ in range(times):
            with contextlib.suppress(Crash):
                self.world.reconcile(crash_after=crash)

    @rule()
    def settle(self) -> None:
        self.world.settle()
        plan_status = copy.deepcopy(self.world.status)
        if self.world.key in self.world.objects:
            assert not self.world.reconcile()
            assert self.world.status == plan_status

    @rule(seconds=st.sampled_from([1, 15, 60, 400]))
    def wait(self, seconds: int) -> None:
        self.world.sleep(seconds)

    @rule(
        data=st.data(),
        code=st.sampled_from([0, 0, 0, 75, 75, 143, *COUNTED, *COUNTED, 65]),
        disrupted=st.sampled_from([False] * 4 + [True]),
    )
    def pod_ends(self, data: st.DataObject, code: int, disrupted: bool) -> None:
        running = [p for p in self.world.pods() if p["status"]["phase"] == "Running"]
        if not running:
            return
        pod = data.draw(st.sampled_from(running))
        role = pod["metadata"]["labels"].get("trimtab.dev/stage", "prepare")
        job = pod["metadata"]["ownerReferences"][0]["uid"]
        if code not in (0, 75) and not disrupted and "deletionTimestamp" not in pod["metadata"]:
            self.counted.setdefault(role, set()).add(job)
        message = self.world.report(role) if code == 0 else ""
        self.world.end(pod, code, message, disrupted=disrupted and code != 0)

    @rule(data=st.data())
    def terminating_pods_go(self, data: st.DataObject) -> None:
        for pod in [p for p in self.world.pods() if "deletionTimestamp" in p["metadata"]]:
            self.world.end(pod, 75)

    @rule(data=st.data())
    def someone_deletes_a_job(self, data: st.DataObject) -> None:
        if jobs := self.world.jobs():
            self.world.remove(data.draw(st.sampled_from(jobs)))

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        if self.world.owner["spec"]["suspend"] != suspend:
            self.world.edit(suspend=suspend)

    @rule()
    def endpoint_gets_ready(self) -> None:
        serve(self.world)

    @invariant()
    def a_job_is_created_only_with_its_number_recorded(self) -> None:
        for job, owner in zip(self.world.created, self.world.owner_at_creation, strict=True):
            record = record_of(owner["status"], role_of(job))
            assert record["attempt"] == attempt_of(job)
            assert "jobUID" not in record

    @invariant()
    def numbers_neither_skip_nor_repeat(self) -> None:
        recorded = {
            record["jobUID"]
            for status in self.world.status_writes
            for record in (*status.get("stages", []), status.get("prepare", {}))
            if "jobUID" in record
        }
        for role in {role_of(job) for job in self.world.created}:
            number = 1
            for job in (j for j in self.world.created if role_of(j) == role):
                assert attempt_of(job) == number, "the number is used up by its Job's recorded uid, and by nothing else"
                number += job["metadata"]["uid"] in recorded

    @invariant()
    def attempts_do_not_overlap(self) -> None:
        for role in {role_of(job) for job in self.world.jobs()}:
            assert len(self.world.jobs(role)) == 1
            owners = {p["metadata"]["ownerReferences"][0]["uid"] for p in self.world.pods(role)}
            assert owners <= {self.world.jobs(role)[0]["metadata"]["uid"]}

    @invariant()
    def only_real_failures_count(self) -> None:
        for record in (*self.world.status.get("stages", []), self.world.status.get("prepare", {})):
            count = record.get("failures", {}).get("count", 0)
            assert count <= RETRIES + 1
            assert count <= len(self.counted.get(record.get("name", "prepare"), set()))

    @invariant()
    def what_has_ended_stays_so(self) -> None:
        status = self.world.status
        if self.final_status is not None:
            assert {**status, "observedGeneration": 0} == {**self.final_status, "observedGeneration": 0}
            assert not any(isinstance(a, Create) for a in self.world.plan().actions)
        elif status.get("phase") in ENDED:
            self.final_status = copy.deepcopy(status)

    @invariant()
    def phase_and_conditions_agree(self) -> None:
        status = self.world.status
        if not status:
            return
        held = {c["type"] for c in status["conditions"] if c["status"] == "True"}
        assert ("Complete" in held) == (status["phase"] == "Succeeded")
        assert ("Failed" in held) == (status["phase"] == "Failed")
        assert not {"Complete", "Failed"} <= held

    def teardown(self) -> None:
        """Left alone with well-behaved pods, every job ends."""
        if not hasattr(self, "world"):
            return
        if self.world.owner["spec"]["suspend"]:
            self.world.edit(suspend=False)
        for _ in range(60):
            self.world.settle()
            if self.world.status["phase"] in ENDED:
                break
            self.terminating_pods_go(None)  # type: ignore[arg-type]
            for pod in self.world.pods():
                role = pod["metadata"]["labels"].get("trimtab.dev/stage", "prepare")
                if pod["status"]["phase"] == "Running":
                    self.world.end(pod, 0, self.world.report(role))
            serve(self.world)
            self.world.sleep(310)
        assert self.world.status["phase"] in ENDED
        self.world.settle()
        for _ in range(3):
            self.terminating_pods_go(None)  # type: ignore[arg-type]
            self.world.settle()
        running = [p["metadata"]["name"] for p in self.world.pods() if p["status"]["phase"] == "Running"]
        assert not running, "a job that has ended leaves no pod running"


def serve(world: World) -> None:
    """The endpoint's controller does its part."""
    endpoint = world.objects.get(Ref("ModelEndpoint", "team", "chat"))
    if endpoint is None:
        return
    model = endpoint["spec"]["model"]
    endpoint["status"] = {
        "url": "http://chat/v1",
        "stable": {"revision": "a", "digest": model["digest"], "uri": model["uri"], "ready": 1},
        "conditions": [
            {"type": "Ready", "status": "True", "reason": "Serving", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        ],
    }


def role_of(job: dict[str, Any]) -> str:
    return str(job["metadata"]["labels"].get("trimtab.dev/stage", "prepare"))


def attempt_of(job: dict[str, Any]) -> int:
    return int(job["metadata"]["labels"]["trimtab.dev/attempt"])


def record_of(status: dict[str, Any], role: str) -> dict[str, Any]:
    if role == "prepare":
        return dict(status["prepare"])
    return next(s for s in status["stages"] if s["name"] == role)


TestFaults = Faults.TestCase
TestFaults.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
