"""Jobs and endpoints in one cluster under random actions and faults, with two operators of which one may be stale."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.faults.cluster import NAMESPACE, Cluster, labelled, owners
from tests.unit.faults.history import ENDED, History
from tests.unit.faults.operator import WATCHED, Operator, Trouble
from tests.unit.finetunejob.world import DIGEST, spec, stage

from trimtab_operator.core.kube import Object, Ref, ref_of
from trimtab_operator.core.settings import Settings

EXAMPLES, STEPS = (int(part) for part in os.environ.get("TRIMTAB_MACHINE", "60x40").split("x"))
KINDS = [kind.kind for kind in WATCHED]
TROUBLES = ["crash before", "crash after", "refused", "busy", "conflict", "lost", "meanwhile"]
CHILDREN = ("Job", "ConfigMap", "Service", "Deployment")
SETTINGS = Settings()
JOB, ENDPOINT, FOLLOWER = (
    Ref("FineTuneJob", NAMESPACE, "tune"),
    Ref("ModelEndpoint", NAMESPACE, "chat"),
    Ref("ModelEndpoint", NAMESPACE, "base"),
)


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


class Faults(RuleBasedStateMachine):
    @initialize(nodes=st.sampled_from([1, 1, 2]), rollout=st.booleans(), steps=st.integers(0, 16))
    def start(self, nodes: int, rollout: bool, steps: int) -> None:
        """A new job, or one whose life has gone so many steps; the second operator saw half of it."""
        self.cluster = Cluster()
        self.history = History(self.cluster)
        self.operators = [Operator(self.cluster, self.history.wrote, SETTINGS) for _ in range(2)]
        more: dict[str, Any] = {"defaults": {"retries": 2}}
        if rollout:
            more["rollout"] = {"from": "end", "endpointName": "chat", "create": {"servedModelName": "chat"}}
        self.spec = spec(stage("first", nodes=nodes), stage("end", source="first"), **more)
        modes = {"accessModes": ["ReadWriteMany"]}
        self.cluster.add(obj("v1", "PersistentVolumeClaim", "models", modes))
        self.user_submits(None)
        for step in range(steps):
            self.operators[0].hear()
            for owner in self.operators[0].owners():
                self.operators[0].work(owner)
            self.run_pods()
            if step == steps // 2:
                self.operators[1].hear()

    # -- the operators
    @rule(
        steps=st.lists(st.sampled_from(["work", "work", "pods"]), min_size=1, max_size=12),
        data=st.data(),
    )
    def life_goes_on(self, steps: list[str], data: st.DataObject) -> None:
        """One operator that sees everything, well-behaved pods, and now and then a fault."""
        for step in steps:
            match step:
                case "work":
                    self.operators[0].hear()
                    for owner in self.operators[0].owners():
                        luck = data.draw(st.integers(0, 9))
                        self.operators[0].work(owner, self.trouble(0, data) if luck == 9 else None)
                case _:
                    self.run_pods()

    def run_pods(self) -> None:
        """The controllers work; what ran ends well."""
        running = self.cluster.running()
        self.cluster.tick()
        for pod in running:
            if pod["metadata"]["resourceVersion"] == self.version(pod):
                self.cluster.end(pod, 0, self.report(pod))
        for deployment in self.cluster.of_kind("Deployment"):
            self.cluster.serve(deployment)

    def version(self, obj: Object) -> str:
        live = self.cluster.objects.get(ref_of(obj))
        return str(live["metadata"]["resourceVersion"]) if live else ""

    @rule(
        which=st.sampled_from([0, 1, 1]),
        owner=st.sampled_from([JOB, JOB, ENDPOINT, FOLLOWER]),
        times=st.integers(1, 4),
        hears=st.booleans(),
        data=st.data(),
    )
    def operator_works(self, which: int, owner: Ref, times: int, hears: bool, data: st.DataObject) -> None:
        operator = self.operators[which]
        for _ in range(times):
            if hears:
                operator.hear()
            operator.work(owner, self.trouble(which, data))

    def trouble(self, which: int, data: st.DataObject) -> Trouble | None:
        kind = data.draw(st.sampled_from([None, *TROUBLES]))
        return Trouble(data.draw(st.integers(0, 5)), kind, self.meanwhile(which, data)) if kind else None

    def meanwhile(self, which: int, data: st.DataObject) -> Callable[[], None]:
        """Someone else acts between two requests of an operator."""
        other = self.operators[1 - which]

        def works() -> None:
            other.hear()
            for owner in (JOB, ENDPOINT):
                other.work(owner)

        def changes_are_told_of(data: st.DataObject) -> None:
            self.pod_ends(data)
            self.operators[which].hear()

        deeds = [
            works,
            changes_are_told_of,
            self.human_replaces_child,
            self.human_deletes_child,
            self.pod_ends,
            self.user_recreates,
        ]
        deed = deeds[data.draw(st.integers(0, len(deeds) - 1))]
        return works if deed == works else lambda: deed(data)

    @rule(which=st.integers(0, 1), kind=st.sampled_from(KINDS), most=st.integers(1, 3))
    def events_arrive(self, which: int, kind: str, most: int) -> None:
        self.operators[which].hear(kind, most)

    @rule(which=st.integers(0, 1), kind=st.sampled_from(KINDS))
    def events_are_lost(self, which: int, kind: str) -> None:
        self.operators[which].miss(kind)

    @rule(which=st.integers(0, 1))
    def operator_lists(self, which: int) -> None:
        self.operators[which].resync()

    @rule(which=st.integers(0, 1), behind=st.sampled_from([0, 0, 1, 3, 10, 40]))
    def operator_restarts(self, which: int, behind: int) -> None:
        self.operators[which].restart(behind)

    # -- users
    @rule(data=st.data())
    def user_submits(self, data: st.DataObject | None) -> None:
        if JOB not in self.cluster.objects:
            self.cluster.add(obj("trimtab.dev/v1alpha1", "FineTuneJob", "tune", self.spec))

    @rule(data=st.data())
    def user_recreates(self, data: st.DataObject) -> None:
        self.user_deletes(data)
        self.user_submits(data)

    def user_deletes(self, data: st.DataObject) -> None:
        if job := self.cluster.objects.get(JOB):
            way = data.draw(st.sampled_from([self.cluster.remove, self.cluster.orphan]))
            way(job)

    @rule(suspend=st.booleans())
    def user_suspends(self, suspend: bool) -> None:
        if job := self.cluster.objects.get(JOB):
            self.cluster.edit(job, suspend=suspend)

    @rule()
    def user_serves_a_stage(self) -> None:
        if FOLLOWER not in self.cluster.objects:
            model = {"uri": "job://tune/first"}
            self.cluster.add(endpoint("base", model))

    @rule(letter=st.sampled_from("xyz"), replicas=st.sampled_from([0, 1, 2]))
    def user_edits_the_endpoint(self, letter: str, replicas: int) -> None:
        model = {"uri": f"pvc://models/{letter}/model", "digest": f"sha256:{letter.replace('x', 'c') * 64}"[:71]}
        model["digest"] = "sha256:" + {"x": "c", "y": "d", "z": "e"}[letter] * 64
        if live := self.cluster.objects.get(ENDPOINT):
            self.cluster.edit(live, model=model, replicas=replicas)
        else:
            self.cluster.add(endpoint("chat", model))

    @rule()
    def user_deletes_the_endpoint(self) -> None:
        if live := self.cluster.objects.get(ENDPOINT):
            self.cluster.remove(live)

    # -- humans at what is ours
    def children(self) -> list[Object]:
        return [each for kind in CHILDREN for each in self.cluster.of_kind(kind)]

    @rule(data=st.data())
    def human_deletes_child(self, data: st.DataObject) -> None:
        if found := self.children():
            self.cluster.remove(data.draw(st.sampled_from(found)))

    @rule(data=st.data())
    def human_replaces_child(self, data: st.DataObject) -> None:
        if found := self.children():
            self.replace(data.draw(st.sampled_from(found)))

    def replace(self, old: Object) -> None:
        """`kubectl replace --force`: the same name, another uid."""
        self.cluster.remove(old)
        alive = {each["metadata"]["uid"] for each in self.cluster.objects.values()}
        if alive & set(owners(old)) and ref_of(old) not in self.cluster.objects:
            self.cluster.add({key: value for key, value in old.items() if key != "status"})

    @rule(data=st.data())
    def human_replaces_what_is_to_be_deleted(self, data: st.DataObject) -> None:
        """The operator knows the old one and that the job is suspended, and not yet that there is a new one."""
        job, running = self.cluster.objects.get(JOB), [j for j in self.cluster.of_kind("Job") if not j.get("status")]
        if job is None or not running:
            return
        self.cluster.edit(job, suspend=True)
        self.operators[0].hear()
        self.replace(data.draw(st.sampled_from(running)))
        self.operators[0].work(JOB)

    @rule(data=st.data(), label=st.sampled_from(["managed_by", "stage", "attempt", "revision", "job"]))
    def human_removes_a_label(self, data: st.DataObject, label: str) -> None:
        if found := [child for child in self.children() if child["kind"] != "Job"]:
            self.cluster.replace(labelled(data.draw(st.sampled_from(found)), **{label: None}))

    @rule(data=st.data())
    def human_scales_a_deployment(self, data: st.DataObject) -> None:
        if found := self.cluster.of_kind("Deployment"):
            self.cluster.edit(data.draw(st.sampled_from(found)), replicas=5)

    @rule()
    def stranger_takes_a_name(self) -> None:
        """A Service of the endpoint's name that is not ours."""
        if self.cluster.find("Service", "chat") is None:
            self.cluster.add(obj("v1", "Service", "chat", {"selector": {"app": "mine"}, "clusterIP": "10.0.0.9"}))

    @rule()
    def stranger_leaves(self) -> None:
        found = self.cluster.find("Service", "chat")
        if found is not None and not owners(found):
            self.cluster.remove(found)

    # -- pods and time
    @rule()
    def controllers_work(self) -> None:
        self.cluster.tick()

    @rule(data=st.data())
    def pod_ends(self, data: st.DataObject) -> None:
        if running := self.cluster.running():
            pod = data.draw(st.sampled_from(running))
            code = data.draw(st.sampled_from([0, 0, 0, 0, 75, 143, 71, 137, 65]))
            self.cluster.end(pod, code, "" if code else self.report(pod), disrupted=code == 143)

    @rule(data=st.data())
    def node_is_lost(self, data: st.DataObject) -> None:
        if running := self.cluster.running():
            self.cluster.lose(data.draw(st.sampled_from(running)))

    @rule(data=st.data())
    def job_expires(self, data: st.DataObject) -> None:
        """A Job that has ended is removed under us."""
        if ended := [job for job in self.cluster.of_kind("Job") if job.get("status")]:
            self.cluster.remove(data.draw(st.sampled_from(ended)))

    @rule(data=st.data(), ready=st.booleans())
    def deployment_moves(self, data: st.DataObject, ready: bool) -> None:
        if found := self.cluster.of_kind("Deployment"):
            self.cluster.serve(data.draw(st.sampled_from(found)), ready)

    @rule(seconds=st.sampled_from([1, 15, 60, 400]))
    def time_passes(self, seconds: int) -> None:
        self.cluster.sleep(seconds)

    def report(self, pod: Object) -> str:
        if pod["metadata"]["labels"].get("app.kubernetes.io/component") == "prepare":
            found = {"digest": DIGEST, "records": 10, "tokens": 100, "steps": 20, "memoryBytes": 2**30, "seconds": 5}
            return json.dumps({"kind": "prepare", "stages": [found, found]})
        return json.dumps({"kind": "train", "digest": DIGEST, "step": 20, "totalSteps": 20})

    @precondition(lambda self: hasattr(self, "cluster"))
    @invariant()
    def the_cluster_is_sound(self) -> None:
        """Of the checker itself: no object is owned by nobody that ever was."""
        assert len(self.cluster.log) >= len(self.cluster.objects)

    # -- eventually
    def teardown(self) -> None:
        """When faults stop, both come to rest where the spec asks, and then write nothing."""
        if not hasattr(self, "cluster"):
            return
        operator, other = self.operators
        other.restart(0)
        self.stranger_leaves()
        if JOB not in self.cluster.objects:
            self.user_submits(None)
        self.user_suspends(False)
        for name in ("chat", "base"):
            if live := self.cluster.find("ModelEndpoint", name):
                self.cluster.edit(live, replicas=1)
        for _ in range(60):
            self.behave()
            self.settle(operator)
            if self.at_rest():
                break
        assert self.at_rest(), f"no end: {self.describe()}"
        self.settle(operator)
        before = self.history.writes
        for each in (operator, other):
            each.restart(0)
            self.settle(each)
        assert self.history.writes == before, "at rest, and after a restart, nothing is written"
        running = [pod["metadata"]["name"] for pod in self.cluster.running()]
        assert not running, f"a job that has ended leaves pods running: {running}"

    def behave(self) -> None:
        """Pods end well, Deployments get ready, time passes."""
        self.cluster.tick()
        for pod in self.cluster.running():
            if "deletionTimestamp" in pod["metadata"]:
                self.cluster.end(pod, 75)
            elif Ref("Pod", NAMESPACE, pod["metadata"]["name"]) in self.cluster.objects:
                live = self.cluster.objects[Ref("Pod", NAMESPACE, pod["metadata"]["name"])]
                if "deletionTimestamp" not in live["metadata"]:
                    self.cluster.end(live, 0, self.report(live))
        for deployment in self.cluster.of_kind("Deployment"):
            self.cluster.serve(deployment)
        self.cluster.sleep(310)

    def settle(self, operator: Operator) -> None:
        operator.hear()
        operator.resync()
        for _ in range(60):
            operator.hear()
            written = [operator.work(owner) for owner in operator.owners()]
            if not any(written):
                return
        raise AssertionError(f"no rest: {self.describe()}")

    def at_rest(self) -> bool:
        job = self.cluster.objects[JOB].get("status", {})
        if job.get("phase") not in ENDED:
            return False
        wanted = [(ENDPOINT, True), (FOLLOWER, job["phase"] == "Succeeded")]
        return all(self.serves(ref) for ref, expected in wanted if expected and ref in self.cluster.objects)

    def serves(self, ref: Ref) -> bool:
        status = self.cluster.objects[ref].get("status", {})
        digest = self.cluster.objects[ref]["spec"]["model"].get("digest", DIGEST)
        return status.get("phase") == "Healthy" and status.get("stable", {}).get("digest") == digest

    def describe(self) -> str:
        found = {
            str(ref): self.cluster.objects[ref].get("status") for ref in (JOB, ENDPOINT) if ref in self.cluster.objects
        }
        return json.dumps(found, indent=1)


def obj(version: str, kind: str, name: str, spec: dict[str, Any]) -> Object:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec}


def endpoint(name: str, model: dict[str, Any]) -> Object:
    return obj("trimtab.dev/v1alpha1", "ModelEndpoint", name, {"servedModelName": name, "model": model, "replicas": 1})


TestFaults = Faults.TestCase
TestFaults.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
