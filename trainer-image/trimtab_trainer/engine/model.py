"""The stage's starting weights: random from a configuration, or those of an artifact; beside them what stays frozen."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from trimtab_trainer import manifest
from trimtab_trainer.config import COMPARING, Artifact, StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.lora import add_adapter
from trimtab_trainer.engine.networks import LanguageModel, Network, Scorer
from trimtab_trainer.engine.quantized import size
from trimtab_trainer.engine.reward import add_head, add_zero_head, read_offset
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import Precision
from trimtab_trainer.volumes import local_path

ATTENTION = "sdpa"
"""Packing relies on it: transformers isolates segments by position_ids alone with sdpa and eager."""
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}
_LOADING = {"attn_implementation": ATTENTION, "local_files_only": True, "trust_remote_code": False}


def load_model(config: TrainConfig, prepared: PreparedData, *, verify: bool) -> Network:
    """The stage's starting weights in the stage's precision, on the CPU.

    Dropout is as the model's configuration says; off where answers are compared: in `dpo` it would be noise in each
    comparison with the reference, in `reward` in each comparison of two answers, in `ppo` in the first ratio.

    Args:
        config: the stage.
        prepared: its prepared data, which has the configuration for random weights.
        verify: check the artifact's digest (one process a pod does).
    """
    try:
        network = _build(config, prepared, verify=verify)
    except ValueError as error:
        raise BadConfiguration(
            f"{prepared.folder / 'model_config.json'}: transformers can't build this model with {ATTENTION} attention, "
            f"which packing needs: {error}; use another architecture or correct its configuration",
            stage=config.stage,
        ) from error
    model = network.model
    rows = _embedding(model).shape[0]
    if prepared.info.vocabulary_size > rows:
        raise BadConfiguration(
            f"the tokenizer has {prepared.info.vocabulary_size} tokens, the model embeds {rows}; "
            "use the tokenizer that belongs to the model, or set vocab_size in model.config",
            stage=config.stage,
        )
    make_trainable(model, config)
    model.config.use_cache = False
    return network


def make_trainable(model: PreTrainedModel, config: TrainConfig) -> None:
    """What the stage asks for of each model that it trains: an adapter, no dropout, gradient checkpointing."""
    if config.lora is not None:
        add_adapter(model, config, config.lora)
    if config.type in COMPARING or config.type is StageType.PPO:
        disable_dropout(model)
    if config.recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def disable_dropout(model: torch.nn.Module) -> None:
    """Turn every dropout off, and leave the configuration, which the result will have, as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # what transformers' attention functions are given
                setattr(module, name, 0.0)


def load_reference(reference: Artifact, config: TrainConfig, device: torch.device, *, verify: bool) -> Network:
    """Frozen weights on `device`, with dropout off, in the precision and with the kernels of the model in training."""
    model = _causal_lm(reference, DTYPES[config.precision], verify=verify)
    return frozen(LanguageModel(model, _temperature(config)), device)


def load_scorer(artifact: Artifact, precision: Precision, *, verify: bool) -> tuple[Scorer, float]:
    """A reward model with dropout off, on the CPU, and its offset."""
    folder = _verified(artifact, "reward", verify=verify)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=DTYPES[precision], **_LOADING
    )
    disable_dropout(model)
    model.config.use_cache = False
    return Scorer(model), read_offset(folder)


def load_critic(artifact: Artifact, precision: Precision, *, verify: bool) -> Scorer:
    """A language model's weights with a head of zeros and dropout off, on the CPU."""
    model = add_zero_head(_verified(artifact, verify=verify), dtype=DTYPES[precision], **_LOADING)
    disable_dropout(model)
    model.config.use_cache = False
    return Scorer(model)


def frozen(network: Network, device: torch.device) -> Network:
    """The same, for good: no gradients, no dropout."""
    network.eval()
    network.requires_grad_(False)
    return network.to(device)


def _build(config: TrainConfig, prepared: PreparedData, *, verify: bool) -> Network:
    dtype, seed = DTYPES[config.precision], config.recipe.seed
    if config.type is StageType.REWARD:
        if config.model is None:
            raise BadConfiguration("a reward stage starts from a model", stage=config.stage)
        folder = _verified(config.model, verify=verify)
        return Scorer(add_head(folder, seed, dtype=dtype, **_LOADING))
    if config.model is None:
        return LanguageModel(_random_model(prepared, seed, dtype), _temperature(config))
    return LanguageModel(_causal_lm(config.model, dtype, verify=verify), _temperature(config))


def _temperature(config: TrainConfig) -> float:
    """Of log-probabilities: the one that `ppo` samples at, so that they are those of what was drawn."""
    return config.ppo.rollout.temperature if config.ppo else 1.0


def _causal_lm(artifact: Artifact, dtype: torch.dtype, *, verify: bool) -> PreTrainedModel:
    folder = _verified(artifact, verify=verify)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_LOADING)
    return model


def _verified(artifact: Artifact, kind: str = "model", *, verify: bool) -> Path:
    """The artifact's folder, with its digests checked where asked.

    Raises:
        BadConfiguration: it holds something else than `kind`.
    """
    folder = local_path(artifact.uri)
    found = manifest.verify(folder, artifact.digest) if verify else manifest.read_manifest(folder)
    if found.kind != kind:
        raise BadConfiguration(f"{artifact.uri} holds a {found.kind}, not a {kind}; start from another stage")
    return folder


def _random_model(prepared: PreparedData, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """Weights drawn in fp32 from `seed`, the same on every rank, then rounded."""
    keys = prepared.model_config
    if keys is None:
        raise BadConfiguration(f"{prepared.folder}: no model_config.json, and the stage names no model to start from")
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**keys), dtype=torch.float32, attn_implementation=ATTENTION, trust_remote_code=False
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    return cast(torch.Tensor, model.get_input_embeddings().weight)


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """FLOP of forward and backward for one token: 4·N + 2·M + 6·L·h·S, causal.

    N: parameters without the lookup of embeddings; M: those of them that are trained, all without an adapter.
    """
    config = model.config
    lookup = None if config.tie_word_embeddings else _embedding(model)
    own = [p for p in model.parameters() if p is not lookup]
    parameters = sum(size(p) for p in own)
    trained = sum(p.numel() for p in own if p.requires_grad)
    return 4.0 * parameters + 2.0 * trained + 6.0 * float(config.num_hidden_layers * config.hidden_size * length)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a known accelerator in FLOP/s, from NVIDIA's data sheets; None elsewhere, rather than a guess."""
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    known = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
    return next((peak for part, peak in known.items() if part in name), None)
