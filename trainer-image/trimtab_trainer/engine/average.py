"""An exponential moving average of the weights in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.setup import Engine


class WeightAverage:
    """a = decay · a + (1 - decay) · w after each update, from the starting weights on; fp32, in rank 0's host RAM."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """Collective, as `update` is."""
        self._engine, self._decay = engine, decay
        self._first: bool = engine.deepspeed.global_rank == 0
        whole = engine.weights()
        averaged = [name for name, _ in engine.module.named_parameters() if self._first]
        self._weights = {name: whole[name].float() for name in averaged}

    @torch.no_grad()
    def update(self) -> None:
        """Take the engine's present weights in."""
        sharded = self._engine.deepspeed.zero_optimization_stage() == 3
        for name, parameter in self._engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                if self._first:
                    self._weights[name].lerp_(parameter.detach().float().cpu(), 1 - self._decay)

    def weights(self) -> dict[str, torch.Tensor]:
        """The engine's, whole, on rank 0, with the average in the place of each parameter. Collective."""
        weights = self._engine.weights()
        return weights | {name: tensor.to(weights[name].dtype) for name, tensor in self._weights.items()}

    def save(self, folder: str, name: str) -> None:
        """Write it below `folder`."""
        if self._first:
            save_file(self._weights, Path(folder) / f"{name}.safetensors")

    def load(self, folder: str, name: str) -> None:
        """Read it."""
        if self._first:
            self._weights = load_file(Path(folder) / f"{name}.safetensors")

    def load_resized(self, folder: str, name: str, scratch: Path, group: Group, beat: Callable[[], None]) -> None:
        """Read it; it is whole, whatever the number of processes."""
        self.load(folder, name)
