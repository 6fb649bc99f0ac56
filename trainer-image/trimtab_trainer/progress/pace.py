"""How long a stage will still take: what its steps and pauses took so far, times how many of each are left.

    remaining = steps * step + validations * validation + checkpoints * checkpoint + ending

step: mean over the last `WINDOW`, without the attempt's first one, which compiles and warms caches. A validation's
seconds (with a look at sample answers) and a checkpoint's are those of the last one. Before there was one, a validation
counts as forward passes, a third of a step for as many rows, and a checkpoint by its bytes. The ending is a forward
pass over some rows, and the result is written, read back and hashed. A stage that may stop early has its planned end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

STEPS_TO_MEASURE = 20
"""Steps of an attempt until what remains counts as measured."""
WINDOW = 64
FORWARD = 1 / 3
"""Of a step's time: its backward pass takes twice as long."""
BYTES_PER_SECOND = 2e8
"""Written and hashed, until a checkpoint has told."""
PASSES_OF_RESULT = 3
"""Over the result's bytes: written, read back and compared, hashed again."""
SECONDS_OF_RESULT = 2.0
"""Of the model card and its plots."""


@dataclass(frozen=True)
class Agenda:
    """What a stage does besides its steps. Steps' worth: as many rows as that many steps take."""

    total_steps: int
    checkpoint_every: int
    checkpoint_bytes: float
    result_bytes: float
    validation_every: int | None = None
    """None: before the first step and after the last one only."""
    validation: float | None = None
    """Steps' worth of one; None: the stage measures nothing."""
    saves_best: bool = False
    """A validation may be followed by a checkpoint."""
    ending: float = 0.0
    """Steps' worth of forward passes after the last validation."""

    def validations_left(self, done: int) -> int:
        """That of step `done` is still ahead."""
        if self.validation is None:
            return 0
        return 1 + _multiples(self.validation_every, max(1, done), self.total_steps)

    def checkpoints_left(self, done: int) -> int:
        """That of step `done` is still ahead; after the last step there is none."""
        best = self.validations_left(done) - 1 if self.saves_best else 0
        return max(best, _multiples(self.checkpoint_every, max(1, done), self.total_steps))


@dataclass(frozen=True)
class Remaining:
    """Seconds until the stage's result is there."""

    seconds: float
    guessed_at: float | None
    """Tokens a second that a guess assumes; None: it is measured."""


class Pace:
    """Follows one attempt. Between two calls lies what the call names."""

    def __init__(self, agenda: Agenda, clock: Callable[[], float] = time.perf_counter) -> None:
        self._agenda, self._clock = agenda, clock
        self._last = clock()
        self._steps = 0
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._validation: float | None = None
        self._checkpoint: float | None = None

    def begin(self) -> None:
        """What was before is no step."""
        self._lap()

    def step(self, tokens: int, done: int) -> Remaining:
        """A step of so many tokens is done, the `done`-th of the stage; returns what remains."""
        if self._steps == 1:
            self._recent.clear()
        self._recent.append((self._lap(), tokens))
        self._steps += 1
        return self._remaining(done)

    def validated(self) -> None:
        """A validation is done."""
        self._validation = self._lap()

    def saved(self) -> None:
        """A checkpoint is saved."""
        self._checkpoint = self._lap()

    def _remaining(self, done: int) -> Remaining:
        agenda = self._agenda
        step = sum(seconds for seconds, _ in self._recent) / len(self._recent)
        validation = self._validation
        if validation is None:
            validation = FORWARD * step * (agenda.validation or 0)
        assumed = agenda.checkpoint_bytes / BYTES_PER_SECOND
        checkpoint = assumed if self._checkpoint is None else self._checkpoint
        bytes_per_second = BYTES_PER_SECOND * assumed / checkpoint
        seconds = (
            (agenda.total_steps - done) * step
            + agenda.validations_left(done) * validation
            + agenda.checkpoints_left(done) * checkpoint
            + agenda.ending * FORWARD * step
            + PASSES_OF_RESULT * agenda.result_bytes / bytes_per_second
            + SECONDS_OF_RESULT
        )
        tokens = sum(tokens for _, tokens in self._recent)
        is_guess = self._steps < STEPS_TO_MEASURE
        return Remaining(seconds, tokens / (step * len(self._recent)) if is_guess else None)

    def _lap(self) -> float:
        now = self._clock()
        seconds, self._last = now - self._last, now
        return seconds


def _multiples(every: int | None, first: int, end: int) -> int:
    """How many multiples of `every` lie in [first, end)."""
    return (end - 1) // every - (first - 1) // every if every and end > first else 0
