"""What the contract suite can't ask of an API in memory: order under nested writes, and what is on disk."""

from __future__ import annotations

from pathlib import Path

from trimtab.local.kube import LocalKube
from trimtab.local.state import State
from trimtab_operator.core.kube import CONFIGMAP, JOB, Change, Object


def configmap(name: str, **data: str) -> Object:
    metadata = {"name": name, "namespace": "default"}
    return {"apiVersion": CONFIGMAP.api_version, "kind": CONFIGMAP.kind, "metadata": metadata, "data": data}


def opened(path: Path) -> tuple[State, LocalKube]:
    state = State(path / "state.sqlite3")
    return state, LocalKube(state, lambda: "127.0.0.9")


async def test_a_sink_that_writes_does_not_disturb_the_order(tmp_path: Path) -> None:
    _, kube = opened(tmp_path)
    told: list[tuple[Change, str]] = []

    def remove_at_once(change: Change, obj: Object) -> None:
        if change is Change.UPSERT and obj["metadata"]["name"] == "short":
            kube.remove(obj)

    kube.subscribe(remove_at_once)
    kube.subscribe(lambda change, obj: told.append((change, obj["metadata"]["name"])))
    kube.put(configmap("short"))
    kube.put(configmap("long"))
    assert told == [(Change.UPSERT, "short"), (Change.DELETE, "short"), (Change.UPSERT, "long")]


async def test_all_is_on_disk_at_once(tmp_path: Path) -> None:
    _, kube = opened(tmp_path)
    first = await kube.apply(configmap("kept", a="1", b="1"), manager="m")
    kube.put(configmap("removed"))
    kube.remove(kube.find(CONFIGMAP, "default", "removed") or {})
    # As after a kill: nothing was closed.
    state, again = opened(tmp_path)
    assert again.select(CONFIGMAP) == [first]
    second = await again.apply(configmap("kept", a="1"), manager="m")
    assert second["data"] == {"a": "1"}, "who owns what is remembered too"
    versions = [int(obj["metadata"]["resourceVersion"]) for obj in (first, second)]
    assert versions[1] > versions[0] + 2, "no version is given twice, not even a removed object's"
    state.close()


async def test_what_lost_its_owner_while_nothing_ran_is_collected_at_the_start(tmp_path: Path) -> None:
    _, kube = opened(tmp_path)
    orphan = configmap("orphan")
    orphan["metadata"]["ownerReferences"] = [{"kind": JOB.kind, "name": "gone", "uid": "gone", "controller": True}]
    kube.put(orphan)
    _, again = opened(tmp_path)
    assert again.select(CONFIGMAP) == []
