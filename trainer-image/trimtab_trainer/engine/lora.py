"""LoRA: low-rank adapters on frozen weights (Hu et al. 2021), with peft's layers.

The model in training is W + s B A in each target, with W frozen, A random and B zero at first: so at its first step the
model is exactly the one that the stage starts from, and switching the adapter off gives that model at any step. A stage
starts from a merged model and adds an adapter of its own, so that holds in a chain of LoRA stages, too: after a LoRA
`sft`, the frozen weights of `dpo` are those of the `sft` model, not of its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from trimtab_trainer import manifest
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.errors import StageError, TrainingFailed
from trimtab_trainer.lineage import Lineage
from trimtab_trainer.lora_targets import choose_targets, linear_sizes
from trimtab_trainer.settings import Lora

if TYPE_CHECKING:
    from trimtab_trainer.engine.setup import Engine

_ADAPTER = "default"
"""peft's name of an only adapter; it stands in the names of its tensors in memory, not in files."""
_BASE, _A, _B = ".base_layer.", f".lora_A.{_ADAPTER}.", f".lora_B.{_ADAPTER}."
_PEFT_PREFIX = "base_model.model."
"""What names in peft's files begin with."""
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest logit: what merging may change, since W + s B A is rounded to the dtype once more."""


def add_adapter(model: PreTrainedModel, config: TrainConfig, lora: Lora) -> None:
    """Freeze the model and put an adapter beside each target; A is drawn from the stage's seed, the same on each rank.

    Raises:
        BadConfiguration: a target does not exist.
    """
    try:
        targets = choose_targets(lora, linear_sizes(model))
    except StageError as error:
        error.stage = config.stage
        raise
    torch.manual_seed(config.recipe.seed)
    inject_adapter_in_model(_peft_config(config, lora, targets), cast(nn.Module, model), _ADAPTER)


def _peft_config(config: TrainConfig, lora: Lora, targets: list[str]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model.uri if config.model else None,
        r=lora.rank,
        lora_alpha=lora.effective_alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
    )


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The frozen weights alone: the model that the stage started from."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge(weights: Mapping[str, torch.Tensor], scaling: float, *, transposed: bool) -> dict[str, torch.Tensor]:
    """The tensors of the model without adapters: W + s B A, added in fp32 and rounded to the dtype of W once.

    Args:
        weights: of the model with adapters, by name; W [out, in], A [r, in], B [out, r].
        scaling: s = alpha / r.
        transposed: W is stored as [in, out] (GPT-2's Conv1D).
    """
    merged = {}
    for name, tensor in weights.items():
        if _A in name or _B in name:
            continue
        plain = name.replace(_BASE, ".")
        if plain != name and name.endswith(".weight"):
            a, b = (weights[name.replace(_BASE, part)].float() for part in (_A, _B))
            update = scaling * (b @ a)
            tensor = (tensor.float() + (update.T if transposed else update)).to(tensor.dtype)
        merged[plain] = tensor
    return merged


@dataclass(frozen=True)
class Trained:
    """The end of a LoRA stage: what is saved, and how the model in training answers, to compare the saved one with.

    Attributes:
        tensors: of the model with its adapter, by name; empty but on rank 0.
        logits: fp32 [T, V] of the model in training for `_probe_ids`.
        transposed: see `merge`.
    """

    config: TrainConfig
    lora: Lora
    tensors: Mapping[str, torch.Tensor]
    logits: torch.Tensor
    transposed: bool

    @classmethod
    def of(cls, engine: Engine, config: TrainConfig, lora: Lora, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Collective."""
        engine.deepspeed.eval()
        ids = _probe_ids(engine.module).to(engine.device)
        positions = torch.arange(ids.shape[1], device=engine.device)[None]
        with torch.no_grad():
            logits = engine.module(input_ids=ids, position_ids=positions, use_cache=False).logits
        layers = [module for module in engine.module.modules() if isinstance(module, LoraLayer)]
        return cls(config, lora, tensors, logits[0].float().cpu(), any(layer.fan_in_fan_out for layer in layers))

    @property
    def merged(self) -> dict[str, torch.Tensor]:
        """The tensors of the model without adapters."""
        return merge(self.tensors, self.lora.scaling, transposed=self.transposed)

    def check_merged(self, folder: Path, model: PreTrainedModel) -> None:
        """Compare the logits of the saved model with those of the model in training.

        Raises:
            TrainingFailed: they differ by more than rounding.
        """
        with torch.no_grad():
            logits = model.eval()(_probe_ids(model), use_cache=False).logits[0].float()
        moved = float((logits - self.logits).abs().max())
        allowed = _ROUNDING[model.dtype] * float(self.logits.abs().max())
        if not moved <= allowed:
            raise TrainingFailed(
                f"{folder}: merging the adapter changes the logits by {moved:.3g}, rounding explains {allowed:.3g}; "
                "set precision: fp32, or train all weights",
                reason="MergeDiffers",
                stage=self.config.stage,
            )

    def write(self, draft: Path, lineage: Lineage) -> None:
        """Write and seal `adapter/` in peft's format; its lineage names the weights that it belongs to (`base`)."""
        if self.config.model is None:
            raise ValueError("an adapter belongs to a model with weights")
        draft.mkdir(parents=True)
        own = {name: tensor.contiguous() for name, tensor in self.tensors.items() if _A in name or _B in name}
        named = {_PEFT_PREFIX + name.replace(f".{_ADAPTER}.", "."): tensor for name, tensor in own.items()}
        save_file(named, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        settings = _peft_config(self.config, self.lora, sorted({name.split(".")[-4] for name in own}))
        settings.fan_in_fan_out = self.transposed
        settings.inference_mode = True
        settings.save_pretrained(str(draft))
        for file in draft.iterdir():
            file.chmod(0o644)  # as in `model/`: the server runs as another user
        base = {"base": self.config.model.model_dump(mode="json", by_alias=True)}
        manifest.seal(draft, "adapter", lineage.model_dump(mode="json", by_alias=True) | base)


def _probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """int64 [1, 16]: any text."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return (torch.arange(16) * 7 % vocabulary)[None]
