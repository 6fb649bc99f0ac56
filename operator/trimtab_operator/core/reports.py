"""What pods leave behind when they fail, made fit for a status."""

from __future__ import annotations

from pydantic import ValidationError

from trimtab_trainer.config import REPORT, FailureReport


def failure_report(text: str) -> FailureReport | None:
    """The report of a pod that ended badly; None where it left none, or something else."""
    try:
        report = REPORT.validate_json(text)
    except ValidationError:
        return None
    return report if isinstance(report, FailureReport) else None


def clean(text: str, limit: int) -> str:
    """At most `limit` characters, without control characters: what others wrote ends up on terminals."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
