"""What a stage will need: memory of one process, and seconds. Estimates, with their formulas; memory's are in `memory`.

Time: (6 P + 6 L h maxLength) floating-point operations a token, a third more with gradient checkpointing, a third more
with a reference (its forward pass), 2 (P - A) less with `lora` (frozen weights need no gradient), at the sustained rate
of `FLOPS` for each process. P parameters, A those of the adapter, L layers, h hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_trainer.config import PrepareStage, StageType
from trimtab_trainer.prepare.memory import adapter_size, process_memory
from trimtab_trainer.prepare.shape import ModelShape
from trimtab_trainer.settings import Precision

FLOPS = {
    (True, Precision.BF16): 4.0e14,  # 40 % of an H200's dense bf16 peak of 989 TFLOP/s
    (True, Precision.FP32): 2.7e13,  # 40 % of its fp32 peak of 67 TFLOP/s
    (False, Precision.BF16): 1.5e11,  # measured on two CPU cores with a model of 4 million parameters, fp32
    (False, Precision.FP32): 1.5e11,
}
"""Sustained floating-point operations a second of one process, by (has an accelerator, precision)."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, and seconds of the whole stage."""

    memory_bytes: int
    seconds: int
    tokens_per_second: int
    """The speed that `seconds` assumes."""


def estimate(
    stage: PrepareStage, shape: ModelShape, config: Mapping[str, Any], row: int, tokens: int, mix_tokens: int = 0
) -> Estimate:
    """Memory of one process, and time for the tokens of all epochs.

    Args:
        stage: what is asked for.
        shape: of its model.
        config: the model's whole configuration.
        row: tokens of the longest row.
        tokens: of all steps.
        mix_tokens: those of a pretraining mix, which are beside.
    """
    from trimtab_trainer.prepare.activations import count_activations  # imports torch

    checkpointing = stage.recipe.gradient_checkpointing
    activations = count_activations(config, stage.precision, row, checkpointing=checkpointing)
    time = seconds(stage, shape, tokens, mix_tokens)
    return Estimate(process_memory(stage, shape, activations, row), math.ceil(time), round(tokens / time))


def seconds(stage: PrepareStage, shape: ModelShape, tokens: int, mix_tokens: int = 0) -> float:
    """Of the whole stage."""
    forward = 2 * (shape.parameters + shape.layers * shape.hidden * stage.max_length)
    passes = 3 + stage.recipe.gradient_checkpointing + (stage.type in (StageType.DPO, StageType.PPO))
    if stage.type is StageType.PPO:
        tokens *= 4
    operations = mix_tokens * (3 + stage.recipe.gradient_checkpointing) * forward
    adapter = adapter_size(stage, shape)
    operations += tokens * (passes * forward - 2 * (shape.parameters - adapter if adapter else 0))
    return operations / (FLOPS[stage.accelerator, stage.precision] * stage.world_size)
