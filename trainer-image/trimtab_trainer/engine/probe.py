"""Measures one micro-batch size for `train.autotune`: real steps of the stage on its longest rows, by one process.

Memory that sharding over the stage's processes will save is not measured but estimated:

    need(z, W) = estimate(z, W) + (measured - estimate(0, 1))

z the ZeRO stage, W processes. Where the optimiser's states of the whole model don't fit into one process, the steps are
plain gradient descent, in the measurement and in the estimate that it is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from trimtab_trainer.config import PrepareStage, TrainConfig, dump
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.batches import Step
from trimtab_trainer.engine.build import build_loop
from trimtab_trainer.engine.checkpoint import seed_all
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.memory import memory_of, memory_size
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import InputMissing, Preempted
from trimtab_trainer.prepare.estimate import phases_of
from trimtab_trainer.prepare.memory import Phases
from trimtab_trainer.prepare.remedies import room
from trimtab_trainer.prepare.shape import model_shape
from trimtab_trainer.progress.heartbeat import Pulse
from trimtab_trainer.settings import Optimizer
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.supervisor.run_folder import RunFolder
from trimtab_trainer.tuning import Measured
from trimtab_trainer.volumes import local_path

STEPS = 3
"""That are timed, after one that is not."""
_NO_CHANGE = 1e-12
"""Learning rate: the weights must not run away."""


def probe(config: TrainConfig, run: RunFolder, out: Path, told_to_stop: Callable[[], bool]) -> None:
    """Measure the micro-batch size of `config` and write what was found to `out`.

    Args:
        config: of the stage; its folder is one for the measurement alone.
        run: of the attempt.
        out: takes a `Measured`.
        told_to_stop: asked in each step.

    Raises:
        Preempted: told to stop.
    """
    group, pulse = Group(), Pulse(run.heartbeat)
    plan = Plan(config, PreparedData(local_path(config.prepared.uri)), group.device)
    fence = Fence(local_path(config.folder), config.attempt)
    memory = memory_of(group.device)
    before = memory.used()
    memory.reset()
    engine = Engine(load_model(plan.config, plan.rows, verify=False), plan.config)
    seed_all(config.recipe.seed, group.rank)
    loop = build_loop(plan.config, group, plan.rows, engine, fence, told_to_stop, pulse.beat)
    times = []
    for index in range(1 + STEPS):
        started = time.perf_counter()
        result = loop.step(Step(index, 0, 0, plan.count, plan.count))
        times.append(time.perf_counter() - started)
        pulse.beat()
        if result.stop:
            raise Preempted("told to stop while measuring for train.autotune; nothing is lost", stage=config.stage)
    found = plan.measured(median(times[1:]) / plan.count, memory.peak() - before)
    out.write_text(dump(found), encoding="utf-8")


class Plan:
    """What is run to measure a size, and what the stage will need by it."""

    def __init__(self, config: TrainConfig, prepared: PreparedData, device: torch.device) -> None:
        if prepared.model_config is None:
            raise InputMissing(f"{prepared.folder}: model_config.json is not there; prepare again", stage=config.stage)
        self._size = config.recipe.micro_batch_size
        self._world = config.nodes * config.processes_per_node
        self._share = -(-config.recipe.global_batch_size // self._world)
        self.count = min(2 * self._size, self._share)
        """Rows of a step: two micro-batches, where the stage has as many."""
        accelerator = device.type == "cuda"
        total = memory_size(device) if accelerator else config.process_memory_bytes
        total = total or memory_size(device) // config.processes_per_node
        self._limit = room(total, accelerator=accelerator)
        self.rows = prepared.with_longest(self.count, steps=1 + STEPS)
        self._stage = PrepareStage(
            name=config.stage, type=config.type, data=[], recipe=config.recipe, lora=config.lora, ppo=config.ppo,
            precision=config.precision, max_length=prepared.info.max_length, accelerator=accelerator,
            process_memory_bytes=total, world_size=self._world,
            held_out_reward_stage="another" if config.held_out_reward else None,
        )  # fmt: skip
        longest = len(self.rows.row(0, 0).input_ids) + self._stage.max_new_tokens
        if prepared.pretraining_mix is not None:
            mixed = prepared.pretraining_mix.with_longest(1, steps=1)
            longest = max(longest, len(mixed.row(0, 0).input_ids))
        self._phases = phases_of(model_shape(prepared.model_config), prepared.model_config, longest)
        self._optimizer = config.recipe.optimizer
        if self._alone(self._size).training > self._limit:
            self._optimizer = Optimizer.SGD
        recipe = config.recipe.model_copy(update={"learning_rate": _NO_CHANGE, "optimizer": self._optimizer})
        self.config = config.model_copy(update={"recipe": recipe})

    def measured(self, seconds_per_row: float, memory_bytes: int) -> Measured:
        """With what follows for the stage."""
        error = memory_bytes - self._alone(self._size).training
        needs = [self._phases(self._stage.model_copy(update={"zero_stage": zero})) for zero in self._zero_stages()]
        return Measured(
            micro_batch_size=self._size,
            seconds_per_row=seconds_per_row,
            memory_bytes=memory_bytes,
            needs=[max(need.training + error, need.publishing) for need in needs],
            limit_bytes=self._limit,
            may_double=self._alone(2 * self._size).training + error <= self._limit,
        )

    def _alone(self, size: int) -> Phases:
        """The estimate of one process without sharding, for a step of two micro-batches."""
        update = {
            "micro_batch_size": size,
            "global_batch_size": min(2 * size, self._share),
            "optimizer": self._optimizer,
        }
        recipe = self._stage.recipe.model_copy(update=update)
        return self._phases(self._stage.model_copy(update={"recipe": recipe, "world_size": 1, "zero_stage": 0}))

    def _zero_stages(self) -> range:
        if self._world == 1:
            return range(1)
        return range(3 if self._stage.lora is not None and self._stage.lora.quantization is not None else 4)
