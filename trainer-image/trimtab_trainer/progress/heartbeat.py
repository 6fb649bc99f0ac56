"""The heartbeat: one small file that the first process of each pod rewrites at each step, and its supervisor reads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around what may take longer than a step: a checkpoint."""
        before = self._last.phase
        self.beat(phase=Phase.SAVING)
        yield
        self.beat(phase=before)


def read_heartbeat(file: Path) -> Heartbeat | None:
    """The last heartbeat; None before the first one."""
    try:
        return Heartbeat.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
