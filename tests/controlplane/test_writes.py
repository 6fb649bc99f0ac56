"""What a job costs the API server: at most six status writes in the life of a job of one stage."""

from __future__ import annotations

import time
from collections import Counter
from itertools import pairwise

from tests.controlplane.jobs import Object, Space
from tests.controlplane.operator import Operator

MOST_STATUS_WRITES = 6
CHILDREN = {"configmaps": 2, "jobs": 2, "networkpolicies": 1, "services": 1}
"""Prepare has a ConfigMap and a Job, the stage these and a Service."""


def one_stage(space: Space) -> Object:
    """The quickstart's job, its first stage only and without a rollout."""
    job = space.job()
    del job["spec"]["rollout"], job["spec"]["stages"][1:]
    job["spec"]["stages"][0]["annotations"] = {"test.trimtab.dev/stages": "1"}
    return job


def test_a_job_of_one_stage_writes_its_status_six_times_at_most(operator: Operator, space: Space) -> None:
    space.apply(one_stage(space))
    space.wait("Complete")
    time.sleep(1)  # a write after the last one would be one too many, too
    writes = [
        event
        for event in space.control_plane.audit()
        if event["user"]["username"] == "operator"
        and event["objectRef"].get("namespace") == space.namespace
        and event["verb"] in ("create", "update", "patch", "delete")
    ]
    told = [event["requestObject"]["status"] for event in writes if event["objectRef"].get("subresource") == "status"]
    assert 1 < len(told) <= MOST_STATUS_WRITES, [status["reason"] for status in told]
    assert all(one != next_ for one, next_ in pairwise(told)), "a write that changes nothing"
    others = Counter(e["objectRef"]["resource"] for e in writes if "subresource" not in e["objectRef"])
    del others["events"]
    assert others == CHILDREN
