"""`spec.defaults` under a stage: what the stage really runs with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab_operator.api import ppo as api
from trimtab_operator.api.finetunejob import FineTuneJobSpec
from trimtab_operator.api.stage import STAGE_TYPES, Stage, Task
from trimtab_operator.core.quantity import number
from trimtab_trainer.config import StageType
from trimtab_trainer.ppo_settings import Ppo
from trimtab_trainer.settings import Checkpoint, Lora, Precision, Recipe

DEFAULT_RETRIES = 3
_ACCELERATORS = ("nvidia.com/", "amd.com/", "gpu.intel.com/", "habana.ai/")
"""Prefixes of the extended resources on which one training process runs each."""


@dataclass(frozen=True)
class Effective:
    """A stage with the defaults merged in and every default value filled."""

    stage: Stage
    type: StageType
    task: Task
    nodes: int
    processes: int
    """In each pod."""
    retries: int
    recipe: Recipe
    lora: Lora | None
    ppo: Ppo | None
    checkpoint: Checkpoint
    precision: Precision
    zero_stage: int
    autotune: bool

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name

    def threads(self, fallback: int) -> int:
        """OMP_NUM_THREADS of each process: its share of the CPU limit; `fallback` where there is no limit."""
        limit = ((self.stage.resources and self.stage.resources.limits) or {}).get("cpu")
        return max(1, math.floor(number(limit) / self.processes)) if limit else fallback


def _ppo(task: api.Ppo) -> Ppo:
    given = task.model_dump(exclude_none=True, exclude={"pretraining_mix": {"data"}})
    stopping = task.validation and task.validation.early_stopping
    if stopping:
        given["early_stopping"] = stopping.model_dump(exclude_none=True, exclude={"held_out_reward_from"})
    return Ppo.model_validate({name: given[name] for name in Ppo.model_fields if name in given})


def deep_merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; maps merge key by key, lists and scalars replace.

    >>> deep_merge({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2, 3]})
    {'a': {'x': 1, 'y': 3}, 'b': [2, 3]}
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = deep_merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def effective(spec: FineTuneJobSpec) -> tuple[Effective, ...]:
    """The stages of a job in its order; ValueError (pydantic's) where merged values break a bound."""
    defaults = spec.defaults.model_dump(by_alias=True, exclude_none=True) if spec.defaults else {}
    return tuple(
        _effective(Stage.model_validate(deep_merge(defaults, stage.model_dump(by_alias=True, exclude_none=True))))
        for stage in spec.stages
    )


def accelerators(stage: Stage) -> int:
    """Accelerators in the limits of one pod."""
    limits = (stage.resources and stage.resources.limits) or {}
    return sum(int(number(value)) for name, value in limits.items() if name.startswith(_ACCELERATORS))


def process_memory(stage: Effective) -> int | None:
    """Bytes that a training process may take: of its accelerator, or its part of the pod's; None where no limit is."""
    asked = stage.stage.accelerator_memory
    if accelerators(stage.stage):
        return int(number(asked)) if asked else None
    limit = ((stage.stage.resources and stage.stage.resources.limits) or {}).get("memory")
    return math.floor(number(limit) / stage.processes) if limit else None


def _effective(stage: Stage) -> Effective:
    task = stage.task
    if task is None:
        raise ValueError(f"stage {stage.name}: no stage type is set")
    return Effective(
        stage=stage,
        type=StageType(next(name for name in STAGE_TYPES if getattr(stage, name) is not None)),
        task=task,
        nodes=stage.nodes or 1,
        processes=stage.processes_per_node or accelerators(stage) or 1,
        retries=DEFAULT_RETRIES if stage.retries is None else stage.retries,
        recipe=Recipe.model_validate(
            stage.train.model_dump(exclude_none=True, exclude={"autotune"}) if stage.train else {}
        ),
        ppo=_ppo(stage.ppo) if stage.ppo else None,
        lora=Lora.model_validate(stage.lora.model_dump(exclude_none=True)) if stage.lora else None,
        checkpoint=Checkpoint.model_validate(
            stage.checkpoint.model_dump(exclude_none=True) if stage.checkpoint else {}
        ),
        precision=stage.precision or Precision.BF16,
        zero_stage=(stage.parallelism and stage.parallelism.zero_stage) or 0,
        autotune=bool(stage.train and stage.train.autotune),
    )
