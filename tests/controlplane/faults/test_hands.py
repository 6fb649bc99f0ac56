"""What people and administrators do to a job on its way: it heals, waits and says why, or begins anew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.controlplane.cluster import ControlPlane
from tests.controlplane.crds import install_crds
from tests.controlplane.faults.crashes import Undisturbed, compare, undisturbed
from tests.controlplane.faults.lives import Life, World, world
from tests.controlplane.operator import grant

from trimtab_operator.core.kube import CONFIGMAP, DEPLOYMENT, FINETUNEJOB, JOB, POD, SERVICE, Object

LONG = {"test.trimtab.dev/duration": "1h"}


@pytest.fixture(scope="module", autouse=True)
def rights(control_plane: ControlPlane) -> None:
    install_crds(control_plane)
    grant(control_plane)


@pytest.fixture
async def made(control_plane: ControlPlane, tmp_path: Path) -> AsyncIterator[World]:
    async with world(control_plane, tmp_path) as running:
        yield running


async def progressing(life: Life) -> tuple[str, str]:
    """Reason and message of the job's Progressing condition."""
    job = await life.get(FINETUNEJOB, "quickstart")
    conditions = (job or {}).get("status", {}).get("conditions", [])
    found = next((c for c in conditions if c["type"] == "Progressing"), {})
    return found.get("reason", ""), found.get("message", "")


async def says(life: Life, reason: str, *words: str) -> None:
    """Waits until the job's status tells of it."""

    async def told() -> bool:
        found, message = await progressing(life)
        return found == reason and all(word in message for word in words)

    await life.until(told, f"{reason} {words}")


def path(life: Life, kind: Any, name: str = "") -> str:
    return f"{kind.path}/namespaces/{life.namespace}/{kind.plural}/{name}".rstrip("/")


async def drift(world: World, measure: Undisturbed) -> None:
    """Children are edited, relabelled and deleted at rest; all of it is as before, and no attempt is made anew."""
    async with world.life() as life:
        await life.submit(*life.manifests())
        await life.until(life.served, "the job completes")
        await life.rest()
        for deployment in await life.items(DEPLOYMENT):
            name = path(life, DEPLOYMENT, deployment["metadata"]["name"])
            labels = {"trimtab.dev/revision": None, "app.kubernetes.io/managed-by": None}
            body = {"metadata": {"labels": labels}, "spec": {"replicas": 3}}
            await world.request("PATCH", name, body)
        for service in await life.items(SERVICE):
            if not service["metadata"]["labels"].get("trimtab.dev/endpoint"):
                continue  # a stage's: it has ended, and its Service is not looked after any more
            name = path(life, SERVICE, service["metadata"]["name"])
            await world.request("PATCH", name, {"spec": {"selector": {"app": "mine"}}})
        await life.until(life.served, "the endpoints serve again")
        await life.rest()
        for config in await life.items(CONFIGMAP):
            if config["metadata"].get("labels", {}).get("trimtab.dev/endpoint"):
                await world.request("DELETE", path(life, CONFIGMAP, config["metadata"]["name"]))
        for deployment in await life.items(DEPLOYMENT):
            await world.request("DELETE", path(life, DEPLOYMENT, deployment["metadata"]["name"]))
        for service in await life.items(SERVICE):
            if service["metadata"]["labels"].get("trimtab.dev/endpoint"):
                await world.request("DELETE", path(life, SERVICE, service["metadata"]["name"]))

        async def whole() -> bool:
            found = await life.remains()
            return all(name in found for name in measure.remains if name.startswith(("Deployment", "Service")))

        await life.until(whole, "everything is there again")
        await life.until(life.served, "the endpoints serve again")
        assert dict(life.created()) == measure.created


async def expired_job(world: World, measure: Undisturbed) -> None:
    """Jobs and pods that have ended are removed under us, as a TTL controller or a person does it: the result stays."""
    async with world.life() as life:
        await life.submit(*life.manifests())
        await life.until(life.served, "the job completes")
        for job in await life.items(JOB):
            await world.request("DELETE", path(life, JOB, job["metadata"]["name"]), {"propagationPolicy": "Background"})
        await life.rest()
        assert await life.served()
        assert dict(life.created()) == measure.created
        left = await life.remains()
        owner = "FineTuneJob quickstart"
        assert left[owner]["status"] == measure.remains[owner]["status"]


async def deleted_job(world: World, measure: Undisturbed) -> None:
    """A Job is deleted while its pod runs: the next attempt has the next number, and starts when the pod is gone."""
    async with world.life() as life:
        job, base = life.manifests()
        job["spec"]["stages"][1]["annotations"] = dict(LONG)
        await life.submit(job, base)

        async def training() -> Object | None:
            running = [
                pod for pod in await life.items(POD) if pod["metadata"]["labels"].get("trimtab.dev/stage") == "sft"
            ]
            return next((pod for pod in running if pod.get("status", {}).get("phase") == "Running"), None)

        pod = await life.until(training, "it trains")
        assert pod is not None
        name = pod["metadata"]["ownerReferences"][0]["name"]
        await world.request("DELETE", path(life, JOB, name), {"propagationPolicy": "Background"})

        async def second() -> Object | None:
            found = await training()
            return found if found and found["metadata"]["labels"]["trimtab.dev/attempt"] == "2" else None

        pod = await life.until(second, "a second attempt trains")
        assert pod is not None
        patch = {"metadata": {"annotations": {"test.trimtab.dev/duration": "0s"}}}
        await world.request("PATCH", path(life, POD, pod["metadata"]["name"]), patch)
        await life.until(life.served, "the job completes")
        assert set(life.created().values()) == {1}


def recreated(policy: str) -> Callable[[World, Undisturbed], Awaitable[None]]:
    """The owner is deleted in mid-life and created anew under its name: the new one lives as if it were the first."""

    async def run(world: World, measure: Undisturbed) -> None:
        async with world.life() as life:
            job, base = life.manifests()
            await life.submit(job, base)

            async def begun() -> bool:
                return len(await life.items(JOB)) >= 2

            await life.until(begun, "a stage trains")
            first = await life.get(FINETUNEJOB, "quickstart")
            assert first is not None
            await world.request("DELETE", path(life, FINETUNEJOB, "quickstart"), {"propagationPolicy": policy})

            async def gone() -> bool:
                return await life.get(FINETUNEJOB, "quickstart") is None

            await life.until(gone, "the first is gone")
            await life.submit(job)
            await life.until(life.served, "the second completes")
            await life.rest()
            second = await life.get(FINETUNEJOB, "quickstart")
            assert second is not None
            old, new = first["metadata"]["uid"], second["metadata"]["uid"]
            owned = [o for kind in (JOB, CONFIGMAP, SERVICE) for o in await life.items(kind)]
            mine = [o["metadata"]["name"] for o in owned if new in str(o["metadata"].get("ownerReferences"))]
            assert len(mine) > 4
            assert not [o for o in owned if old in str(o["metadata"].get("ownerReferences"))]
            for name, left in (await life.remains()).items():
                if name.startswith(("FineTuneJob", "ModelEndpoint")):
                    assert left == measure.remains[name], name

    return run


async def quota(world: World, measure: Undisturbed) -> None:
    """A quota forbids Jobs: the status says so in the API server's words; when it is lifted the job goes on."""
    async with world.life() as life:
        hard = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
        where = f"/api/v1/namespaces/{life.namespace}/resourcequotas"
        await world.request("POST", where, hard)

        async def enforced() -> bool:
            found = await world.request("GET", f"{where}/none")
            return "hard" in found.get("status", {})

        await life.until(enforced, "the quota is enforced")
        await life.submit(*life.manifests())
        await says(life, "Forbidden", "exceeded quota")
        await world.request("DELETE", f"{where}/none")
        await life.until(life.served, "the job completes")
        await life.rest()
        await compare(life, measure, "quota")


async def denied(world: World, measure: Undisturbed) -> None:
    """An admission policy refuses our ConfigMaps: the status has its message; when it is gone the job goes on."""
    async with world.life() as life:
        name = f"deny-{life.namespace}"
        here = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": life.namespace}}}
        rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}
        policy = {
            "metadata": {"name": name},
            "spec": {
                "failurePolicy": "Fail",
                "matchConstraints": {"resourceRules": [rule], **here},
                "validations": [{"expression": "false", "message": "no ConfigMaps on Fridays"}],
            },
        }
        group = "/apis/admissionregistration.k8s.io/v1"
        await world.request("POST", f"{group}/validatingadmissionpolicies", policy)
        binding = {"metadata": {"name": name}, "spec": {"policyName": name, "validationActions": ["Deny"]}}
        await world.request("POST", f"{group}/validatingadmissionpolicybindings", binding)
        try:

            async def enforced() -> bool:
                config = {"metadata": {"name": "probe"}}
                code, _ = await world.send("POST", f"{path(life, CONFIGMAP)}?dryRun=All", config)
                return code >= 400

            await life.until(enforced, "the policy is enforced")
            await life.submit(*life.manifests())
            await says(life, "Invalid", "no ConfigMaps on Fridays")
        finally:
            await world.request("DELETE", f"{group}/validatingadmissionpolicybindings/{name}")
            await world.request("DELETE", f"{group}/validatingadmissionpolicies/{name}")
        await life.until(life.served, "the job completes")
        await life.rest()
        await compare(life, measure, "denied")


async def terminating(world: World, measure: Undisturbed) -> None:
    """The namespace goes in mid-life: nothing of ours holds it up, and nothing is written for ever."""
    async with world.life() as life:
        await life.submit(*life.manifests())

        async def begun() -> bool:
            return len(await life.items(JOB)) >= 1

        await life.until(begun, "it prepares")
        await world.request("DELETE", f"/api/v1/namespaces/{life.namespace}")

        async def gone() -> bool:
            code, _ = await world.send("GET", f"/api/v1/namespaces/{life.namespace}")
            return code == 404

        await life.until(gone, "the namespace is gone")
        await life.rest()


CASES: dict[str, Callable[[World, Undisturbed], Awaitable[None]]] = {
    "drift": drift,
    "expired Jobs": expired_job,
    "a deleted Job": deleted_job,
    "recreated, background": recreated("Background"),
    "recreated, foreground": recreated("Foreground"),
    "recreated, orphans": recreated("Orphan"),
    "quota": quota,
    "denied": denied,
    "namespace termination": terminating,
}


async def test_a_job_takes_what_people_do_to_it(made: World, counted: Callable[[str, int], None]) -> None:
    measure = await undisturbed(made)
    results = await asyncio.gather(*(case(made, measure) for case in CASES.values()), return_exceptions=True)
    failed = {name: error for name, error in zip(CASES, results, strict=True) if isinstance(error, BaseException)}
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
    counted("deeds of people and administrators", len(CASES))
