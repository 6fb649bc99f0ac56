"""From any exception to a failure with an exit code and a message that says what to do. Imports no torch."""

from __future__ import annotations

import errno
import traceback

from trimtab_trainer.errors import Killed, StageError, StorageError, TrainingFailed

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
_TORCH_STORAGE_MARKS = ("PytorchStreamWriter", "inline_container", "iostream error", "I/O error")
_PEER_MARKS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "gloo/transport",
    "NCCL communicator was aborted",
    "Socket Timeout",
)


class PeerLost(Killed):
    """Another training process ended; this one only noticed."""

    reason = "PeerLost"


def to_stage_error(error: BaseException) -> StageError:
    """The failure that an exception means."""
    if isinstance(error, StageError):
        return error
    text = f"{type(error).__name__}: {error}"
    if is_storage_error(error):
        return StorageError(f"the volume can't be written: {text}; free space on it or make it larger")
    if type(error).__name__ == "OutOfMemoryError":
        return Killed(
            f"out of accelerator memory ({error}); lower train.microBatchSize, raise parallelism.zeroStage, "
            "or set train.gradientCheckpointing",
            reason="OutOfMemory",
        )
    if any(mark in text for mark in _PEER_MARKS):
        return PeerLost(f"another training process ended or can't be reached ({text[:300]}); its log has the cause")
    place = traceback.extract_tb(error.__traceback__)
    where = f" at {place[-1].filename}:{place[-1].lineno}" if place else ""
    return TrainingFailed(f"unexpected {text}{where}; the log has the stack", reason="InternalError")


def is_storage_error(error: BaseException) -> bool:
    """Whether it comes from a volume that is full, read-only or gone; torch hides that in a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno in _STORAGE_ERRORS
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _TORCH_STORAGE_MARKS)
