"""Termination messages: the pods' last words, which may say anything."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.core.reports import clean
from trimtab_trainer.config import REPORT, FailureReport, PrepareReport, TrainReport


@dataclass(frozen=True)
class Problem:
    """A report that can't be used."""

    reason: str
    message: str


def prepare_report(text: str, stages: int) -> PrepareReport | Problem:
    """The report of a prepare pod that ended well; it must be about so many stages."""
    report = _parse(text)
    if isinstance(report, Problem):
        return report
    if not isinstance(report, PrepareReport):
        return _invalid(f"a {report.kind} report where a prepare report was expected")
    if len(report.stages) != stages:
        return _invalid(f"it is about {len(report.stages)} stages, the job has {stages}")
    return report


def train_report(text: str) -> TrainReport | Problem:
    """The report of a training pod that ended well."""
    report = _parse(text)
    if isinstance(report, Problem | TrainReport):
        return report
    return _invalid(f"a {report.kind} report where a train report was expected")


def _parse(text: str) -> PrepareReport | TrainReport | FailureReport | Problem:
    if not text.strip():
        return Problem(
            reasons.REPORT_MISSING.name,
            "the pod ended well but left no termination message; check that its image speaks the stage contract",
        )
    try:
        return REPORT.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the text"
        return _invalid(f"{place}: {first['msg']}")


def _invalid(cause: str) -> Problem:
    message = f"the pod's termination message is not a valid report: {cause}; check the image"
    return Problem(reasons.REPORT_INVALID.name, clean(message, 1024))
