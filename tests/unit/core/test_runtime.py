"""The loop as a whole, on the in-memory API: it converges, heals, and then is silent."""

import asyncio
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.core.toys import JOB_SPEC, SETTINGS, Toy, World, world

from trimtab_operator.core.actions import Create, Delete
from trimtab_operator.core.errors import Conflict, Forbidden, Invalid, KubeError, Unavailable
from trimtab_operator.core.kube import CONFIGMAP, EVENT, FINETUNEJOB, JOB, Change, Ref
from trimtab_operator.core.reconcile import _log_context
from trimtab_operator.core.runtime import Runtime
from trimtab_operator.core.store import Store

QUIET_SECONDS = 0.15


@pytest.fixture
async def here(tmp_path: Path) -> World:
    return world(tmp_path)


async def until(question: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not question():
        assert time.monotonic() < deadline, "not so after 20 s"
        await asyncio.sleep(0.005)


async def until_quiet(here: World) -> None:
    """Until nothing was written for a while."""
    while True:
        count = len(here.kube.writes)
        await asyncio.sleep(QUIET_SECONDS)
        if len(here.kube.writes) == count:
            return


def done(here: World) -> bool:
    return here.status().get("reason") == "1+1"


async def test_converges_then_rests_and_a_restart_writes_nothing(here: World) -> None:
    await here.submit()
    async with here.operator():
        await until(lambda: done(here))
        await until_quiet(here)
    config, job = Ref("ConfigMap", "default", "job-config"), Ref("Job", "default", "job-job")
    writes = [write for write in here.kube.writes if write[1].kind != EVENT.kind]
    assert [write for write in writes if write[1].kind != FINETUNEJOB.kind] == [("apply", config), ("create", job)]
    assert 1 <= len([write for write in writes if write[0] == "apply_status"]) <= 3
    (event,) = here.local.select(EVENT)
    assert (event["reason"], event["regarding"]["uid"]) == ("Started", (here.job() or {})["metadata"]["uid"])
    here.kube.writes.clear()
    async with here.operator() as runtime:
        await asyncio.sleep(QUIET_SECONDS)
        await runtime._diff(FINETUNEJOB)
    assert here.kube.writes == []


async def test_drift_heals(here: World) -> None:
    await here.submit()
    async with here.operator():
        await until(lambda: done(here))
        drifted = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "job-config", "namespace": "default"}}
        await here.local.apply({**drifted, "data": {"suspend": "maybe"}}, manager="someone")
        await until(lambda: (here.config() or {})["data"] == {"suspend": "False"})
        await here.local.delete(CONFIGMAP, "default", "job-config")
        await until(lambda: here.config() is not None)
        await here.submit(suspend=True)
        await until(lambda: (here.config() or {})["data"] == {"suspend": "True"})


@pytest.mark.parametrize("kind", [CONFIGMAP, FINETUNEJOB])
async def test_the_periodic_list_finds_what_no_event_told_of(here: World, kind: Any) -> None:
    await here.submit()
    async with here.operator(SETTINGS.model_copy(update={"resync_seconds": 0.2})) as runtime:
        await until(lambda: done(here))
        await until_quiet(here)
        here.feed.deaf = True
        if kind is CONFIGMAP:
            await here.local.delete(CONFIGMAP, "default", "job-config")
            await until(lambda: here.config() is not None)
        else:
            await here.local.delete(FINETUNEJOB, "default", "job")
            await here.submit("other")
            await until(lambda: here.status("other").get("reason") == "1+1")
            assert runtime.store.get(FINETUNEJOB, "default", "job") is None


async def test_what_belongs_to_another_is_left_alone(here: World) -> None:
    foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "job-config", "namespace": "default"}}
    made = await here.local.create({**foreign, "data": {"mine": "yes"}}, manager="someone")
    await here.submit()
    async with here.operator():
        await until(lambda: here.status().get("reason", "").startswith("NameTaken job-config"))
        await until_quiet(here)
        assert here.config() == made
        assert here.local.find(JOB, "default", "job-job") is None  # nothing after the refused step
        await here.local.delete(CONFIGMAP, "default", "job-config")
        await until(lambda: done(here))


async def test_a_job_of_another_is_no_attempt_of_ours(here: World) -> None:
    metadata = {"name": "job-job", "namespace": "default"}
    foreign = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": JOB_SPEC}
    made = await here.local.create(foreign, manager="someone")
    await here.submit()
    async with here.operator():
        await until(lambda: here.status().get("reason", "").startswith("NameTaken job-job"))
        assert here.local.find(JOB, "default", "job-job") == made


async def test_a_job_whose_creation_got_no_answer_is_found(here: World) -> None:
    """No event tells of it either: the name is taken, by us."""
    lost = False

    def lose(verb: str, ref: Ref) -> None:
        nonlocal lost
        if verb == "create" and ref.kind == JOB.kind and not lost:
            lost = True
            raise Unavailable(0, "TimeoutError", "no answer")

    here.kube.after = lose
    await here.submit()
    here.feed.deaf = True
    async with here.operator():
        await until(lambda: lost and done(here))
    assert len(here.local.select(JOB)) == 1


@pytest.mark.parametrize("error", [Invalid(422, "Invalid", "spec.x is wrong"), Forbidden(403, "Forbidden", "quota")])
async def test_a_refusal_is_told_and_tried_again_without_haste(here: World, error: KubeError) -> None:
    refuse = True

    def before(verb: str, ref: Ref) -> None:
        if verb == "apply" and refuse:
            raise error

    here.kube.before = before
    await here.submit()
    async with here.operator(SETTINGS.model_copy(update={"backoff_cap_seconds": 0.4})):
        await until(lambda: error.message in here.status().get("reason", ""))
        assert error.reason in here.status()["reason"]
        await asyncio.sleep(0.5)
        tries = len([write for write in here.kube.writes if write[0] == "apply"])
        assert len([write for write in here.kube.writes if write[0] == "apply_status"]) == 1
        assert tries < 14  # 5 ms doubled: about 8 in half a second
        refuse = False
        await until(lambda: done(here))


FAULTS = [
    Conflict(409, "Conflict", "stale"),
    Unavailable(503, "ServiceUnavailable", "down", retry_after=0.01),
    Unavailable(0, "TimeoutError", "no answer"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: error.reason)
@pytest.mark.parametrize("lost", [False, True], ids=["refused", "answer lost"])
@pytest.mark.parametrize("at", range(5))
async def test_any_write_may_fail_once(here: World, at: int, lost: bool, error: KubeError) -> None:
    """Also after it took effect: the same children, each once."""
    count = itertools.count()

    def fault(verb: str, ref: Ref) -> None:
        if ref.kind != EVENT.kind and next(count) == at:
            raise error

    setattr(here.kube, "after" if lost else "before", fault)
    await here.submit()
    async with here.operator():
        await until(lambda: done(here))
        await until_quiet(here)
    assert [job["metadata"]["name"] for job in here.local.select(JOB)] == ["job-job"]


@pytest.mark.parametrize("at", range(6))
async def test_a_crash_between_any_two_writes_is_repaired(here: World, at: int) -> None:
    """The process ends right after write number `at`; the next one finishes the work."""
    crashed = asyncio.Event()
    count = itertools.count()

    def crash(verb: str, ref: Ref) -> None:
        if crashed.is_set() or (ref.kind != EVENT.kind and next(count) == at):
            crashed.set()
            raise asyncio.CancelledError

    here.kube.after = crash
    await here.submit()
    async with here.operator():
        await until(lambda: crashed.is_set() or done(here))
    here.kube.after = lambda verb, ref: None
    async with here.operator():
        await until(lambda: done(here))
    creations = [write for write in here.kube.writes if write[0] == "create" and write[1].kind == JOB.kind]
    assert len(creations) == 1


@pytest.mark.parametrize("change", ["deleted", "suspended", "replaced"])
async def test_no_job_is_made_for_an_owner_that_has_changed(here: World, change: str) -> None:
    """The event is late: only the live owner tells."""
    changed = False

    async def meddle() -> None:
        here.feed.deaf = True
        if change == "suspended":
            await here.submit(suspend=True)
            return
        await here.local.delete(FINETUNEJOB, "default", "job")
        if change == "replaced":
            await here.submit()

    get = here.kube.get

    async def late_get(kind: Any, namespace: str, name: str) -> Any:
        nonlocal changed
        if kind is FINETUNEJOB and not changed:  # the check before the irreversible step
            changed = True
            await meddle()
        return await get(kind, namespace, name)

    here.kube.get = late_get  # type: ignore[method-assign]
    first = await here.submit()
    async with here.operator() as runtime:
        await until(lambda: changed)
        await until_quiet(here)
        stored = runtime.store.get(FINETUNEJOB, "default", "job")
    jobs = here.local.select(JOB)
    if change == "replaced":
        assert stored is not None
        assert {job["metadata"]["ownerReferences"][0]["uid"] for job in jobs} <= {stored["metadata"]["uid"]}
        assert stored["metadata"]["uid"] != first["metadata"]["uid"]
    else:
        assert jobs == []
        assert (stored is None) == (change == "deleted")


async def test_no_status_is_written_of_what_has_changed(here: World) -> None:
    """The user's change comes between plan and status, and no event tells of it."""
    owner = await here.submit()
    seen = []

    def meddle(verb: str, ref: Ref) -> None:
        if verb == "apply_status" and not here.feed.deaf:
            here.feed.deaf = True
            here.local.merge(owner, {"spec": {"suspend": True}})

    def look(verb: str, ref: Ref) -> None:
        if verb == "apply_status":
            job = here.job() or {}
            seen.append((job["metadata"]["generation"], job["status"]["observedGeneration"]))

    here.kube.before, here.kube.after = meddle, look
    async with here.operator():
        await until(lambda: here.status().get("reason") == "1+0")
        await until_quiet(here)
    assert set(seen) == {(2, 2)}


async def test_one_bad_object_does_not_stop_the_others(here: World) -> None:
    await here.submit("poison")
    await here.submit()
    async with here.operator() as runtime:
        await until(lambda: done(here))
        assert runtime.unhealthy() is None
        families = list(text_string_to_metric_families(generate_latest(runtime.metrics.registry).decode()))
    counted = [s for f in families for s in f.samples if s.name.endswith("reconcile_total")]
    errors = {s.labels["reason"]: s.value for s in counted if s.labels["outcome"] == "error"}
    assert errors.keys() == {"ZeroDivisionError"}
    assert errors["ZeroDivisionError"] >= 1
    assert here.status("poison") == {}


async def test_the_start_waits_for_the_api_server(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab_operator.core.runtime._RETRY_SECONDS", 0.01)
    away = True
    listing = here.kube.list_objects

    async def list_objects(kind: Any, **options: Any) -> Any:
        if away:
            raise Unavailable(0, "ClientConnectorError", "refused")
        return await listing(kind, **options)

    here.kube.list_objects = list_objects  # type: ignore[method-assign]
    await here.submit()
    runtime = Runtime(here.kube, here.feed, [], SETTINGS)
    starting = asyncio.create_task(runtime.start())
    await asyncio.sleep(0.1)
    assert not runtime.synced
    away = False
    await starting
    assert runtime.synced
    await runtime.stop()


async def test_nothing_is_written_after_the_stop(here: World) -> None:
    for number in range(20):
        await here.submit(f"job-{number}")
    async with here.operator():
        await until(lambda: here.kube.writes)
    count = len(here.kube.writes)
    await here.submit("late")
    await asyncio.sleep(QUIET_SECONDS)
    assert len(here.kube.writes) == count
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith(("worker", "resync", "events"))] == []


async def test_metrics_have_their_names(here: World) -> None:
    await here.submit()
    async with here.operator() as runtime:
        await until(lambda: done(here))
        runtime.metrics.observe_request("GET", 200)
        text = generate_latest(runtime.metrics.registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    prefix = "trimtab_operator_"
    assert set(families) >= {
        prefix + name
        for name in (
            "reconcile", "reconcile_seconds", "queue_depth", "queue_oldest_seconds", "api_requests", "store_objects",
            "watch_age_seconds", "jobs", "synced", "missed_changes",
        )
    }  # fmt: skip
    (jobs,) = families[prefix + "jobs"].samples
    assert (jobs.labels, jobs.value) == ({"phase": "Running", "stage_type": "pretrain"}, 1)
    stored = {s.labels["kind"]: s.value for s in families[prefix + "store_objects"].samples}
    assert (stored["FineTuneJob"], stored["ConfigMap"], stored["Job"]) == (1, 1, 1)


async def test_own_writes_are_read_without_any_event(here: World) -> None:
    await here.submit()
    here.feed.deaf = True
    async with here.operator():
        await until(lambda: done(here))


async def test_what_took_the_place_of_a_child_is_not_overwritten(here: World) -> None:
    """The store still shows our child; only the uid tells that another has its name."""
    await here.submit()
    async with here.operator() as runtime:
        await until(lambda: done(here))
        await until_quiet(here)
        here.feed.deaf = True
        await here.local.delete(CONFIGMAP, "default", "job-config")
        foreign = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "job-config", "namespace": "default"}}
        made = await here.local.create({**foreign, "data": {"mine": "yes"}}, manager="someone")
        runtime.deliver(Change.UPSERT, await here.submit(suspend=True))
        await until_quiet(here)
        assert here.config() == made


async def test_the_work_ends_and_begins_again_on_a_store_that_stays_warm(here: World) -> None:
    """As the leadership comes and goes: a passive replica hears everything, writes nothing, and need not list anew."""
    lists = 0
    listing = here.kube.list_objects

    async def list_objects(kind: Any, **options: Any) -> Any:
        nonlocal lists
        lists += 1
        return await listing(kind, **options)

    here.kube.list_objects = list_objects  # type: ignore[method-assign]
    runtime = Runtime(here.kube, here.feed, [Toy()], SETTINGS)
    await runtime.start()
    first = lists
    await here.submit()
    await asyncio.sleep(QUIET_SECONDS)
    assert runtime.store.get(FINETUNEJOB, "default", "job") is not None
    for round_ in range(2):
        assert (len(here.kube.writes), runtime.workers.depth) == (0, 0)
        broken = runtime.workers.begin()
        await until(lambda: done(here))
        await until_quiet(here)
        await runtime.workers.end(0 if round_ == 0 else 5)
        assert not broken.done()
        here.kube.writes.clear()
        await here.local.delete(FINETUNEJOB, "default", "job")
        await until(lambda: runtime.store.get(FINETUNEJOB, "default", "job") is None)
        await here.submit()
        await asyncio.sleep(QUIET_SECONDS)
    assert runtime.unhealthy() is None
    assert lists == first
    assert here.kube.writes == []
    await runtime.stop()


async def test_a_worker_that_ends_is_told(here: World) -> None:
    runtime = Runtime(here.kube, here.feed, [Toy()], SETTINGS)
    await runtime.start()
    broken = runtime.workers.begin()
    runtime.workers._workers[0].cancel()
    assert await asyncio.wait_for(broken, 20) == "worker-0"
    assert runtime.unhealthy() == "ended: worker-0"
    await runtime.stop()


async def test_a_feed_that_began_anew_has_the_store_compared(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list tells of no deletion."""
    monkeypatch.setattr("trimtab_operator.core.runtime._SETTLE_SECONDS", 0.01)
    await here.submit()
    async with here.operator() as runtime:
        await until(lambda: done(here))
        here.feed.deaf = True
        await here.local.delete(CONFIGMAP, "default", "job-config")
        runtime.suspect()
        await until(lambda: here.config() is not None)


def test_what_a_message_about_an_action_carries() -> None:
    labels = {"trimtab.dev/job": "j", "trimtab.dev/stage": "sft", "trimtab.dev/attempt": "2", "other": "x"}
    metadata = {
        "name": "a", "namespace": "n", "uid": "u", "resourceVersion": "1", "labels": labels,
    }  # fmt: skip
    obj = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
    store = Store()
    store.upsert(obj)
    expected = {"job": "j", "stage": "sft", "attempt": "2"}
    assert _log_context(Create(obj), store) == expected
    assert _log_context(Delete(JOB, "n", "a", "u", "1"), store) == expected
    assert _log_context(Delete(JOB, "n", "b", "u", "1"), store) == {}
