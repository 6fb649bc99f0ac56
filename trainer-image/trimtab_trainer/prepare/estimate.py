"""What a stage will need: parameters, accelerator memory of one process, seconds. Estimates, with their formulas.

Symbols: P parameters, W processes, c bytes of a weight or activation (bf16: 2, fp32: 4), L layers, h hidden size, k
size of keys and values, f feed-forward size, V vocabulary, t = microBatchSize * maxLength tokens of one micro-batch.

Memory in bytes (states: Rajbhandari et al. 2020, table 1, with fp32 gradient accumulation):

    weights      c P            / W at ZeRO 3
    gradients    4 P            / W at ZeRO 2 and 3
    master copy  4 P with bf16  / W at ZeRO 1, 2 and 3
    AdamW        8 P, SGD 0     / W at ZeRO 1, 2 and 3
    activations  c t L (8 h + 2 k + 4 f); checkpointed: c t (L h + 8 h + 2 k + 4 f)
    logits       t V (c + 8): the model's, their fp32 copy and its gradient
    reference    c P + t V (c + 4), whole on each process: `dpo` only, where t is twice as large (two answers)

    ppo          the critic's weights, gradients, states and activations again, and the frozen reward model's weights

The activations count what one pre-norm decoder layer with a gated feed-forward keeps for its backward pass and memory-
efficient attention (no t^2 term): 8 h for norms, query, attention's output, its projection and the residuals, 2 k for
key and value, 4 f for gate, up, activation and product.

With `lora` of rank r there are A = r sum(inputs + outputs of the targets) more weights; gradients, master copy and
optimiser states are those of A, not of P, and the reference of `dpo` shares the frozen weights: only its logits count.

Time: (6 P + 6 L h maxLength) floating-point operations a token, a third more with gradient checkpointing, a third more
with a reference (its forward pass), 2 (P - A) less with `lora` (frozen weights need no gradient), at the sustained rate
of `FLOPS` for each process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trimtab_trainer.config import COMPARING, PrepareStage, StageType
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.lora_targets import choose_targets, linear_sizes
from trimtab_trainer.settings import Contract, Optimizer, Precision

FLOPS = {
    (True, Precision.BF16): 4.0e14,  # 40 % of an H200's dense bf16 peak of 989 TFLOP/s
    (True, Precision.FP32): 2.7e13,  # 40 % of its fp32 peak of 67 TFLOP/s
    (False, Precision.BF16): 1.5e11,  # measured on two CPU cores with a model of 4 million parameters, fp32
    (False, Precision.FP32): 1.5e11,
}
"""Sustained floating-point operations a second of one process, by (has an accelerator, precision)."""


class ModelShape(Contract):
    """The sizes that memory and time depend on."""

    parameters: int
    layers: int
    hidden: int
    key_value: int
    """Width of the keys of one layer: key-value heads times head size."""
    feed_forward: int
    vocabulary: int
    adaptable: dict[str, int] = {}
    """Linear layers of the blocks by name, with inputs plus outputs: see `linear_sizes`."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process, and seconds of the whole stage; both rounded up."""

    memory_bytes: int
    seconds: int


def model_shape(config: dict[str, Any]) -> ModelShape:
    """Count the parameters of a model without allocating it, on torch's meta device.

    Raises:
        BadConfiguration: transformers can't build a causal language model of this configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM  # both load for seconds; a reused result needs neither

    build: Any = AutoModelForCausalLM.from_config  # not typed
    try:
        complete = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = build(complete, trust_remote_code=False)
    except Exception as error:  # a configuration from outside can fail anywhere in the model's code
        raise BadConfiguration(
            f"model config ({config.get('model_type')}): {type(error).__name__}: {_line(error)}; correct the config"
        ) from error
    text = complete.get_text_config()
    heads = int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    key_value_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        key_value=key_value_heads * head,
        feed_forward=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        vocabulary=int(text.vocab_size),
        adaptable=linear_sizes(model),
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def estimate(stage: PrepareStage, shape: ModelShape, tokens: int, mix_tokens: int = 0) -> Estimate:
    """Memory of one process, and time for the tokens of all epochs; formulas in the module's docstring.

    `mix_tokens`: those of a pretraining mix, which are beside.
    """
    width = 2 if stage.precision is Precision.BF16 else 4
    recipe, world = stage.recipe, stage.world_size
    parts = [world if stage.zero_stage >= level else 1 for level in (1, 2, 3)]
    states = (4 if stage.precision is Precision.BF16 else 0) + (8 if recipe.optimizer is Optimizer.ADAMW else 0)
    adapter = 0
    if stage.lora is not None:
        adapter = stage.lora.rank * sum(shape.adaptable[name] for name in choose_targets(stage.lora, shape.adaptable))
    trained = adapter or shape.parameters
    fixed = trained * (states / parts[0] + 4 / parts[1]) + (shape.parameters + adapter) * width / parts[2]
    has_reference = stage.type in (StageType.DPO, StageType.PPO)
    batch = recipe.micro_batch_size * stage.max_length * (2 if stage.type in COMPARING else 1)
    layer = 8 * shape.hidden + 2 * shape.key_value + 4 * shape.feed_forward
    kept = shape.layers * shape.hidden + layer if recipe.gradient_checkpointing else shape.layers * layer
    memory = fixed + batch * width * kept
    if stage.type is not StageType.REWARD:
        memory += batch * shape.vocabulary * (width + 8)
    if has_reference:
        memory += (0 if adapter else shape.parameters * width) + batch * shape.vocabulary * (width + 4)
    if stage.type is StageType.PPO:
        memory += fixed + batch * width * kept + shape.parameters * width
    forward = 2 * (shape.parameters + shape.layers * shape.hidden * stage.max_length)
    passes = 3 + recipe.gradient_checkpointing + has_reference
    if stage.type is StageType.PPO:
        tokens *= 4
    operations = mix_tokens * (3 + recipe.gradient_checkpointing) * forward
    operations += tokens * (passes * forward - 2 * (shape.parameters - trained if adapter else 0))
    rate = FLOPS[stage.accelerator, stage.precision] * world
    return Estimate(math.ceil(memory), math.ceil(operations / rate))
