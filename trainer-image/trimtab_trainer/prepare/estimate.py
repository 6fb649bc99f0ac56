"""What a stage will need: memory of one process, and seconds. Estimates, with their formulas; memory's are in `memory`.

Time: (6 P + 6 L h maxLength) floating-point operations a token, a third more with gradient checkpointing, a third more
with a reference (its forward pass), 2 (P - A) less with `lora` (frozen weights need no gradient), at the sustained rate
of `FLOPS` for each process. P parameters, A those of the adapter, L layers, h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from trimtab_trainer.config import PrepareStage, StageType
from trimtab_trainer.prepare.memory import Phases, adapter_size, process_memory
from trimtab_trainer.prepare.shape import ModelShape
from trimtab_trainer.settings import Precision

if TYPE_CHECKING:
    from trimtab_trainer.prepare.activations import Activations

FLOPS = {
    (True, Precision.BF16): 4.0e14,  # 40 % of an H200's dense bf16 peak of 989 TFLOP/s
    (True, Precision.FP32): 2.7e13,  # 40 % of its fp32 peak of 67 TFLOP/s
    (False, Precision.BF16): 1.5e11,  # measured on two CPU cores with a model of 4 million parameters, fp32
    (False, Precision.FP32): 1.5e11,
}
"""Sustained floating-point operations a second of one process, by (has an accelerator, precision)."""


def memory_need(shape: ModelShape, config: Mapping[str, Any], row: int) -> Callable[[PrepareStage], int]:
    """What gives the bytes of one process, of a stage and of variants of it; arguments: `phases_of`."""
    phases = phases_of(shape, config, row)
    return lambda stage: phases(stage).peak


def phases_of(shape: ModelShape, config: Mapping[str, Any], row: int) -> Callable[[PrepareStage], Phases]:
    """What gives the memory of one process, of a stage and of variants of it.

    Args:
        shape: of the stage's model.
        config: the model's whole configuration.
        row: tokens of the longest row.
    """
    from trimtab_trainer.prepare.activations import count_activations  # imports torch

    @cache
    def count(precision: Precision, tokens: int, checkpointing: bool) -> Activations:
        return count_activations(config, precision, tokens, checkpointing=checkpointing)

    def phases(stage: PrepareStage) -> Phases:
        tokens = min(row, stage.max_length)
        activations = count(stage.precision, tokens, stage.recipe.gradient_checkpointing)
        return process_memory(stage, shape, activations, tokens)

    return phases


def seconds(stage: PrepareStage, shape: ModelShape, tokens: int, mix_tokens: int = 0) -> float:
    """Of the whole stage; `tokens`: of all steps, `mix_tokens`: those of a pretraining mix, which are beside."""
    forward = 2 * (shape.parameters + shape.layers * shape.hidden * stage.max_length)
    passes = 3 + stage.recipe.gradient_checkpointing + (stage.type in (StageType.DPO, StageType.PPO))
    if stage.type is StageType.PPO:
        tokens *= 4
    operations = mix_tokens * (3 + stage.recipe.gradient_checkpointing) * forward
    adapter = adapter_size(stage, shape)
    operations += tokens * (passes * forward - 2 * (shape.parameters - adapter if adapter else 0))
    return operations / (FLOPS[stage.accelerator, stage.precision] * stage.world_size)
