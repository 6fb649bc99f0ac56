"""How long the running stages will still take: what they say themselves, or what prepare guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab_operator.api.status import StagePhase, StageStatus
from trimtab_operator.finetunejob.stages import bounded, fraction
from trimtab_trainer.config import Progress


@dataclass(frozen=True, order=True)
class Remaining:
    """Of a running stage."""

    seconds: int
    guessed_at: int | None = field(default=None, compare=False)
    """Tokens a second that a guess assumes; None: it is measured."""

    @property
    def text(self) -> str:
        """For people."""
        return duration(self.seconds) if self.guessed_at is None else f"~{duration(self.seconds)}"


def told_remaining(stages: tuple[StageStatus, ...], progress: Mapping[str, Progress]) -> Remaining | None:
    """The longest of what the running stages say themselves; None where none has said any."""
    answers = [progress[s.name] for s in stages if s.phase is StagePhase.RUNNING and s.name in progress]
    return max((told for answer in answers if (told := _told(answer)) is not None), default=None)


def guessed_remaining(stages: tuple[StageStatus, ...]) -> Remaining | None:
    """The longest of prepare's estimates of the running stages, less what earlier attempts did."""
    guesses = [
        Remaining(math.ceil(stage.estimate.seconds * (1 - fraction(stage))), stage.estimate.tokens_per_second)
        for stage in stages
        if stage.phase is StagePhase.RUNNING and stage.estimate and stage.estimate.tokens_per_second
    ]
    return max(guesses, default=None)


def duration(seconds: int) -> str:
    """For people.

    >>> duration(45), duration(600), duration(3 * 3600 + 60), duration(90_000)
    ('45s', '10m', '3h1m', '1d1h')
    """
    if seconds < 100:
        return f"{seconds}s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 100:
        return f"{minutes}m"
    return f"{hours}h{minutes % 60}m" if hours < 24 else f"{days}d{hours % 24}h"


def _told(answer: Progress) -> Remaining | None:
    seconds, speed = answer.estimated_remaining_seconds, answer.guessed_at_tokens_per_second
    return None if seconds is None else Remaining(bounded(seconds), None if speed is None else bounded(speed))
