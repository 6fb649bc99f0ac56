"""What a stage has before it besides its steps, for the time that it will still take."""

from __future__ import annotations

from transformers import PreTrainedModel

from trimtab_trainer.config import StageType, TrainConfig
from trimtab_trainer.data.store import VALIDATION, PreparedData, task_plan
from trimtab_trainer.engine.model import DTYPES
from trimtab_trainer.progress.pace import Agenda

_STATES = 8
"""Bytes that AdamW keeps of a trained parameter."""
_MASTER = 4
"""Bytes of its fp32 copy, where the model has fewer."""


def agenda_of(config: TrainConfig, prepared: PreparedData, model: PreTrainedModel) -> Agenda:
    """Of a stage with this model in training."""
    info = prepared.info
    is_ppo, is_reward = config.type is StageType.PPO, config.type is StageType.REWARD
    held_out = prepared.rows(VALIDATION) if info.has_validation else 0
    measured = held_out + sum(prepared.rows(task_plan(task)) for task in info.held_out_tasks)
    centred_on = prepared.demonstrations or prepared
    ending = centred_on.rows(0) + held_out if is_reward else 0  # the offset, and the calibration
    width = DTYPES[config.precision].itemsize
    result = width * sum(_size(p) for p in model.parameters())
    states = (_STATES + (_MASTER if width < _MASTER else 0)) * sum(
        _size(p) for p in model.parameters() if p.requires_grad
    )
    return Agenda(
        total_steps=info.total_steps,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_bytes=(1 + is_ppo) * (result + states),  # the critic is as large
        result_bytes=result,
        validation_every=config.validation_every_steps,
        validation=measured / info.global_batch_size if measured or is_ppo else None,
        saves_best=config.early_stopping is not None,
        ending=ending / info.global_batch_size,
    )


def _size(parameter: object) -> int:
    """Elements of the whole parameter, of which ZeRO 3 leaves a process a part."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())  # type: ignore[attr-defined]
