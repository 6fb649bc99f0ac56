"""The sizes of a model that memory and time depend on, counted without allocating it."""

from __future__ import annotations

from typing import Any

from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.lora_targets import linear_sizes, linear_weights
from trimtab_trainer.settings import Contract


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
    linear: dict[str, int] = {}
    """The same layers, with their weights."""


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
        linear=linear_weights(model),
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
