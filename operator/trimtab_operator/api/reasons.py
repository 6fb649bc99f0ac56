"""A condition's reason as a value: docs/status.md is made of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """A word in a condition's `reason`, its meaning and what to do."""

    name: str
    meaning: str
    action: str = "Nothing to do."


REFUSALS = (
    Reason("Invalid", "The API server refused an object of ours.", "See the message; often an admission rule."),
    Reason("Forbidden", "RBAC, an admission rule or a quota refused an object of ours.", "See the message."),
    Reason("NameTaken", "An object of a name that we need belongs to someone else.", "Delete or rename that object."),
)
"""What the API server refused, as `Progressing=False`, for every kind."""
