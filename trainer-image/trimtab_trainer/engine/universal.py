"""From the shards of one number of processes to DeepSpeed's universal checkpoint, which any number can load.

The work is DeepSpeed's converter, function by function, so that all processes share it: first each takes some of the
shards apart into fragments of parameters, then each puts some parameters together. The source is only read, and its
digests have been verified; what is written lives as long as it takes to load it. No file is unpickled beyond tensors
and the classes in `SAFE`: `TORCH_FORCE_WEIGHTS_ONLY_LOAD` overrides what DeepSpeed asks of `torch.load`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from deepspeed.checkpoint import PARAM_SHAPES, UNIVERSAL_CHECKPOINT_INFO, DeepSpeedCheckpoint, ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.errors import StorageError

SAFE: Final[list[Any]] = [LossScaler, ZeroStageEnum, fragment_address]
"""Besides tensors, the only classes in DeepSpeed's files."""
_STATES = ("fp32", "exp_avg", "exp_avg_sq")
"""Of each trained parameter, fp32: master weights, first and second moment."""


def convert(source: Path, target: Path, stage: int, group: Group, beat: Callable[[], None]) -> None:
    """Write the universal checkpoint of what an engine has saved; collective.

    Args:
        source: the engine's folder.
        target: on a volume that all processes share; what is there is replaced.
        stage: of ZeRO, 1 to 3.
        group: who shares the work.
        beat: called after each piece of it.

    Raises:
        StorageError: what was written is not whole.
    """
    if group.is_first:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    group.barrier()
    with torch.serialization.safe_globals(SAFE):
        work = (_of_stage_3 if stage == 3 else _of_stages_1_and_2)(source, target)
        for shard in range(group.rank, work.shards, group.size):
            work.take_apart(shard)
            beat()
        group.barrier()
        for name in sorted(work.shapes)[group.rank :: group.size]:
            work.put_together(name)
            _check(_zero(target) / name, work.shapes[name])
            beat()
        if group.is_first:
            work.finish(argparse.Namespace(output_folder=str(target)))
            shutil.copy2(source / work.metadata, target)
    group.barrier()
    if group.is_first:
        shutil.rmtree(_fragments(target))


@dataclass(frozen=True)
class _Work:
    """What there is to do, in DeepSpeed's functions.

    Attributes:
        shards: how many processes wrote the source.
        shapes: of the trained parameters, by name.
        take_apart: a shard into fragments.
        put_together: the fragments of a parameter.
        finish: write what belongs to no parameter; takes DeepSpeed's command line.
        metadata: the file that loading begins with.
    """

    shards: int
    shapes: Mapping[str, torch.Size]
    take_apart: Callable[[int], object]
    put_together: Callable[[str], object]
    finish: Callable[[argparse.Namespace], object]
    metadata: str


def _of_stages_1_and_2(source: Path, target: Path) -> _Work:
    """A shard is a stretch of all parameters, one after the other."""
    checkpoint = DeepSpeedCheckpoint(str(source))
    ds_to_universal._inject_missing_state(checkpoint)
    information = checkpoint.get_checkpoint_info(UNIVERSAL_CHECKPOINT_INFO)
    ((file, about),) = checkpoint.model_state_metadata
    shapes = about[PARAM_SHAPES]
    merge = partial(ds_to_universal.merge_tp_slices, information, str(_zero(target)), str(_fragments(target)), 1)
    return _Work(
        shards=checkpoint.dp_degree,
        shapes=shapes,
        take_apart=lambda shard: ds_to_universal.extract_zero_shards(
            str(_fragments(target)), checkpoint, (0, 0, shard)
        ),
        put_together=lambda name: merge((name, [shapes[name]])),
        finish=lambda arguments: ds_to_universal._save_optimizer_state(arguments, checkpoint),
        metadata=Path(file).name,
    )


def _of_stage_3(source: Path, target: Path) -> _Work:
    """A shard has a part of every parameter."""
    optimizers = ds_to_universal._get_optim_files(str(source))
    models = ds_to_universal._get_zero3_model_state_files(str(source))
    groups = ds_to_universal._parse_model_states_stage3(models)
    extract = partial(
        ds_to_universal.extract_zero_shards_stage3, [optimizers], [groups], len(optimizers), str(_fragments(target))
    )
    return _Work(
        shards=len(optimizers),
        shapes={name: shape for group in groups for name, shape in group.items()},
        take_apart=lambda shard: extract((0, shard)),
        put_together=partial(
            ds_to_universal.merge_zero3_slices, len(optimizers), str(_zero(target)), str(_fragments(target))
        ),
        finish=lambda arguments: ds_to_universal._save_optimizer_state_stage3(arguments, optimizers),
        metadata=Path(models[0]).name,
    )


def _fragments(target: Path) -> Path:
    return target / "tmp"


def _zero(target: Path) -> Path:
    """Where DeepSpeed looks for parameters, in a folder each."""
    return target / "zero"


def _check(parameter: Path, shape: torch.Size) -> None:
    """DeepSpeed joins whatever fragments it finds, so a file that is too short would go unnoticed."""
    for state in _STATES:
        file = parameter / f"{state}.pt"
        if not file.is_file() or file.stat().st_size < 4 * math.prod(shape):
            raise StorageError(f"{file}: not whole; a part of the checkpoint got lost while it was converted")
