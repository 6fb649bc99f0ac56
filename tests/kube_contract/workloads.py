"""What plans rely on of the controllers for Jobs and Deployments; imported beside `suite`."""

from __future__ import annotations

from tests.kube_contract.support import (
    Api,
    condition,
    deployment,
    eventually,
    indexed_job,
    manifest,
    owner_reference,
    unique,
    until_gone,
)

from trimtab_operator.core.kube import DEPLOYMENT, JOB, POD, Object

A = "manager-a"


async def pods(api: Api, name: str) -> list[Object]:
    """The pods of a Job or Deployment, those being deleted included, by name."""
    listed = await api.kube.list_objects(POD, namespace=api.namespace, labels={"contract": name})
    return sorted(listed, key=lambda pod: str(pod["metadata"]["name"]))


async def until_finished(api: Api, name: str, kind: str) -> Object:
    async def finished() -> Object | None:
        job = await api.kube.get(JOB, api.namespace, name)
        return job if job and condition(job, kind).get("status") == "True" else None

    return await eventually(finished)


async def until_running(api: Api, name: str, count: int, *, but: set[str] | None = None) -> list[Object]:
    """Wait for `count` running pods that are not being deleted and whose uids are none of `but`."""

    async def running() -> list[Object] | None:
        found = [
            pod
            for pod in await pods(api, name)
            if pod["status"].get("phase") == "Running"
            and "deletionTimestamp" not in pod["metadata"]
            and pod["metadata"]["uid"] not in (but or set())
        ]
        return found if len(found) == count else None

    return await eventually(running)


async def until_no_pods(api: Api, name: str) -> None:
    async def none_left() -> bool:
        return not await pods(api, name)

    await eventually(none_left)


async def test_an_indexed_job_completes(api: Api) -> None:
    name = unique("good")
    made = await api.kube.create(indexed_job(api, name, completions=2, exit_code=0), manager=A)
    job = await until_finished(api, name, "Complete")
    assert job["status"]["succeeded"] == 2
    assert condition(job, "Failed").get("status") != "True"
    for index, pod in enumerate(await pods(api, name)):
        metadata = pod["metadata"]
        assert metadata["name"].startswith(f"{name}-{index}-")
        assert metadata["labels"]["batch.kubernetes.io/job-completion-index"] == str(index)
        assert metadata["annotations"]["batch.kubernetes.io/job-completion-index"] == str(index)
        assert metadata["labels"]["batch.kubernetes.io/job-name"] == name
        assert metadata["ownerReferences"] == [owner_reference(made)]
        assert pod["spec"]["hostname"] == f"{name}-{index}"
        assert pod["status"]["phase"] == "Succeeded"
        assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 0


async def test_a_job_fails_with_its_first_pod(api: Api) -> None:
    name = unique("bad")
    await api.kube.create(indexed_job(api, name, completions=1, exit_code=65), manager=A)
    job = await until_finished(api, name, "Failed")
    assert condition(job, "Failed")["reason"] == "BackoffLimitExceeded"
    (pod,) = await pods(api, name)
    assert pod["status"]["phase"] == "Failed"
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 65


async def test_a_suspended_job_has_no_pods(api: Api) -> None:
    name = unique("suspended")
    await api.kube.create(indexed_job(api, name, completions=2, exit_code=None), manager=A)
    first = await until_running(api, name, 2)
    await api.kube.apply(manifest(api, JOB, name, spec={"suspend": True}), manager="queue")
    await until_no_pods(api, name)
    assert condition(await until_finished(api, name, "Suspended"), "Complete") == {}
    await api.kube.apply(manifest(api, JOB, name, spec={"suspend": False}), manager="queue")
    await until_running(api, name, 2, but={pod["metadata"]["uid"] for pod in first})


async def test_a_deleted_job_takes_its_pods_with_it(api: Api) -> None:
    name = unique("deleted")
    made = await api.kube.create(indexed_job(api, name, completions=2, exit_code=None), manager=A)
    await until_running(api, name, 2)
    await api.kube.delete(JOB, api.namespace, name, uid=made["metadata"]["uid"])
    await until_gone(api, JOB, name)
    await until_no_pods(api, name)


async def test_a_lost_pod_of_a_job_is_not_replaced(api: Api) -> None:
    """With backoffLimit 0 a pod that is deleted counts as failed: the attempt ends, and a new one is the operator's."""
    name = unique("lost")
    await api.kube.create(indexed_job(api, name, completions=1, exit_code=None), manager=A)
    (pod,) = await until_running(api, name, 1)
    await api.kube.delete(POD, api.namespace, pod["metadata"]["name"], uid=pod["metadata"]["uid"])
    await until_finished(api, name, "Failed")


async def test_a_deployment_scales_and_replaces(api: Api) -> None:
    name = unique("web")
    await api.kube.apply(deployment(api, name, replicas=2), manager=A)
    first = await until_running(api, name, 2)

    async def ready() -> Object | None:
        found = await api.kube.get(DEPLOYMENT, api.namespace, name)
        return found if found and found.get("status", {}).get("readyReplicas") == 2 else None

    assert (await eventually(ready))["status"]["observedGeneration"] == 1
    assert all(condition(pod, "Ready")["status"] == "True" for pod in await until_running(api, name, 2))
    lost = first[0]["metadata"]
    await api.kube.delete(POD, api.namespace, lost["name"], uid=lost["uid"])
    kept = await until_running(api, name, 2, but={lost["uid"]})
    await api.kube.apply(deployment(api, name, replicas=1), manager=A)
    (left,) = await until_running(api, name, 1)
    assert left["metadata"]["uid"] in {pod["metadata"]["uid"] for pod in kept}
    await api.kube.apply(deployment(api, name, replicas=0), manager=A)
    await until_no_pods(api, name)


async def test_a_deployment_replaces_pods_of_another_template(api: Api) -> None:
    name = unique("roll")
    wanted = deployment(api, name, replicas=1)
    await api.kube.apply(wanted, manager=A)
    (old,) = await until_running(api, name, 1)
    wanted["spec"]["template"]["metadata"]["annotations"] = {"revision": "2"}
    await api.kube.apply(wanted, manager=A)
    (new,) = await until_running(api, name, 1, but={old["metadata"]["uid"]})
    assert new["metadata"]["annotations"]["revision"] == "2"

    async def old_gone() -> bool:
        return [pod["metadata"]["uid"] for pod in await pods(api, name)] == [new["metadata"]["uid"]]

    await eventually(old_gone)


async def test_a_deleted_deployment_takes_its_pods_with_it(api: Api) -> None:
    name = unique("gone")
    made = await api.kube.apply(deployment(api, name, replicas=1), manager=A)
    await until_running(api, name, 1)
    await api.kube.delete(DEPLOYMENT, api.namespace, name, uid=made["metadata"]["uid"])
    await until_no_pods(api, name)
