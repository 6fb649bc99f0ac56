"""Jobs that end badly say why, at once or after their retries, and stay so."""

from __future__ import annotations

import pytest
from tests.controlplane.jobs import Object, Space, annotated, condition, until
from tests.controlplane.operator import Operator


def failure(space: Space) -> Object:
    """The stage `sft`'s failures, once the job has failed."""
    space.wait("Failed")
    status = space.status()
    assert (status["phase"], condition(status, "Progressing")) == ("Failed", ("False", "Finished"))
    found: Object = status["stages"][1]["failures"]
    return found


def message(space: Space) -> str:
    """What the condition Failed says."""
    return str(next(c["message"] for c in space.status()["conditions"] if c["type"] == "Failed"))


def test_a_final_exit_code_fails_the_job_at_once_and_for_good(operator: Operator, space: Space) -> None:
    words = '{"kind":"failure","reason":"TrainingFailed","message":"the loss is not finite at step 7; lower the rate"}'
    space.apply(annotated(space.job(), "sft", exit_code="70", termination_message=words))
    failures = failure(space)
    assert (failures["count"], failures["last"]["exitCode"]) == (1, 70)
    assert failures["last"]["node"].startswith("node-")
    assert condition(space.status(), "Failed") == ("True", "TrainingFailed")
    assert message(space) == "stage sft, attempt 1: the loss is not finite at step 7; lower the rate"
    assert len(space.items("jobs", stage="sft")) == 1

    before = space.get("ftj", "quickstart")
    for kind in ("jobs", "pods", "configmaps", "services"):
        space.kubectl("delete", kind, "--selector=trimtab.dev/job=quickstart")
        space.until_none(kind, job="quickstart")
    # Whatever the deletions made the operator do, it has done once it has heard of an object that came after them.
    space.apply(space.job() | {"metadata": {"name": "later", "namespace": space.namespace}})
    space.wait("Prepared", "ftj/later")
    after = space.get("ftj", "quickstart")
    assert after["status"] == before["status"]
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    assert not space.items("jobs", job="quickstart")


def test_bad_data_fail_the_job_before_anything_trains(operator: Operator, space: Space) -> None:
    words = '{"kind":"failure","reason":"BadData","message":"pvc://quickstart/data/pretrain.jsonl:17: no field text"}'
    # Prepare has the shape of the first stage.
    space.apply(annotated(space.job(), "pretrain", exit_code="65", termination_message=words))
    space.wait("Failed")
    assert condition(space.status(), "Prepared") == ("False", "BadData")
    assert message(space) == "prepare, attempt 1: pvc://quickstart/data/pretrain.jsonl:17: no field text"
    (prepare,) = space.items("jobs", job="quickstart")
    assert prepare["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "prepare"


def test_a_killed_pod_is_tried_again_until_its_retries_are_used_up(operator: Operator, space: Space) -> None:
    job = annotated(space.job(), "sft", exit_code="137", reason="OOMKilled")
    job["spec"]["stages"][1]["retries"] = 1
    space.apply(job)
    retrying = space.until_status(lambda s: condition(s, "Progressing")[1] == "Retrying", "the first failure is told")
    assert retrying["phase"] != "Failed"
    assert retrying["stages"][1]["failures"]["count"] == 1
    uid = retrying["stages"][1]["jobUID"]

    failures = failure(space)
    assert (failures["count"], failures["last"]["attempt"]) == (2, 2)
    assert (failures["last"]["exitCode"], failures["last"]["reason"]) == (137, "OOMKilled")
    assert condition(space.status(), "Failed") == ("True", "OOMKilled")
    assert "raise its memory limit" in message(space)
    (left,) = space.items("jobs", stage="sft")
    assert left["metadata"]["labels"]["trimtab.dev/attempt"] == "2"
    assert left["metadata"]["uid"] != uid


@pytest.mark.parametrize("words", ["not a report", '{"kind":"train","digest":"sha256:short","step":1,"totalSteps":1}'])
def test_a_report_that_is_none_fails_the_job(operator: Operator, space: Space, words: str) -> None:
    space.apply(annotated(space.job(), "sft", termination_message=words))
    failure_reason = until(lambda: condition(space.status(), "Failed")[1], "the job fails")
    assert failure_reason == "ReportInvalid"
    assert space.status()["stages"][0]["phase"] == "Succeeded"
    assert "artifact" not in space.status()["stages"][1]
    assert not space.get("mep")["items"]
