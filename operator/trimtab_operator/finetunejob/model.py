"""`model.uri: job://name/stage`: another job's result, resolved once."""

from __future__ import annotations

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.status import ArtifactStatus, JobPhase
from trimtab_operator.finetunejob.acceptance import Verdict
from trimtab_operator.finetunejob.observe import source_of


def resolve(job: FineTuneJob, source: FineTuneJob | None) -> ArtifactStatus | Verdict | None:
    """The artifact, or why there is none yet; None where the model is no job's result."""
    names = source_of(job.spec.model.uri)
    if names is None or job.status.model is not None:
        return job.status.model
    name, stage = names
    uri = job.spec.model.uri
    if source is None:
        return Verdict(reasons.WAITING_FOR_ARTIFACT.name, f"{uri}: there is no FineTuneJob {name!r}", final=False)
    if all(known.name != stage for known in source.spec.stages):
        return Verdict(reasons.ARTIFACT_FAILED.name, f"{uri}: job {name} has no stage {stage!r}", final=False)
    artifact = next((known.artifact for known in source.status.stages if known.name == stage), None)
    if artifact is not None:
        return artifact
    if source.status.phase == JobPhase.FAILED:
        cause = f"{uri}: job {name} failed before stage {stage} had a result; create it anew"
        return Verdict(reasons.ARTIFACT_FAILED.name, cause, final=False)
    return Verdict(reasons.WAITING_FOR_ARTIFACT.name, f"{uri}: stage {stage} of job {name} is not done", final=False)
