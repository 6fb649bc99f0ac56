"""What keeps a serving pod from answering, in words that stay the same while the cause stays."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab_operator.api import modelendpoint_reasons as reasons
from trimtab_operator.core.names import LABEL_REVISION
from trimtab_operator.core.podproblems import Stuck, refusal_words, refused
from trimtab_operator.core.pods import Ended, PodView
from trimtab_operator.core.reports import clean, failure_report
from trimtab_operator.modelendpoint.observe import DeploymentView

_STOPPED = (0, 143)
"""Exit codes of a server that was told to stop."""


def problem(pods: Sequence[PodView], deployment: DeploymentView | None, revision: str) -> Stuck | None:
    """The first problem of a revision's pods; None where none is known."""
    if deployment is not None and deployment.refused:
        return refused(f"Deployment {deployment.name}", clean(refusal_words(deployment.refused), 4096))
    mine = [pod for pod in pods if pod.labels.get(LABEL_REVISION) == revision]
    waiting = [pod for pod in mine if not pod.ready and not pod.deleting]
    return next((found for pod in waiting if (found := _of_pod(pod)) is not None), None)


def _of_pod(pod: PodView) -> Stuck | None:
    """The pod's own last words say more than the kubelet's."""
    ended = pod.last_ended
    if ended is not None and ended.exit_code not in _STOPPED:
        return _of_end(pod.name, ended)
    return pod.stuck


def _of_end(name: str, ended: Ended) -> Stuck:
    if ended.reason == "OOMKilled":
        return Stuck("OOMKilled", f"pod {name} ran out of memory; raise its memory limit or lower engine.maxModelLen")
    report = failure_report(ended.message)
    if report is not None:
        return Stuck(report.reason, clean(report.message, 4096))
    told = f"pod {name} ended with exit code {ended.exit_code} and left no report; see kubectl logs {name} --previous"
    return Stuck(reasons.POD_FAILED.name, told)
