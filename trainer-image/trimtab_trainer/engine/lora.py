"""LoRA: low-rank adapters on frozen weights (Hu et al. 2021), with peft's layers.

The model in training is W + s B A in each target, with W frozen, A random and B zero at first: so at its first step the
model is exactly the one that the stage starts from, and switching the adapter off gives that model at any step. A stage
starts from a merged model and adds an adapter of its own, so that holds in a chain of LoRA stages, too: after a LoRA
`sft`, the frozen weights of `dpo` are those of the `sft` model, not of its base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from trimtab_trainer.config import StageType, TrainConfig
from trimtab_trainer.engine.quantized import quantize
from trimtab_trainer.errors import StageError, TrainingFailed
from trimtab_trainer.lineage import Lineage
from trimtab_trainer.lora_targets import choose_targets, linear_sizes
from trimtab_trainer.settings import Lora

if TYPE_CHECKING:
    from trimtab_trainer.engine.setup import Engine

_ADAPTER = "default"
"""peft's name of an only adapter; it stands in the names of its tensors in memory, not in files."""
_BASE, _A, _B = ".base_layer.", f".lora_A.{_ADAPTER}.", f".lora_B.{_ADAPTER}."
_HEAD = "score."
"""Of a reward model."""
_PEFT_PREFIX = "base_model.model."
"""What names in peft's files begin with."""
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest logit: what merging may change, since W + s B A is rounded to the dtype once more."""


def add_adapter(model: PreTrainedModel, config: TrainConfig, lora: Lora) -> None:
    """Freeze the model and put an adapter beside each target; A is drawn from the stage's seed, the same on each rank.

    A reward model's head is new, and a critic's has to learn another quantity: a head is trained whole.

    Raises:
        BadConfiguration: a target does not exist.
    """
    try:
        targets = choose_targets(lora, linear_sizes(model))
    except StageError as error:
        error.stage = config.stage
        raise
    if lora.quantization is not None:
        quantize(model, targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.recipe.seed)
        inject_adapter_in_model(_peft_config(config, lora, targets), cast(nn.Module, model), _ADAPTER)
    for name, parameter in model.named_parameters():
        if name.startswith(_HEAD):
            parameter.requires_grad = True


def _peft_config(config: TrainConfig, lora: Lora, targets: list[str]) -> LoraConfig:
    return LoraConfig(
        task_type="SEQ_CLS" if config.type is StageType.REWARD else "CAUSAL_LM",
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


def unmerged(weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Each tensor of the model without adapters, by its name there, as what it is made of: W, A and B, or itself alone.

    `weights`: of the model in training, with or without adapters, by name.
    """
    for name, tensor in weights.items():
        if _A in name or _B in name:
            continue
        plain = name.replace(_BASE, ".")
        is_adapted = plain != name and name.endswith(".weight")
        added = [weights[name.replace(_BASE, part)] for part in (_A, _B)] if is_adapted else []
        yield plain, [tensor, *added]


def merge(parts: Sequence[torch.Tensor], scaling: float, *, transposed: bool) -> torch.Tensor:
    """W + s B A, added in fp32 and rounded to the dtype of W once; W itself where that is all.

    Args:
        parts: W [out, in], A [r, in], B [out, r]; or W alone.
        scaling: s = alpha / r.
        transposed: W is stored as [in, out] (GPT-2's Conv1D).
    """
    weight, *added = parts
    if not added:
        return weight
    a, b = (each.float() for each in added)
    update = scaling * (b @ a)
    return (weight.float() + (update.T if transposed else update)).to(weight.dtype)


def is_transposed(model: nn.Module) -> bool:
    """See `merge`; of a model with adapters."""
    return any(module.fan_in_fan_out for module in model.modules() if isinstance(module, LoraLayer))


@dataclass(frozen=True)
class Trained:
    """The end of a LoRA stage: what is saved, and how the model in training answers, to compare the saved one with.

    Attributes:
        tensors: of the model with its adapter, by name; empty but on rank 0.
        answers: of the model in training, see `_answers`.
        transposed: see `merge`.
    """

    config: TrainConfig
    lora: Lora
    tensors: Mapping[str, torch.Tensor]
    answers: torch.Tensor
    transposed: bool

    @classmethod
    def of(cls, engine: Engine, config: TrainConfig, lora: Lora, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Collective."""
        engine.deepspeed.eval()
        return cls(config, lora, tensors, _answers(engine.module, engine.device), is_transposed(engine.module))

    @property
    def merged(self) -> dict[str, torch.Tensor]:
        """The tensors of the model without adapters."""
        scaling = self.lora.scaling
        return {name: merge(parts, scaling, transposed=self.transposed) for name, parts in unmerged(self.tensors)}

    def check_merged(self, folder: Path, model: PreTrainedModel) -> None:
        """Compare what the saved model answers with what the model in training does.

        Raises:
            TrainingFailed: they differ by more than rounding.
        """
        moved = float((_answers(model.eval(), torch.device("cpu")) - self.answers).abs().max())
        allowed = _ROUNDING[model.dtype] * float(self.answers.abs().max())
        if not moved <= allowed:
            raise TrainingFailed(
                f"{folder}: merging the adapter changes its answers by {moved:.3g}, rounding explains {allowed:.3g}; "
                "set precision: fp32, or train all weights",
                reason="MergeDiffers",
                stage=self.config.stage,
            )

    def write(self, draft: Path, lineage: Lineage) -> None:
        """Write and seal `adapter/` in peft's format; its lineage names the weights that it belongs to (`base`)."""
        if self.config.model is None:
            raise ValueError("an adapter belongs to a model with weights")
        draft.mkdir(parents=True)
        added = [name for name in self.tensors if _A in name or _B in name]
        heads = [name for name in self.tensors if name.startswith(_HEAD)]
        own = {name: self.tensors[name].contiguous() for name in (*added, *heads)}
        named = {_PEFT_PREFIX + name.replace(f".{_ADAPTER}.", "."): tensor for name, tensor in own.items()}
        save_file(named, draft / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        settings = _peft_config(self.config, self.lora, sorted({name.split(".")[-4] for name in added}))
        settings.fan_in_fan_out = self.transposed
        settings.inference_mode = True
        settings.modules_to_save = [_HEAD.removesuffix(".")] if heads else None
        settings.save_pretrained(str(draft))
        for file in draft.iterdir():
            file.chmod(0o644)  # as in `model/`: the server runs as another user
        base = {"base": self.config.model.model_dump(mode="json", by_alias=True)}
        manifest.seal(draft, "adapter", lineage.model_dump(mode="json", by_alias=True) | base)


@torch.no_grad()
def _answers(model: PreTrainedModel, device: torch.device) -> torch.Tensor:
    """For 16 tokens of any text: logits, fp32 [16, V], or a reward model's scores, fp32 [16, 1]; on the CPU."""
    vocabulary: int = model.config.get_text_config().vocab_size
    ids = (torch.arange(16, device=device) * 7 % vocabulary)[None]
    positions = torch.arange(16, device=device)[None]
    if not hasattr(model, "score"):
        logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits[0].float().cpu()
    # not `logits`: those are one number, of a token that is chosen by the padding token's id
    hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)[0]
    scores: torch.Tensor = cast(nn.Module, model.score)(hidden)
    return scores[0].float().cpu()
