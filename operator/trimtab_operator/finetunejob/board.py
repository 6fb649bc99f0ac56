"""Whom to ask for progress."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_operator.core.board import Board
from trimtab_trainer.config import Progress


@dataclass(frozen=True)
class Target:
    """The first pod of a running attempt."""

    pod: str
    """Its name; another attempt's pod has another."""
    stage: str
    address: str
    """IP address of the pod."""


ProgressBoard = Board[Target, Progress]
