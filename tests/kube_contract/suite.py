"""What plans rely on, shown of every implementation of `Kube`: each imports these tests and brings a fixture `api`.

Only what `Kube` and `Feed` promise is used, so a difference between the API server and local mode shows here.
"""

from __future__ import annotations

import copy
from datetime import UTC, datetime

import pytest
from tests.kube_contract.support import (
    Api,
    configmap,
    eventually,
    finetunejob,
    manifest,
    modelendpoint,
    owner_reference,
    unique,
    until_gone,
)

from trimtab_operator.core.actions import EventNote, EventType
from trimtab_operator.core.errors import AlreadyExists, Conflict, Invalid, NotFound
from trimtab_operator.core.events import event_for
from trimtab_operator.core.kube import CONFIGMAP, EVENT, FINETUNEJOB, MODELENDPOINT, Change, Kind, Object, kind_of

A, B = "manager-a", "manager-b"


def version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])


async def test_create_once(api: Api) -> None:
    name = unique("once")
    made = await api.kube.create(configmap(api, name, {"a": "1"}), manager=A)
    assert (made["apiVersion"], made["kind"]) == ("v1", "ConfigMap")
    assert made["metadata"]["uid"]
    assert made["metadata"]["creationTimestamp"].endswith("Z")
    with pytest.raises(AlreadyExists):
        await api.kube.create(configmap(api, name, {"a": "2"}), manager=B)
    assert await api.kube.get(CONFIGMAP, api.namespace, name) == made


async def test_what_is_not_there(api: Api) -> None:
    name = unique("missing")
    assert await api.kube.get(CONFIGMAP, api.namespace, name) is None
    assert await api.kube.get(FINETUNEJOB, api.namespace, name) is None
    assert await api.kube.list_objects(FINETUNEJOB, namespace=api.namespace) == []
    await api.kube.delete(CONFIGMAP, api.namespace, name)
    await api.kube.delete(CONFIGMAP, api.namespace, name, uid="no-such-uid")
    with pytest.raises(NotFound):
        await api.kube.apply_status(manifest(api, FINETUNEJOB, name, status={"phase": "Running"}), manager=A)


async def test_an_object_keeps_to_its_own_namespace(api: Api) -> None:
    name = unique("here")
    made = await api.kube.create(configmap(api, name), manager=A)
    assert made["metadata"]["namespace"] == api.namespace
    assert await api.kube.get(CONFIGMAP, "default", name) is None
    everywhere = await api.kube.list_objects(CONFIGMAP)
    assert made["metadata"]["uid"] in {obj["metadata"]["uid"] for obj in everywhere}
    assert [obj["metadata"]["name"] for obj in await api.kube.list_objects(CONFIGMAP, namespace="default")].count(
        name
    ) == 0


async def test_events_are_found_by_what_they_are_about(api: Api) -> None:
    about = await api.kube.create(configmap(api, unique("about")), manager=A)
    other = await api.kube.create(configmap(api, unique("other")), manager=A)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for owner in (about, other):
        for type_ in EventType:
            note = EventNote(type_, "Mentioned", f"{type_} about {owner['metadata']['name']}")
            await api.kube.create(event_for(owner, note, "test", now), manager=A)
    fields = {"regarding.uid": about["metadata"]["uid"], "type": "Warning"}
    (found,) = await api.kube.list_objects(EVENT, namespace=api.namespace, fields=fields)
    assert found["note"] == f"Warning about {about['metadata']['name']}"
    assert (found["kind"], found["regarding"]["uid"]) == ("Event", about["metadata"]["uid"])


async def test_apply_creates_updates_and_drops_what_its_manager_drops(api: Api) -> None:
    name = unique("apply")
    first = await api.kube.apply(configmap(api, name, {"x": "1", "y": "1"}, labels={"l": "1"}), manager=A)
    assert first["data"] == {"x": "1", "y": "1"}
    second = await api.kube.apply(configmap(api, name, {"x": "2"}), manager=A)
    assert second["data"] == {"x": "2"}
    assert "labels" not in second["metadata"]
    assert second["metadata"]["uid"] == first["metadata"]["uid"]


async def test_text_is_kept_whatever_its_characters(api: Api) -> None:
    strange = "".join(map(chr, (0x07, 0x7F, 0x85, 0xA0, 0xE9, 0x2028, 0xFE0F, 0xFEFF, 0xFFFF, 0x1F3D6, 0x10FFFF)))
    data = {"text": f'{strange} "quoted": \\ud83c\\udfd6\t\n # {strange}\n'}
    made = await api.kube.create(configmap(api, unique("created"), data), manager=A)
    applied = await api.kube.apply(configmap(api, unique("applied"), data), manager=A)
    assert made["data"] == applied["data"] == data


async def test_two_managers_share_an_object(api: Api) -> None:
    name = unique("shared")
    await api.kube.apply(configmap(api, name, {"a": "1", "both": "a"}), manager=A)
    shared = await api.kube.apply(configmap(api, name, {"b": "1", "both": "b"}), manager=B)
    assert shared["data"] == {"a": "1", "b": "1", "both": "b"}  # by force
    left = await api.kube.apply(configmap(api, name, {"a": "2"}), manager=A)
    assert left["data"] == {"a": "2", "b": "1", "both": "b"}  # what B set stays B's


async def test_apply_keeps_what_the_same_manager_created(api: Api) -> None:
    """Fields of a POST belong to the manager's updates, not to its applies: a narrower apply removes none of them."""
    made = await api.kube.create(modelendpoint(api, unique("narrow"), replicas=2), manager=A)
    narrow = manifest(api, MODELENDPOINT, made["metadata"]["name"], spec={"model": {"uri": "job://other/second"}})
    applied = await api.kube.apply(narrow, manager=A)
    assert applied["spec"] == made["spec"] | {"model": {"uri": "job://other/second"}}


async def test_writing_the_same_again_changes_nothing(api: Api) -> None:
    job = finetunejob(api, unique("same"))
    status = manifest(api, FINETUNEJOB, job["metadata"]["name"], status={"phase": "Running", "reason": "Because"})
    await api.kube.apply(job, manager=A)
    before = await api.kube.apply_status(status, manager=B)
    assert await api.kube.apply(job, manager=A) == before
    assert await api.kube.apply_status(status, manager=B) == before
    plain = await api.kube.apply(configmap(api, unique("same"), {"a": "1"}), manager=A)
    assert version(await api.kube.apply(configmap(api, plain["metadata"]["name"], {"a": "1"}), manager=A)) == version(
        plain
    )


async def test_resource_versions_grow_over_all_objects(api: Api) -> None:
    one, two = unique("one"), unique("two")
    seen = [
        version(await api.kube.apply(configmap(api, name, {"n": str(n)}), manager=A))
        for n in (1, 2)
        for name in (one, two)
    ]
    assert seen == sorted(set(seen))


async def test_generation_grows_with_the_spec_only(api: Api) -> None:
    job = finetunejob(api, unique("generation"))
    assert (await api.kube.apply(job, manager=A))["metadata"]["generation"] == 1
    job["metadata"]["labels"] = {"team": "a"}
    assert (await api.kube.apply(job, manager=A))["metadata"]["generation"] == 1
    status = manifest(api, FINETUNEJOB, job["metadata"]["name"], status={"phase": "Running"})
    assert (await api.kube.apply_status(status, manager=B))["metadata"]["generation"] == 1
    job["spec"]["suspend"] = True
    assert (await api.kube.apply(job, manager=A))["metadata"]["generation"] == 2


async def test_status_is_a_thing_of_its_own(api: Api) -> None:
    job = finetunejob(api, unique("status"))
    job["status"] = {"phase": "Complete"}
    assert "status" not in await api.kube.create(job, manager=A)
    both = finetunejob(api, job["metadata"]["name"], suspend=True)
    both["status"] = {"phase": "Failed"}
    written = await api.kube.apply_status(both, manager=B)
    assert written["status"]["phase"] == "Failed"
    assert written["spec"]["suspend"] is False
    both["status"] = {"phase": "Running"}
    applied = await api.kube.apply(both, manager=A)
    assert applied["spec"]["suspend"] is True
    assert applied["status"]["phase"] == "Failed"


async def test_conditions_are_merged_by_type_and_dropped_by_their_manager(api: Api) -> None:
    job = await api.kube.create(finetunejob(api, unique("conditions")), manager=A)

    def status(*types: str) -> Object:
        stamp = "2026-01-01T00:00:00Z"
        entries = [{"type": t, "status": "True", "reason": "R", "lastTransitionTime": stamp} for t in types]
        return manifest(api, FINETUNEJOB, job["metadata"]["name"], status={"conditions": entries})

    await api.kube.apply_status(status("Accepted", "Suspended"), manager=A)
    both = await api.kube.apply_status(status("Complete"), manager=B)
    assert {c["type"] for c in both["status"]["conditions"]} == {"Accepted", "Suspended", "Complete"}
    fewer = await api.kube.apply_status(status("Accepted"), manager=A)
    assert {c["type"] for c in fewer["status"]["conditions"]} == {"Accepted", "Complete"}


@pytest.mark.parametrize("subresource", ["apply", "apply_status"])
async def test_a_resource_version_is_a_precondition(api: Api, subresource: str) -> None:
    made = await api.kube.create(finetunejob(api, unique("precondition")), manager=A)
    name = made["metadata"]["name"]
    write = getattr(api.kube, subresource)

    def body(phase: str, resource_version: str) -> Object:
        metadata = {"resourceVersion": resource_version}
        if subresource == "apply":
            return manifest(api, FINETUNEJOB, name, metadata=metadata | {"labels": {"phase": phase}})
        return manifest(api, FINETUNEJOB, name, metadata=metadata, status={"phase": phase})

    fresh = await write(body("Running", made["metadata"]["resourceVersion"]), manager=B)
    with pytest.raises(Conflict):
        await write(body("Failed", made["metadata"]["resourceVersion"]), manager=B)
    assert await api.kube.get(FINETUNEJOB, api.namespace, name) == fresh


async def test_apply_with_a_uid_writes_that_object_only(api: Api) -> None:
    for made in (
        await api.kube.create(finetunejob(api, unique("uid")), manager=A),
        await api.kube.create(configmap(api, unique("uid")), manager=A),
    ):
        kind, name = kind_of(made), made["metadata"]["name"]

        def body(uid: str, kind: Kind = kind, name: str = name) -> Object:
            return manifest(api, kind, name, metadata={"uid": uid, "labels": {"uid": uid[:8]}})

        fresh = await api.kube.apply(body(made["metadata"]["uid"]), manager=B)
        with pytest.raises(Conflict):
            await api.kube.apply(body("6a1f5a35-0000-4000-8000-000000000000"), manager=B)
        assert await api.kube.get(kind, api.namespace, name) == fresh


async def test_a_uid_keeps_apply_from_creating(api: Api) -> None:
    name = unique("never")
    with pytest.raises(Conflict):
        await api.kube.apply(configmap(api, name, uid="6a1f5a35-0000-4000-8000-000000000000"), manager=A)
    assert await api.kube.get(CONFIGMAP, api.namespace, name) is None


async def test_delete_only_the_object_that_is_meant(api: Api) -> None:
    made = await api.kube.create(configmap(api, unique("delete")), manager=A)
    name, uid = made["metadata"]["name"], made["metadata"]["uid"]
    with pytest.raises(Conflict):
        await api.kube.delete(CONFIGMAP, api.namespace, name, uid="another")
    assert await api.kube.get(CONFIGMAP, api.namespace, name) == made
    changed = await api.kube.apply(configmap(api, name, labels={"a": "b"}), manager=B)
    with pytest.raises(Conflict):
        await api.kube.delete(CONFIGMAP, api.namespace, name, uid=uid, version=made["metadata"]["resourceVersion"])
    assert await api.kube.get(CONFIGMAP, api.namespace, name) == changed
    await api.kube.delete(CONFIGMAP, api.namespace, name, uid=uid, version=changed["metadata"]["resourceVersion"])
    assert await api.kube.get(CONFIGMAP, api.namespace, name) is None  # at once: it has no finalizer
    again = await api.kube.create(configmap(api, name), manager=A)
    assert again["metadata"]["uid"] != uid


async def test_children_go_with_their_owner(api: Api) -> None:
    owner = await api.kube.create(finetunejob(api, unique("owner")), manager=A)
    child = await api.kube.apply(configmap(api, unique("child"), ownerReferences=[owner_reference(owner)]), manager=A)
    grandchild = await api.kube.apply(
        configmap(api, unique("grandchild"), ownerReferences=[owner_reference(child)]), manager=A
    )
    stranger = await api.kube.apply(configmap(api, unique("stranger")), manager=A)
    await api.kube.delete(FINETUNEJOB, api.namespace, owner["metadata"]["name"], uid=owner["metadata"]["uid"])
    for gone in (child, grandchild):
        await until_gone(api, CONFIGMAP, gone["metadata"]["name"])
    assert await api.kube.get(CONFIGMAP, api.namespace, stranger["metadata"]["name"]) == stranger


async def test_lists_select_by_labels(api: Api) -> None:
    for name, labels in {"one": {"app": "x", "tier": "a"}, "two": {"app": "x"}, "three": {"app": "y"}}.items():
        await api.kube.apply(configmap(api, name, {"big": "value"}, labels=labels), manager=A)

    async def names(labels: dict[str, str | None]) -> set[str]:
        listed = await api.kube.list_objects(CONFIGMAP, namespace=api.namespace, labels=labels)
        assert all((obj["apiVersion"], obj["kind"]) == ("v1", "ConfigMap") for obj in listed)
        bare = await api.kube.list_metadata(CONFIGMAP, namespace=api.namespace, labels=labels)
        assert all(set(obj) == {"apiVersion", "kind", "metadata"} for obj in bare)
        assert all((obj["apiVersion"], obj["kind"]) == ("v1", "ConfigMap") for obj in bare)
        keys = ("name", "uid", "resourceVersion", "labels")
        assert [[obj["metadata"][key] for key in keys] for obj in bare] == [
            [obj["metadata"][key] for key in keys] for obj in listed
        ]
        return {obj["metadata"]["name"] for obj in listed}

    assert await names({"app": "x"}) == {"one", "two"}
    assert await names({"app": None}) == {"one", "two", "three"}
    assert await names({"app": "x", "tier": None}) == {"one"}
    assert await names({"app": "z"}) == set()


async def test_the_schema_sets_defaults_and_prunes(api: Api) -> None:
    job = finetunejob(api, unique("defaults"))
    job["spec"]["notAField"] = {"a": 1}
    made = await api.kube.create(job, manager=A)
    assert made["spec"]["suspend"] is False
    assert "notAField" not in made["spec"]
    endpoint = await api.kube.apply(modelendpoint(api, unique("defaults")), manager=A)
    assert endpoint["spec"]["replicas"] == 1


TEXT = {"data": [{"uri": "pvc://data/text.txt"}]}
WRONG = {
    "no such URI scheme": ({"artifacts": {"uri": "ftp://x/y"}}, "spec.artifacts.uri"),
    "a required field is missing": ({"stages": [{"name": "a", "pretrain": {}}]}, "spec.stages[0].pretrain.data"),
    "a wrong type": ({"suspend": "yes"}, "spec.suspend"),
    "out of bounds": ({"activeDeadlineSeconds": 0}, "spec.activeDeadlineSeconds"),
    "too few items": ({"stages": []}, "spec.stages"),
    "not one of an enumeration": ({"stages": [{"name": "a", "pretrain": TEXT, "precision": "fp7"}]}, "precision"),
    "two stage types": ({"stages": [{"name": "a", "pretrain": TEXT, "sft": TEXT}]}, "set exactly one stage type"),
    "no stage type": ({"stages": [{"name": "a"}]}, "set exactly one stage type"),
    "an unknown stage": ({"stages": [{"name": "a", "from": "b", "pretrain": TEXT}]}, "from must name"),
    "a cycle": (
        {"stages": [{"name": "a", "from": "b", "pretrain": TEXT}, {"name": "b", "from": "a", "pretrain": TEXT}]},
        "earlier stage",
    ),
    "one name twice": (
        {"stages": [{"name": "a", "pretrain": TEXT}, {"name": "a", "pretrain": TEXT}]},
        "spec.stages[1]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_the_schema_refuses(api: Api, case: str) -> None:
    spec, words = WRONG[case]
    name = unique("wrong")
    with pytest.raises(Invalid) as raised:
        await api.kube.create(finetunejob(api, name, **spec), manager=A)
    assert words in raised.value.message
    assert await api.kube.get(FINETUNEJOB, api.namespace, name) is None


async def test_what_defines_a_result_is_fixed(api: Api) -> None:
    job = finetunejob(api, unique("fixed"))
    made = await api.kube.apply(job, manager=A)
    changes = {
        "artifacts can't be changed": lambda spec: spec["artifacts"].update(uri="pvc://other/place"),
        "pretrain can't be changed": lambda spec: spec["stages"][0].update(
            pretrain={"data": [{"uri": "pvc://data/b.txt"}]}
        ),
        "the stages of a job are fixed": lambda spec: spec["stages"].append({"name": "second", "pretrain": TEXT}),
        "only while the job is suspended": lambda spec: spec["stages"][0].update(nodes=2),
    }
    for words, change in changes.items():
        changed = copy.deepcopy(job)
        change(changed["spec"])
        with pytest.raises(Invalid) as raised:
            await api.kube.apply(changed, manager=A)
        assert words in raised.value.message
    assert await api.kube.get(FINETUNEJOB, api.namespace, job["metadata"]["name"]) == made
    job["spec"]["stages"][0]["retries"] = 7  # tolerant at any time
    assert (await api.kube.apply(job, manager=A))["spec"]["stages"][0]["retries"] == 7


async def test_the_status_has_a_schema_too(api: Api) -> None:
    job = await api.kube.create(finetunejob(api, unique("status")), manager=A)
    with pytest.raises(Invalid) as raised:
        await api.kube.apply_status(
            manifest(api, FINETUNEJOB, job["metadata"]["name"], status={"phase": "Imagined"}), manager=B
        )
    assert "status.phase" in raised.value.message


async def test_events_come_in_order(api: Api) -> None:
    name = unique("events")
    versions = [version(await api.kube.apply(configmap(api, name, {"n": str(n)}), manager=A)) for n in range(4)]
    uid = (await api.kube.apply(configmap(api, name, {"n": "3"}), manager=A))["metadata"]["uid"]
    await api.kube.delete(CONFIGMAP, api.namespace, name)

    async def deleted() -> bool:
        return any(change is Change.DELETE for change, _ in api.recorder.of(uid))

    await eventually(deleted)
    *upserts, (last, final) = api.recorder.of(uid)
    assert [(change, version(obj)) for change, obj in upserts] == [(Change.UPSERT, v) for v in versions]
    assert last is Change.DELETE
    assert version(final) > versions[-1]
    assert (final["apiVersion"], final["kind"]) == ("v1", "ConfigMap")
