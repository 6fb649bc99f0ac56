"""The heartbeat: one small file that the first process of each pod rewrites at each step, and its supervisor reads."""

from __future__ import annotations

import time
from collections import deque
from enum import StrEnum
from pathlib import Path
from statistics import median

from pydantic import ValidationError

from trimtab_trainer.config import CheckpointReport
from trimtab_trainer.settings import Contract


class Phase(StrEnum):
    """What the processes are at. Only `training` is held to the progress deadline."""

    LOADING = "loading"
    TRAINING = "training"
    SAVING = "saving"


class Heartbeat(Contract):
    """The last sign of life. Times are seconds; `at` is on the machine's monotonic clock."""

    phase: Phase = Phase.LOADING
    at: float = 0.0
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    tokens: int = 0
    """Tokens trained on since the stage began, over all processes."""
    tokens_per_second: float = 0.0
    median_step_seconds: float = 0.0
    remaining_seconds: float | None = None
    """Until the result is there; None before the first step of the attempt."""
    remaining_guessed_at: float | None = None
    """Tokens a second that the remaining time assumes, while it is a guess."""
    mfu: float | None = None
    """Model FLOP utilisation, 0 to 1; absent where the device's peak is not known."""
    metrics: dict[str, float] = {}
    checkpoints: list[CheckpointReport] = []


class Pulse:
    """Writes the heartbeat. Steps are timed here, so the median knows nothing of validation and checkpoints."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last = Heartbeat()
        self._durations: deque[float] = deque(maxlen=51)
        self.beat()

    def beat(self, **changes: object) -> None:
        """Rewrite the file with `changes` and the time."""
        self._last = Heartbeat.model_validate({**self._last.model_dump(), **changes, "at": time.monotonic()})
        draft = self._file.with_suffix(".draft")
        draft.write_text(self._last.model_dump_json(by_alias=True), encoding="utf-8")
        draft.replace(self._file)

    def step(self, seconds: float, **changes: object) -> None:
        """A step of so many seconds is done."""
        self._durations.append(seconds)
        self.beat(median_step_seconds=median(self._durations), phase=Phase.TRAINING, **changes)


def read_heartbeat(file: Path) -> Heartbeat | None:
    """The last heartbeat; None before the first one."""
    try:
        return Heartbeat.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
