"""The container's last word: one report in the termination message."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab_trainer.config import (
    TERMINATION_LOG_VARIABLE,
    TERMINATION_MESSAGE_LIMIT,
    FailureReport,
    PrepareReport,
    TrainReport,
    dump_report,
)
from trimtab_trainer.errors import StageError

_CUT = " … (cut; the pod's log has all of it)"


def write_report(report: PrepareReport | TrainReport | FailureReport) -> None:
    """Write the report where the kubelet reads it; nowhere when the variable is absent (a run by hand)."""
    target = os.environ.get(TERMINATION_LOG_VARIABLE)
    text = dump_report(report)
    if len(text.encode()) > TERMINATION_MESSAGE_LIMIT:
        raise ValueError(f"a report of {len(text.encode())} bytes does not fit a termination message: {text[:200]}")
    if target:
        Path(target).write_text(text, encoding="utf-8")


def failure_report(error: StageError, step: int | None = None) -> FailureReport:
    """The report of a failure; a long message is cut to what fits, and says so."""
    message = error.message
    if len(message.encode()) > 2500:
        message = message.encode()[:2400].decode(errors="ignore") + _CUT
    return FailureReport(reason=error.reason, message=message, stage=error.stage, step=step)
