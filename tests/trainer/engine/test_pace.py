"""The time that a stage will still take, on stages whose every second is known; real ones: `make bench-eta`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trimtab_trainer.progress.heartbeat import Heartbeat
from trimtab_trainer.progress.pace import (
    BYTES_PER_SECOND,
    FORWARD,
    PASSES_OF_RESULT,
    SECONDS_OF_RESULT,
    STEPS_TO_MEASURE,
    Agenda,
    Pace,
    Remaining,
)
from trimtab_trainer.progress.server import to_progress

TOKENS = 1000


@dataclass
class Stage:
    """The seconds of a stage; `first_step` compiles, `noise` is a step's, up or down, at most."""

    total_steps: int = 100
    step: float = 1.0
    first_step: float = 1.0
    noise: float = 0.0
    validation_every: int | None = None
    validation: float | None = None
    checkpoint_every: int = 1000
    checkpoint: float = 0.1
    result: float = 0.0
    seed: int = 0
    told: dict[int, Remaining] = field(default_factory=dict)
    """What the pace said after each step."""

    def agenda(self, checkpoint_error: float = 1.0) -> Agenda:
        """What prepare and configuration tell of it: bytes, not seconds."""
        return Agenda(
            total_steps=self.total_steps,
            checkpoint_every=self.checkpoint_every,
            checkpoint_bytes=self.checkpoint * BYTES_PER_SECOND * checkpoint_error,
            result_bytes=self.result * BYTES_PER_SECOND * checkpoint_error / PASSES_OF_RESULT,
            validation_every=self.validation_every,
            validation=None if self.validation is None else 1.0,
        )

    def run(self, pace: Pace, clock: list[float]) -> dict[int, float]:
        """Run it as the trainer does; the time of each step's report, and under -1 that of the end."""
        rng = np.random.default_rng(self.seed)
        pace.begin()
        if self.validation is not None:
            clock[0] += self.validation
            pace.validated()
        reported = {}
        for done in range(1, self.total_steps + 1):
            clock[0] += (self.first_step if done == 1 else self.step) * (1 + self.noise * rng.uniform(-1, 1))
            self.told[done] = pace.step(TOKENS, done)
            reported[done] = clock[0]
            is_last = done == self.total_steps
            if self.validation is not None and (
                is_last or (self.validation_every and done % self.validation_every == 0)
            ):
                clock[0] += self.validation
                pace.validated()
            if done % self.checkpoint_every == 0 and not is_last:
                clock[0] += self.checkpoint
                pace.saved()
        clock[0] += self.result + SECONDS_OF_RESULT
        return {**reported, -1: clock[0]}

    def measure(self, agenda: Agenda | None = None) -> dict[int, float]:
        """What the pace said after each step, over the truth."""
        clock = [5.0]
        reported = self.run(Pace(agenda or self.agenda(), clock=lambda: clock[0]), clock)
        return {done: self.told[done].seconds / (reported[-1] - reported[done]) for done in self.told}


def test_a_steady_stage_is_told_to_the_second() -> None:
    stage = Stage(validation_every=30, validation=7.0, checkpoint_every=8, checkpoint=3.0, result=11.0)
    ratios = stage.measure()
    assert all(abs(ratio - 1) < 1e-9 for ratio in ratios.values()), "from the first step to the last"


def test_the_first_step_compiles_and_counts_for_nothing() -> None:
    stage = Stage(first_step=60.0)
    ratios = stage.measure()
    assert ratios[1] > 10
    assert all(abs(ratios[done] - 1) < 1e-9 for done in range(2, 101))


def test_before_twenty_steps_it_is_a_guess_that_tells_its_speed() -> None:
    stage = Stage(step=2.0, first_step=9.0)
    stage.measure()
    assert {done for done, told in stage.told.items() if told.guessed_at is not None} == set(range(1, 20))
    assert stage.told[7].guessed_at == TOKENS / 2
    assert STEPS_TO_MEASURE == 20


def test_a_resumed_attempt_measures_anew() -> None:
    clock = [0.0]
    pace = Pace(Stage(validation=6.0, validation_every=50).agenda(), clock=lambda: clock[0])
    pace.begin()
    for done in (61, 62):
        clock[0] += 2.0
        told = pace.step(TOKENS, done)
    assert told.guessed_at == TOKENS / 2
    assert told.seconds == 38 * 2 + FORWARD * 2 + SECONDS_OF_RESULT, "the last validation as a step's forward pass"


@given(st.integers(1, 300), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 60)), st.booleans(), st.data())
def test_pauses_are_counted_as_the_trainer_makes_them(
    total: int, checkpoint: int, validation: int | None, best: bool, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, total))
    agenda = Agenda(total, checkpoint, 1, 1, validation, 1.0, saves_best=best)
    later = range(max(1, done), total + 1)
    validated = [step for step in later if step == total or (validation and step % validation == 0)]
    assert agenda.validations_left(done) == len(validated)
    saved = [step for step in later if step % checkpoint == 0 and step != total]
    improved = [step for step in validated if step != total] if best else []
    assert agenda.checkpoints_left(done) == max(len(saved), len(improved))


@given(
    total=st.integers(21, 400),
    step=st.floats(0.05, 30),
    compiling=st.floats(1, 60),
    every=st.one_of(st.none(), st.integers(1, 100)),
    validation=st.one_of(st.none(), st.floats(0, 100)),
    checkpoint_every=st.integers(1, 300),
    checkpoint=st.floats(0.01, 60),
    result=st.floats(0, 60),
    disk=st.floats(0.8, 1.2),
    seed=st.integers(0, 2**32 - 1),
)
def test_at_step_20_it_is_within_30_percent(
    total: int,
    step: float,
    compiling: float,
    every: int | None,
    validation: float | None,
    checkpoint_every: int,
    checkpoint: float,
    result: float,
    disk: float,
    seed: int,
) -> None:
    """Steps that differ by up to 20 %, a first one that compiles, and a disk a fifth faster or slower than assumed."""
    stage = Stage(
        total_steps=total, step=step, first_step=step * compiling, noise=0.2, validation_every=every,
        validation=validation, checkpoint_every=checkpoint_every, checkpoint=checkpoint, result=result, seed=seed,
    )  # fmt: skip
    ratios = stage.measure(stage.agenda(disk))
    assert 0.7 < ratios[20] < 1.3
    assert stage.told[20].guessed_at is None


def test_progress_tells_time_and_guess() -> None:
    beat = Heartbeat(step=3, total_steps=9, remaining_seconds=12.4, remaining_guessed_at=99.6)
    assert (to_progress(beat).estimated_remaining_seconds, to_progress(beat).guessed_at_tokens_per_second) == (12, 100)
    assert to_progress(Heartbeat()).estimated_remaining_seconds is None, "before the first step nothing is known"
