"""What a run waits for: the end of its jobs, the readiness of its endpoints, or a reason to give up."""

from __future__ import annotations

from trimtab.local.cluster import Cluster
from trimtab.local.objects import condition, is_true, key
from trimtab.progress import Display
from trimtab_operator.core.kube import FINETUNEJOB, MODELENDPOINT, POD, Change, Object
from trimtab_operator.core.names import LABEL_ENDPOINT, label_value


class Follower:
    """Follows the jobs and endpoints of a run, and shows them."""

    def __init__(self, cluster: Cluster, display: Display) -> None:
        self._cluster = cluster
        self._display = display
        self._jobs = {key(job): job for job in cluster.kube.select(FINETUNEJOB)}
        """As last seen: a job may be gone by its TTL before we look."""
        cluster.kube.subscribe(self._heed)

    def _heed(self, change: Change, obj: Object) -> None:
        if obj["kind"] == FINETUNEJOB.kind and key(obj) in self._cluster.training:
            self._jobs[key(obj)] = obj
            if change is Change.UPSERT:
                self._display.job(obj)
        elif obj["kind"] == MODELENDPOINT.kind and key(obj) in self._cluster.serving and change is Change.UPSERT:
            self._display.endpoint(obj)

    def jobs_settled(self) -> bool:
        """Every job has ended, or is suspended as its spec asks."""
        return all(self._settled(self._jobs[name]) for name in self._cluster.training)

    def ready(self) -> bool:
        """Every endpoint answers."""
        return all(self._answers(*name) for name in self._cluster.serving)

    def failures(self) -> list[str]:
        """Why the run can't end well: failed jobs, endpoints whose pods crash; cause, place and remedy each."""
        jobs = [self._jobs[name] for name in sorted(self._cluster.training)]
        return [_words(job, "Failed") for job in jobs if is_true(job, "Failed")] + self.crashed_endpoints()

    def crashed_endpoints(self) -> list[str]:
        """Why endpoints can't answer; jobs that wait for them would wait in vain."""
        found = []
        for namespace, name in sorted(self._cluster.serving):
            obj = self._cluster.kube.find(MODELENDPOINT, namespace, name)
            if obj and is_true(obj, "Degraded") and self._crashed(namespace, name):
                found.append(_words(obj, "Degraded"))
        return found

    def _settled(self, job: Object) -> bool:
        if job["spec"]["suspend"]:
            return is_true(job, "Suspended")
        return is_true(job, "Complete") or is_true(job, "Failed")

    def _answers(self, namespace: str, name: str) -> bool:
        """Ready by its status, which a former run may have written, and with a ready pod of this one."""
        obj = self._cluster.kube.find(MODELENDPOINT, namespace, name)
        return obj is not None and is_true(obj, "Ready") and bool(self._cluster.services.ready(namespace, name))

    def _crashed(self, namespace: str, name: str) -> bool:
        pods = self._cluster.kube.select(POD, namespace, {LABEL_ENDPOINT: label_value(name)})
        return any(each["restartCount"] for pod in pods for each in pod["status"].get("containerStatuses", []))


def _words(obj: Object, kind: str) -> str:
    said = condition(obj, kind)
    return f"{obj['kind'].lower()} {obj['metadata']['name']}: {said['reason']}: {said['message']}"
