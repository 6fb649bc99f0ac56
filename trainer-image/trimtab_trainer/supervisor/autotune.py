"""Choosing the micro-batch size and ZeRO stage before the first attempt trains; later attempts find the choice.

The first pod measures, size by size, in a training process of its own that ends with it; the other pods wait. A size
for which the memory did not suffice ends the search; where that killed the whole container, the next attempt sees which
size it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from trimtab_trainer.config import TrainConfig, dump
from trimtab_trainer.errors import BadConfiguration, StageError, Stalled
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.tuning import AUTOTUNE_FILE, Measured, Tuning, choose, next_size, table

WAIT_SECONDS = 1800.0
"""How long the other pods wait for the choice."""
_POLL_SECONDS = 1.0
_OUT_OF_MEMORY = ("OutOfMemory", "OOMKilled")
_log = logging.getLogger(__name__)


def settle(
    config: TrainConfig, folder: Path, fence: Fence, node: int, measure: Callable[[int], Measured]
) -> TrainConfig:
    """The stage with the choice that is stored, or made now.

    Args:
        config: with `autotune`.
        folder: of the stage.
        fence: of the attempt.
        node: index of this pod.
        measure: runs one size; it raises a `StageError` where that fails.

    Raises:
        BadConfiguration: no size fits.
        StageError: a measurement failed for another reason than memory, or was told to stop.
    """
    file = folder / AUTOTUNE_FILE
    tuning = _read(file)
    if tuning.micro_batch_size is None:
        tuning = _search(config, file, fence, tuning, measure) if node == 0 else _wait(file, config.stage)
    lines = "\n".join(table(tuning))
    _log.info("autotune: microBatchSize %s, zeroStage %s\n%s", tuning.micro_batch_size, tuning.zero_stage, lines)
    return tuning.applied(config)


def _search(
    config: TrainConfig, file: Path, fence: Fence, tuning: Tuning, measure: Callable[[int], Measured]
) -> Tuning:
    largest = -(-config.recipe.global_batch_size // (config.nodes * config.processes_per_node))
    too_large = tuning.trying if tuning.measured else None
    while (size := next_size(tuning.measured, largest, too_large)) is not None:
        tuning = _write(file, fence, tuning.model_copy(update={"trying": size}))
        try:
            found = measure(size)
        except StageError as error:
            if error.reason not in _OUT_OF_MEMORY or size == 1:
                _write(file, fence, tuning.model_copy(update={"trying": None}))
                raise
            _log.warning("autotune: microBatchSize %d takes too much memory: %s", size, error.message)
            too_large = size
            continue
        tuning = tuning.model_copy(update={"measured": [*tuning.measured, found], "trying": None})
    chosen = choose(tuning.measured)
    if chosen is None:
        one = tuning.measured[0]
        raise BadConfiguration(
            f"train.autotune: with one row at a time a process needs {min(one.needs) / 2**30:.3g} GiB of memory, and "
            f"has {one.limit_bytes / 2**30:.3g} GiB; set train.gradientCheckpointing or lora, or give it more memory",
            reason="DoesNotFit",
            stage=config.stage,
        )
    size, zero = chosen
    return _write(file, fence, tuning.model_copy(update={"micro_batch_size": size, "zero_stage": zero, "trying": None}))


def _read(file: Path) -> Tuning:
    return Tuning.model_validate_json(file.read_bytes()) if file.exists() else Tuning()


def _write(file: Path, fence: Fence, tuning: Tuning) -> Tuning:
    draft = file.with_name(f".{file.name}-attempt-{fence.attempt}")
    draft.write_text(dump(tuning), encoding="utf-8")
    fence.check()
    draft.replace(file)
    return tuning


def _wait(file: Path, stage: str) -> Tuning:
    until = time.monotonic() + WAIT_SECONDS
    while (tuning := _read(file)).micro_batch_size is None:
        if time.monotonic() > until:
            raise Stalled(f"{file}: no choice after {WAIT_SECONDS:.0f} s; see the first pod's log", stage=stage)
        time.sleep(_POLL_SECONDS)
    return tuning
