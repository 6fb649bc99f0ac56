"""Which sampler a stage asked for."""

from __future__ import annotations

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.rollout import Sampler
from trimtab_trainer.engine.rollout_transformers import TransformersSampler
from trimtab_trainer.engine.rollout_vllm import VllmSampler
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Rollout, RolloutEngine


def build_sampler(
    engine: Engine, group: Group, prepared: PreparedData, config: TrainConfig, rollout: Rollout
) -> Sampler:
    """The stage's sampler; collective."""
    info = prepared.info
    if rollout.engine is RolloutEngine.VLLM:
        return VllmSampler(engine, config, info, rollout)
    return TransformersSampler(
        engine,
        rollout,
        config.recipe.seed,
        info.end_of_turn_id,
        info.padding_id,
        config.recipe.micro_batch_size,
        group.size,
    )
