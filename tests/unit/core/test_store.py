"""The store only goes forward, whatever the order of events, lists and answers."""

import itertools
import random
from typing import Any

import pytest

from trimtab_operator.core.kube import CONFIGMAP, JOB, Object, Ref, ref_of
from trimtab_operator.core.store import Store


def configmap(name: str, version: int, uid: str = "u1", **metadata: Any) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": "n", "uid": uid, "resourceVersion": str(version), **metadata},
    }


def get(store: Store, name: str) -> Object | None:
    return store.get(CONFIGMAP, "n", name)


def test_an_older_version_changes_nothing() -> None:
    store = Store()
    assert store.upsert(configmap("a", 9))
    assert not store.upsert(configmap("a", 8))
    assert not store.upsert(configmap("a", 9))
    assert store.upsert(configmap("a", 10))  # as numbers: "10" < "9"
    assert get(store, "a") == configmap("a", 10)


def test_a_deleted_object_does_not_come_back() -> None:
    store = Store()
    store.upsert(configmap("a", 5))
    assert store.remove(configmap("a", 7))
    assert not store.upsert(configmap("a", 6))
    assert get(store, "a") is None
    assert not store.remove(configmap("a", 7))


def test_the_deletion_may_come_before_what_it_deletes() -> None:
    store = Store()
    assert not store.remove(configmap("a", 7))
    assert not store.upsert(configmap("a", 5))
    assert get(store, "a") is None


def test_an_object_that_left_the_selection_may_come_back() -> None:
    """A label that is removed looks like a deletion; the same object returns when the label does."""
    store = Store()
    store.upsert(configmap("a", 5))
    store.remove(configmap("a", 6))
    assert store.upsert(configmap("a", 7))
    assert get(store, "a") == configmap("a", 7)


def test_a_new_object_of_an_old_name() -> None:
    store = Store()
    store.upsert(configmap("a", 5, uid="old"))
    assert store.upsert(configmap("a", 9, uid="new"))
    assert not store.upsert(configmap("a", 6, uid="old"))
    assert not store.remove(configmap("a", 7, uid="old"))
    assert get(store, "a") == configmap("a", 9, uid="new")


def test_any_order_ends_the_same() -> None:
    """The end of a history does not depend on the order in which it is told, answers and events twice."""
    history = [
        ("upsert", configmap("a", 1, uid="one", labels={"trimtab.dev/job": "x"})),
        ("upsert", configmap("a", 2, uid="one", labels={"trimtab.dev/job": "y"})),
        ("remove", configmap("a", 3, uid="one")),
        ("upsert", configmap("a", 4, uid="two", labels={"trimtab.dev/job": "z"})),
        ("upsert", configmap("b", 5, uid="three")),
        ("remove", configmap("b", 6, uid="three")),
    ]
    orders = list(itertools.permutations(history))
    for order in random.Random(0).sample(orders, 300):
        store = Store()
        for method, obj in (*order, *order):
            getattr(store, method)(obj)
        assert [ref_of(obj) for obj in store.all_of(CONFIGMAP)] == [Ref("ConfigMap", "n", "a")]
        assert [obj["metadata"]["uid"] for obj in store.labelled(CONFIGMAP, "n", "trimtab.dev/job", "z")] == ["two"]
        assert store.labelled(CONFIGMAP, "n", "trimtab.dev/job", "y") == []


def test_indices_follow() -> None:
    store = Store()
    owner = {"uid": "o", "kind": "FineTuneJob", "name": "job", "controller": True}
    for name in ("b", "a"):
        metadata = {"ownerReferences": [{"uid": "other"}, owner], "labels": {"trimtab.dev/job": "job", "app": "x"}}
        store.upsert(configmap(name, 1, uid=name, **metadata))
    assert [obj["metadata"]["name"] for obj in store.owned(CONFIGMAP, "n", "o")] == ["a", "b"]
    assert store.owned(CONFIGMAP, "n", "other") == []
    assert store.owned(JOB, "n", "o") == []
    assert store.owned(CONFIGMAP, "m", "o") == [], "nobody adopts a child of another namespace"
    assert [obj["metadata"]["name"] for obj in store.labelled(CONFIGMAP, "n", "trimtab.dev/job", "job")] == ["a", "b"]
    assert store.labelled(CONFIGMAP, "m", "trimtab.dev/job", "job") == []
    store.upsert(configmap("a", 2, uid="a"))
    store.remove(configmap("b", 3, uid="b"))
    assert store.owned(CONFIGMAP, "n", "o") == []
    assert store.labelled(CONFIGMAP, "n", "trimtab.dev/job", "job") == []
    with pytest.raises(ValueError, match="not indexed"):
        store.labelled(CONFIGMAP, "n", "app", "x")


def test_what_is_large_and_unread_is_left_out() -> None:
    store = Store()
    annotations = {"kubectl.kubernetes.io/last-applied-configuration": "{}", "keep": "1"}
    store.upsert(configmap("a", 1, managedFields=[{}], annotations=annotations))
    assert get(store, "a") == configmap("a", 1, annotations={"keep": "1"})


def test_drift_between_list_and_store() -> None:
    store = Store()
    for name in ("kept", "gone", "behind"):
        store.upsert(configmap(name, 5, uid=name))
    before = store.versions(CONFIGMAP)
    listed = [configmap("kept", 5, uid="kept"), configmap("behind", 8, uid="behind"), configmap("new", 9, uid="new")]
    store.upsert(configmap("young", 10, uid="young"))  # after the list was asked for
    drift = store.drift(before, listed)
    assert [obj["metadata"]["name"] for obj in drift.deleted] == ["gone"]
    assert [ref.name for ref in drift.changed] == ["behind", "new"]
    for obj in drift.deleted:
        assert store.remove(obj)
    assert not store.upsert(configmap("gone", 5, uid="gone"))


def test_drift_does_not_bring_back_what_was_deleted_meanwhile() -> None:
    store = Store()
    store.upsert(configmap("a", 5))
    before = store.versions(CONFIGMAP)
    store.remove(configmap("a", 6))  # an event that overtook the list's answer
    assert store.drift(before, [configmap("a", 5)]) == store.drift({}, [])
