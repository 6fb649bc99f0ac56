"""Saving and restoring the whole state of training; bitwise at the same number of processes and threads.

At another number of processes the state is the same to the last bit, and the steps after it differ by rounding alone
where there is no dropout. With dropout each process draws its masks from a new seed, since no process has the rows
that it had before; that seed follows from the stage's, the process and the step, so such a resume can be repeated.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_trainer.checkpoints import STATE_FILE, Checkpoints, TrainerState
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.errors import StageError, StorageError
from trimtab_trainer.failures import is_storage_error, to_stage_error


class Saved(Protocol):
    """A part of a checkpoint; all of it is collective."""

    def save(self, folder: str, name: str) -> None:
        """Write it into `folder`, as or below `name`."""

    def load(self, folder: str, name: str) -> None:
        """Read it back."""

    def load_resized(self, folder: str, name: str, scratch: Path, group: Group, beat: Callable[[], None]) -> None:
        """Read what another number of processes has written.

        Args:
            folder: as in `save`.
            name: as in `save`.
            scratch: a folder that all processes share, for what is only needed to do so.
            group: the processes.
            beat: called now and then, so that a long conversion is no hang.
        """


def save(engines: Mapping[str, Saved], group: Group, checkpoints: Checkpoints, state: TrainerState, keep: int) -> None:
    """Write a checkpoint of all engines, by name, whole or not at all; collective.

    Raises:
        StorageError: the volume took not all of it; the checkpoints before are as they were.
        Superseded: a newer attempt has taken over.
    """
    draft = checkpoints.draft(state.step)
    try:
        if group.is_first:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        group.barrier()
        for name, engine in engines.items():
            engine.save(str(draft), name)
        torch.save(_rng_state(group.device), _rng_file(draft, group.rank))
        group.barrier()
        if group.is_first:
            checkpoints.publish(state, keep)
        group.barrier()
    except Exception as error:
        if isinstance(error, StageError) or not is_storage_error(error):
            raise
        shutil.rmtree(draft, ignore_errors=True)
        cause = to_stage_error(error).message
        raise StorageError(f"{checkpoints.path(state.step)}: the checkpoint could not be saved: {cause}") from error


def seed_all(seed: int, rank: int, step: int = 0) -> None:
    """Seed every generator, each rank its own: dropout must not be the same on all of them.

    `step`: steps done by another number of processes, whose generators nobody can continue.
    """
    own = int(np.random.SeedSequence([seed, rank, *([step] if step else [])]).generate_state(1)[0])
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)


def restore(
    engines: Mapping[str, Saved], group: Group, checkpoints: Checkpoints, step: int, beat: Callable[[], None]
) -> TrainerState:
    """Read weights, optimiser and RNG states of the checkpoint of `step` back, and return the rest; collective.

    The folder's digests have been verified. `beat`: see `Saved.load_resized`.

    Raises:
        StorageError: the volume has no room to convert it for this number of processes.
    """
    folder = checkpoints.path(step)
    state = TrainerState.model_validate_json((folder / STATE_FILE).read_bytes())
    if state.world_size == group.size:
        for name, engine in engines.items():
            engine.load(str(folder), name)
        _set_rng_state(torch.load(_rng_file(folder, group.rank), weights_only=True), group.device)
        return state
    scratch = checkpoints.scratch(step)
    try:
        for name, engine in engines.items():
            engine.load_resized(str(folder), name, scratch, group, beat)
    except Exception as error:
        if isinstance(error, StageError) or not is_storage_error(error):
            raise
        cause = to_stage_error(error).message
        raise StorageError(
            f"{scratch}: the checkpoint could not be converted for {group.size} processes, which needs twice its size "
            f"while it lasts: {cause}"
        ) from error
    group.barrier()
    if group.is_first:
        shutil.rmtree(scratch, ignore_errors=True)
    seed_all(state.identity.recipe.seed, group.rank, step)
    return state


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / f"rng-rank-{rank}.pt"


def _rng_state(device: torch.device) -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = cast(tuple[str, NDArray[np.uint32], int, int, float], numpy_state)
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
