"""Warning Events about children that do not get on: what the Job controller and the kubelet say nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_operator.core.board import Board


@dataclass(frozen=True)
class Subject:
    """A child that does not get on."""

    namespace: str
    uid: str


@dataclass(frozen=True)
class Complaint:
    """The newest Warning about a child."""

    reason: str
    """One word, e.g. FailedCreate or FailedMount."""
    note: str


ComplaintBoard = Board[Subject, Complaint | None]
