"""Which artifact the spec asks for: as it stands there, or a job's result, resolved once and pinned in the status."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from trimtab_operator.api import modelendpoint_reasons as reasons
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.modelendpoint import ModelEndpoint, Revision
from trimtab_operator.api.reasons import Reason
from trimtab_operator.api.status import JobPhase
from trimtab_operator.core.podtemplate import claim_of, is_object_name
from trimtab_operator.modelendpoint.observe import source_of

REVISION_LENGTH = 12
"""Hex digits of a digest that name its revision."""


@dataclass(frozen=True)
class Waiting:
    """Why there is nothing to serve yet."""

    reason: Reason
    message: str


def target(endpoint: ModelEndpoint, source: FineTuneJob | None) -> Revision | Waiting:
    """The revision that is to be served."""
    model = endpoint.spec.model
    names = source_of(model.uri)
    if names is None:
        if not is_object_name(claim_of(model.uri) or "") or ".." in unquote(urlsplit(model.uri).path).split("/"):
            return Waiting(reasons.BAD_NAME, f"spec.model.uri {model.uri}: no claim and path of that name can exist")
        if model.digest is None:
            return Waiting(reasons.BAD_NAME, "spec.model.digest is missing; set the sha256 of the artifact's manifest")
        return _revision(model.uri, model.digest, None)
    for pinned in (endpoint.status.next, endpoint.status.stable):
        if pinned is not None and pinned.source == model.uri:
            return pinned
    return _resolve(model.uri, *names, source)


def _resolve(uri: str, name: str, stage: str, source: FineTuneJob | None) -> Revision | Waiting:
    if source is None:
        return Waiting(reasons.WAITING_FOR_ARTIFACT, f"{uri}: there is no FineTuneJob {name!r}")
    if all(known.name != stage for known in source.spec.stages):
        return Waiting(reasons.ARTIFACT_FAILED, f"{uri}: job {name} has no stage {stage!r}")
    artifact = next((known.artifact for known in source.status.stages if known.name == stage), None)
    if artifact is not None:
        return _revision(artifact.uri, artifact.digest, uri)
    if source.status.phase is JobPhase.FAILED:
        cause = f"{uri}: job {name} failed before stage {stage} had a result; create it anew"
        return Waiting(reasons.ARTIFACT_FAILED, cause)
    return Waiting(reasons.WAITING_FOR_ARTIFACT, f"{uri}: stage {stage} of job {name} is not done")


def _revision(uri: str, digest: str, source: str | None) -> Revision:
    return Revision(revision=digest.removeprefix("sha256:")[:REVISION_LENGTH], digest=digest, uri=uri, source=source)
