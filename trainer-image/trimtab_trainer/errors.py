"""Failures that a person can act on: each has an exit code, a reason, and a message with cause, place and remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trimtab_trainer.config import ExitCode


class StageError(Exception):
    """A failure of a stage; the termination message and the exit code come from it."""

    exit_code: ExitCode = ExitCode.TRAINING_FAILED
    reason: str = "TrainingFailed"

    def __init__(self, message: str, *, reason: str | None = None, stage: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        if reason is not None:
            self.reason = reason


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Put the place before the message of a `StageError` that does not begin with it."""
    try:
        yield
    except StageError as error:
        if not error.message.startswith(place):
            error.message = f"{place}: {error.message}"
            error.args = (error.message,)
        raise


class BadConfiguration(StageError):
    """The stage's JSON, the model's configuration or the chat template can't be used."""

    exit_code = ExitCode.BAD_CONFIGURATION
    reason = "BadConfiguration"


class BadData(StageError):
    """A data file or record is not valid; names the file and the line."""

    exit_code = ExitCode.BAD_DATA
    reason = "BadData"


class InputMissing(StageError):
    """A file, a model or a claim is not there."""

    exit_code = ExitCode.INPUT_MISSING
    reason = "InputMissing"


class UnsafeInput(InputMissing):
    """A model folder holds code or pickles, or an address leads to the node itself."""

    reason = "UnsafeInput"


class CorruptArtifact(InputMissing):
    """A file differs from its manifest."""

    reason = "CorruptArtifact"


class TrainingFailed(StageError):
    """Training itself went wrong: a loss that is not finite, divergence."""


class Stalled(StageError):
    """No step for longer than the deadline."""

    exit_code = ExitCode.STALLED
    reason = "Stalled"


class StorageError(StageError):
    """The volume can't be written: full, read-only, gone."""

    exit_code = ExitCode.STORAGE_ERROR
    reason = "StorageError"


class Preempted(StageError):
    """Told to stop; a checkpoint is saved."""

    exit_code = ExitCode.PREEMPTED
    reason = "Preempted"


class Superseded(StageError):
    """A newer attempt of the same stage has taken over."""

    reason = "Superseded"


class Killed(StageError):
    """A process died of a signal, or for want of memory."""

    exit_code = ExitCode.KILLED
    reason = "Killed"
