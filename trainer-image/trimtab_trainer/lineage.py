"""Where a model comes from: the lineage in its manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Self

from trimtab_trainer.checkpoints import Identity, identity
from trimtab_trainer.config import JobIdentity, Metric, TrainConfig
from trimtab_trainer.settings import Contract


@dataclass(frozen=True)
class Outcome:
    """What a stage has done by its end."""

    step: int
    """Optimiser steps done."""
    best_step: int | None
    """The step whose weights are the result, where it is not the last one."""
    tokens: int
    metrics: list[Metric]
    """Of the step whose weights are the result."""
    rows: list[dict[str, Any]]
    """Of `metrics.jsonl`."""
    offset: float | None
    """Of a reward model: taken off its scores."""


class Lineage(Contract):
    """Of a `model` artifact: who made it, of what, how, and what came out."""

    job: JobIdentity
    stage: str
    identity: Identity
    """Type, base digest (absent: random weights), digest of the prepared data, recipe."""
    config_hash: str
    """sha256 of the identity's JSON."""
    dtype: str
    """Of the weights as stored, in torch's words, e.g. `bfloat16`."""
    attempt: int
    step: int
    """Optimiser steps done."""
    total_steps: int | None = None
    """Those that were planned; absent in results of old versions, which did them all."""
    best_step: int | None = None
    """The step whose weights these are, where it is not the last one."""
    tokens: int
    metrics: list[Metric]
    images: dict[str, str]
    versions: dict[str, str]

    @classmethod
    def of(
        cls, config: TrainConfig, outcome: Outcome, *, dtype: str, total_steps: int, versions: dict[str, str]
    ) -> Self:
        """The lineage of what `config` made."""
        what = identity(config)
        return cls(
            job=config.job,
            stage=config.stage,
            identity=what,
            config_hash="sha256:" + hashlib.sha256(what.model_dump_json(by_alias=True).encode()).hexdigest(),
            dtype=dtype,
            attempt=config.attempt,
            step=outcome.step,
            total_steps=total_steps,
            best_step=outcome.best_step,
            tokens=outcome.tokens,
            metrics=outcome.metrics,
            images=config.images,
            versions=versions,
        )

    def is_of(self, config: TrainConfig) -> bool:
        """Whether the same job, stage and inputs made it."""
        return self.job.uid == config.job.uid and self.stage == config.stage and self.identity == identity(config)
