"""An exponential moving average of the weights in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import torch
from safetensors.torch import load_file, save_file

from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.setup import Engine


class WeightAverage:
    """a = decay · a + (1 - decay) · w after each update, from the starting weights on; fp32, in rank 0's host RAM.

    Of the weights that are trained: with an adapter, of A and of B.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        """Collective, as all but `save` and `load` is."""
        self._engine, self._decay = engine, decay
        self._first: bool = engine.deepspeed.global_rank == 0
        self._weights = {name: p.detach().float().cpu().clone() for name, p in self._trained() if self._first}

    @torch.no_grad()
    def update(self) -> None:
        """Take the engine's present weights in."""
        for name, parameter in self._trained():
            if self._first:
                self._weights[name].lerp_(parameter.detach().float().cpu(), 1 - self._decay)

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the average in the place of the engine's weights, rounded to their dtype; its training is over."""
        for name, parameter in self._trained(writer=0):
            if self._first:
                parameter.copy_(self._weights[name])

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

    def _trained(self, writer: int | None = None) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Each parameter that is trained, whole while it is at hand; what the rank `writer` writes, all ranks get."""
        sharded = self._engine.deepspeed.zero_optimization_stage() == 3
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=writer, enabled=sharded):
                yield name, parameter
            if writer is not None and not sharded:
                torch.distributed.broadcast(parameter.data, writer)
