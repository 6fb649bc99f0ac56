"""What a person does to a job that runs: suspend and resume it, give it a deadline, let it expire, delete it."""

from __future__ import annotations

from typing import Any

from tests.controlplane.jobs import Object, Space, annotated, condition, until
from tests.controlplane.operator import Operator


def start(space: Space, **spec: Any) -> Object:
    """A job whose stage `sft` runs for an hour; its status once it does."""
    space.apply(annotated(space.job(**spec), "sft", duration="1h"))
    return space.until_status(lambda status: stage(status).get("phase") == "Running" and running(space), "sft runs")


def stage(status: Object) -> Object:
    """The status of the stage `sft`; empty before there is one."""
    return next((entry for entry in status.get("stages", []) if entry["name"] == "sft"), {})


def running(space: Space) -> list[str]:
    """The pods of `sft` that run."""
    return [pod["metadata"]["name"] for pod in space.items("pods", stage="sft") if pod["status"]["phase"] == "Running"]


def patch(space: Space, **spec: object) -> None:
    values = ", ".join(f'"{key}": {str(value).lower()}' for key, value in spec.items())
    space.kubectl("patch", "ftj", "quickstart", "--type=merge", f'--patch={{"spec": {{{values}}}}}')


def test_a_suspended_job_frees_its_pods_and_resumes_for_free(operator: Operator, space: Space) -> None:
    first = stage(start(space))
    assert first["attempt"] == 1
    patch(space, suspend=True)
    space.wait("Suspended")
    suspended = space.status()
    assert (suspended["phase"], suspended["reason"]) == ("Suspended", "Suspended")
    assert "activeSince" not in suspended
    assert not running(space)
    space.until_none("jobs", stage="sft")

    patch(space, suspend=False)
    resumed = space.until_status(
        lambda status: stage(status).get("jobUID", first["jobUID"]) != first["jobUID"] and running(space), "it resumes"
    )
    assert condition(resumed, "Suspended") == ("False", "NotSuspended")
    assert stage(resumed)["attempt"] == 2
    (pod,) = running(space)
    space.kubectl("annotate", "pod", pod, "test.trimtab.dev/duration=0s", "--overwrite")
    space.wait("Complete")
    assert "failures" not in stage(space.status())
    assert [job["metadata"]["labels"]["trimtab.dev/attempt"] for job in space.items("jobs", stage="sft")] == ["2"]


def test_a_job_past_its_deadline_fails_and_stops(operator: Operator, space: Space) -> None:
    start(space, activeDeadlineSeconds=5)
    space.wait("Failed")
    status = space.status()
    assert condition(status, "Failed") == ("True", "DeadlineExceeded")
    assert stage(status)["phase"] == "Failed"
    assert "activeSince" not in status
    assert status["activeSeconds"] >= 5
    until(lambda: not running(space), "the pods end")
    assert not space.get("mep")["items"]


def test_a_finished_job_expires_and_its_endpoint_stays(operator: Operator, space: Space) -> None:
    space.apply(space.job(ttlSecondsAfterFinished=2))
    space.wait("Complete")
    space.kubectl("wait", "--for=delete", "ftj/quickstart", "--timeout=120s")
    for kind in ("jobs", "pods", "services", "configmaps"):
        space.until_none(kind, job="quickstart")
    assert space.status("mep/quickstart")["phase"] == "Healthy"
    assert len(space.items("pods", endpoint="quickstart")) == 1


def test_a_deleted_job_takes_its_pods_along_and_nothing_comes_back(operator: Operator, space: Space) -> None:
    start(space)
    before = len(writes(space))
    space.kubectl("delete", "ftj", "quickstart")
    for kind in ("jobs", "pods", "services", "configmaps"):
        space.until_none(kind, job="quickstart")
    # A second job of that name is another one: its attempts begin anew.
    assert len(writes(space)) == before
    space.apply(space.job())
    space.wait("Complete")
    assert stage(space.status())["attempt"] == 1


def writes(space: Space) -> list[Object]:
    """What the operator wrote in this namespace."""
    return [
        event
        for event in space.control_plane.audit()
        if event["user"]["username"] == "operator"
        and event["objectRef"].get("namespace") == space.namespace
        and event["verb"] not in ("get", "list", "watch")
    ]
