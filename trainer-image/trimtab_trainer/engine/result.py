"""The result of a stage: `model/` in Hugging Face's format, reloaded and compared before anybody sees it."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, PreTrainedModel

from trimtab_trainer import manifest
from trimtab_trainer.config import StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import change, lora, reference, reward, rollout_store
from trimtab_trainer.engine.calibration import Calibration
from trimtab_trainer.engine.card import write_card
from trimtab_trainer.engine.change import Change
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.model import DTYPES
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import StorageError
from trimtab_trainer.failures import is_storage_error, to_stage_error
from trimtab_trainer.lineage import Lineage, Outcome
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.volumes import local_path

_PACKAGES = ("trimtab", "torch", "transformers", "deepspeed", "peft", "tokenizers", "safetensors")


def publish_result(
    engine: Engine,
    weights: dict[str, torch.Tensor],
    group: Group,
    config: TrainConfig,
    prepared: PreparedData,
    fence: Fence,
    outcome: Outcome,
    calibrated: Calibration | None = None,
) -> str | None:
    """Write, check and publish `model/`, then remove the checkpoints; collective. Returns the digest on rank 0.

    Raises:
        StorageError: the volume can't take it, or gave back other bytes than it was given.
    """
    adapter = lora.Trained.of(engine, config, config.lora, weights) if config.lora is not None else None
    if adapter is not None:
        weights = adapter.merged
    if not group.is_first:
        group.barrier()
        return None
    folder = local_path(config.folder)
    draft = folder / f".draft-model-attempt-{config.attempt}"
    for old in folder.glob(".draft-model-*"):
        shutil.rmtree(old)
    dtype = DTYPES[config.precision]
    offset = outcome.offset
    kind: manifest.Kind = "model" if offset is None else "reward"
    auto = AutoModelForCausalLM if offset is None else AutoModelForSequenceClassification
    lineage = Lineage.of(
        config,
        outcome,
        dtype=str(dtype).removeprefix("torch."),
        total_steps=prepared.info.total_steps,
        versions={name: version(name) for name in _PACKAGES},
    )
    try:
        _write_model(draft, auto, engine.module, weights, prepared, dtype)
        reloaded = _check_reload(draft, auto, weights, dtype)
        if offset is not None:
            reward.write_offset(draft, offset)
        if adapter is not None:
            adapter.check_merged(draft, reloaded)
            adapter.write(folder / f"{draft.name}-adapter", lineage)
        moved = _measure_change(config, engine.module, weights)
        write_card(draft, config, prepared, lineage, outcome, moved, calibrated)
        digest = manifest.seal(draft, kind, lineage.model_dump(mode="json", by_alias=True))
        fence.check()
        if adapter is not None:
            manifest.publish(folder / f"{draft.name}-adapter", folder / "adapter")
        manifest.publish(draft, folder / "model")
    except (OSError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not is_storage_error(error):
            raise
        raise StorageError(
            f"{folder / 'model'}: the result could not be saved: {to_stage_error(error).message}"
        ) from error
    manifest.verify(folder / "model", digest)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    reference.remove(folder)
    rollout_store.remove(folder)
    group.barrier()
    return digest


def _write_model(
    folder: Path,
    auto: Any,
    module: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    prepared: PreparedData,
    dtype: torch.dtype,
) -> None:
    shutil.copytree(prepared.tokenizer_folder, folder)
    with torch.device("meta"):
        model = auto.from_config(module.config, dtype=dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.config.use_cache = True
    settings = [model.config]
    if module.can_generate():
        kept = {key: value for key, value in module.generation_config.to_dict().items() if not key.startswith("_")}
        model.generation_config = GenerationConfig.from_dict(kept)
        settings.append(model.generation_config)
    for setting in settings:
        setting.eos_token_id = _end_id(prepared)
        setting.pad_token_id = prepared.info.padding_id
    model.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and the server runs as another user


def _measure_change(config: TrainConfig, module: PreTrainedModel, weights: dict[str, torch.Tensor]) -> Change | None:
    """How far the weights went; None where they were random at first."""
    if config.model is None:
        return None
    return change.measure(weights, local_path(config.model.uri), module.base_model_prefix)


def _end_id(prepared: PreparedData) -> int:
    """What ends a text of the model: the document separator after `pretrain`, else the end of a turn."""
    info = prepared.info
    return info.document_separator_id if info.type is StageType.PRETRAIN else info.end_of_turn_id


def _check_reload(folder: Path, auto: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Load what was written as anybody would, and compare every tensor with the engine's, bit for bit."""
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=dtype, local_files_only=True)
    reloaded = model.state_dict()
    for name, tensor in weights.items():
        if name not in reloaded or not torch.equal(reloaded[name], tensor):
            raise StorageError(f"{folder}: {name} reads back other than the engine holds it; run the stage again")
    return model
