"""Whom the controller wakes, and what labels that a person has changed do to it."""

from __future__ import annotations

from trimtab_operator.core.kube import Ref
from trimtab_operator.core.pods import pod_view
from trimtab_operator.finetunejob.controller import FineTuneJobController


def test_a_pod_wakes_its_job_even_when_its_jobs_job_is_gone() -> None:
    labels = {"trimtab.dev/job": "tune", "app.kubernetes.io/managed-by": "trimtab"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "team", "labels": labels}}
    assert FineTuneJobController().interested(pod) == [Ref("FineTuneJob", "team", "tune")]


def test_a_pod_whose_index_someone_changed_is_still_read() -> None:
    labels = {"batch.kubernetes.io/job-completion-index": "first"}
    assert pod_view({"metadata": {"name": "p", "labels": labels}}).index == 0
