"""The DeepSpeed engine: its configuration, parameter groups and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.engine import universal
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.networks import Network
from trimtab_trainer.engine.quantized import whole
from trimtab_trainer.settings import Optimizer, Precision, Recipe


def engine_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Accumulation is ours (`managed_gradient_accumulation: false`): the loss is scaled to the step's own number of
    tokens, and `gradient_accumulation_steps` stays 1 because DeepSpeed divides by it even so. Gradients accumulate in
    fp32. bf16 with fp32 accumulation needs a sharding optimiser, so ZeRO 0 runs as ZeRO 1 there: the same numbers,
    less memory.
    """
    is_bf16 = config.precision is Precision.BF16
    stage = max(config.zero_stage, 1) if is_bf16 else config.zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": config.recipe.clip_norm if stage else 0.0,
        "steps_per_print": 1 << 60,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": is_bf16},
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and other vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # an adapter has no vectors


def build_optimizer(groups: Iterable[dict[str, Any]], recipe: Recipe) -> torch.optim.Optimizer:
    """Torch's own optimiser; DeepSpeed's need a compiler."""
    if recipe.optimizer is Optimizer.SGD:
        return torch.optim.SGD(groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon)


class Engine:
    """DeepSpeed's engine behind the five verbs that the loop uses."""

    def __init__(self, network: Network, config: TrainConfig) -> None:
        self._recipe = config.recipe
        # frozen weights are the start's, those of 4 bits made again from them bit for bit, so no checkpoint has them
        self._is_adapter = config.lora is not None
        optimizer = build_optimizer(parameter_groups(network, config.recipe.weight_decay), config.recipe)
        self._unsharded_norm: torch.Tensor | None = None
        settings = engine_config(config)
        if settings["zero_optimization"]["stage"] == 0:
            # there DeepSpeed clips but does not tell the norm; the gradients are all-reduced when this hook runs
            optimizer.register_step_pre_hook(self._clip)
        self.deepspeed, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)
        self._optimizer = optimizer
        self.network = network
        self.module: PreTrainedModel = network.model
        self.device: torch.device = self.deepspeed.device

    def outputs(self, batch: MicroBatch) -> torch.Tensor:
        """Forward pass: what the network answers."""
        outputs: torch.Tensor = self.deepspeed(batch)
        return outputs

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of this process's part of the step."""
        self.deepspeed.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Reduce, clip and update; returns the global gradient norm before clipping."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.step()
        norm = self._unsharded_norm if self._unsharded_norm is not None else self.deepspeed.get_global_grad_norm()
        return float(norm)

    def save(self, folder: str, name: str) -> None:
        """Write DeepSpeed's files into `folder/name`; collective."""
        self.deepspeed.save_checkpoint(folder, tag=name, save_latest=False, exclude_frozen_parameters=self._is_adapter)

    def load(self, folder: str, name: str) -> None:
        """Read them; collective. The environment forbids torch to unpickle anything but tensors and these few."""
        with torch.serialization.safe_globals(universal.SAFE):
            self.deepspeed.load_checkpoint(
                folder, tag=name, load_lr_scheduler_states=False, load_module_strict=not self._is_adapter
            )

    def load_resized(self, folder: str, name: str, scratch: Path, group: Group, beat: Callable[[], None]) -> None:
        """Read what another number of processes has written; collective. See `checkpoint.Saved`.

        What is not sharded has no shards to convert. Of what is, DeepSpeed restores the trained weights and what their
        optimiser knows; frozen weights are those that the stage starts from.
        """
        stage = self.deepspeed.zero_optimization_stage()
        if stage == 0:
            self.load(folder, name)
            return
        universal.convert(Path(folder) / name, scratch / name, stage, group, beat)
        own = [{key: value for key, value in each.items() if key != "params"} for each in self._optimizer.param_groups]
        self.deepspeed._config.load_universal_checkpoint = True
        try:
            self.load(str(scratch), name)
        finally:
            self.deepspeed._config.load_universal_checkpoint = False
        # at ZeRO 3 DeepSpeed gives every group the first one's settings, and one counter of steps to all of them
        for each, settings in zip(self._optimizer.param_groups, own, strict=True):
            each.update(settings)
        for state in self._optimizer.state.values():
            state["step"] = state["step"].clone()

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter and persistent buffer, whole, on the CPU of rank 0; empty on the others. Collective."""
        first = self.deepspeed.global_rank == 0
        sharded = self.deepspeed.zero_optimization_stage() == 3
        weights: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                if first:
                    weights[name] = whole(parameter).cpu().clone()
        if first:
            persistent = self.module.state_dict().keys()
            weights.update({name: b.detach().cpu() for name, b in self.module.named_buffers() if name in persistent})
        return weights

    def _clip(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        largest = self._recipe.clip_norm or float("inf")
        self._unsharded_norm = nn.utils.clip_grad_norm_(parameters, largest)
