"""Roll-out: the endpoint gets `spec.model` once, and the job waits until it is served."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.modelendpoint import ModelEndpoint
from trimtab_operator.api.reasons import Reason
from trimtab_operator.api.status import ArtifactStatus, EndpointStatus
from trimtab_operator.core.actions import Action, Apply, Create
from trimtab_operator.core.kube import Object
from trimtab_operator.core.names import MANAGER_ROLLOUT
from trimtab_operator.finetunejob import manifests


@dataclass(frozen=True)
class RolloutStep:
    """Where the roll-out is."""

    reason: Reason
    message: str
    endpoint: EndpointStatus | None = None
    """For the status, once the endpoint names this job: from then on the job writes no more."""
    done: bool = False
    failed: bool = False
    actions: tuple[Action, ...] = ()


def roll_out(obj: Object, job: FineTuneJob, artifact: ArtifactStatus, endpoint: ModelEndpoint | None) -> RolloutStep:
    """The next step; the job's stages are done and it has a `rollout`."""
    rollout = job.spec.rollout
    if rollout is None:
        raise ValueError("the job has no rollout")
    name = rollout.endpoint_name
    if endpoint is None:
        if rollout.create is None:
            return RolloutStep(reasons.ENDPOINT_MISSING, f"there is no ModelEndpoint {name!r}; create it")
        made = manifests.endpoint(obj, rollout, artifact, create=True)
        return replace(under_way(name), actions=(Create(made, MANAGER_ROLLOUT),))
    uid = obj["metadata"]["uid"]
    source = endpoint.spec.model.source
    named = source is not None and source.job_uid == uid
    served = is_served(endpoint, uid, artifact.digest, named=named)
    if not named and not served and job.status.endpoint is None:
        changed = manifests.endpoint(obj, rollout, artifact, create=False)
        return replace(under_way(name), actions=(Apply(changed, MANAGER_ROLLOUT),))
    if job.status.endpoint is None:
        return replace(under_way(name), endpoint=EndpointStatus(name=name))
    if served and endpoint.status.url is None:  # its Service is not known yet, and what has ended is not written again
        return under_way(name)
    if served:
        status = EndpointStatus(name=name, url=endpoint.status.url)
        return RolloutStep(reasons.IS_ROLLED_OUT, f"{name} serves {artifact.digest}", status, done=True)
    if not named:
        cause = f"{name} was given another model ({endpoint.spec.model.uri}) before this job's was ready"
        return RolloutStep(reasons.SUPERSEDED, cause, failed=True)
    degraded = _holds(endpoint, "Degraded")
    return under_way(name) if degraded is None else RolloutStep(reasons.ENDPOINT_DEGRADED, f"{name}: {degraded}")


def under_way(name: str) -> RolloutStep:
    """The endpoint is being given the result, or gets ready with it; one message for all of it."""
    return RolloutStep(reasons.ROLLING_OUT, f"waiting until endpoint {name} is ready with the result")


def is_served(endpoint: ModelEndpoint, uid: str, digest: str, *, named: bool) -> bool:
    """The endpoint answers with the result, or has done so."""
    if any(entry.job_uid == uid and entry.digest == digest for entry in endpoint.status.history):
        return True
    stable = endpoint.status.stable
    return named and stable is not None and stable.digest == digest and _holds(endpoint, "Ready") is not None


def _holds(endpoint: ModelEndpoint, condition: str) -> str | None:
    """The message of a condition that is True; None where it is not."""
    return next((c.message for c in endpoint.status.conditions if c.type == condition and c.status == "True"), None)
