"""What each stage type trains with: its loop, its objective, and the models besides the one in training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimtab_trainer.config import StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.experience import Models
from trimtab_trainer.engine.loop import Loop
from trimtab_trainer.engine.lora import adapter_off
from trimtab_trainer.engine.model import frozen, load_reference, load_scorer
from trimtab_trainer.engine.objectives import NextToken, Objective, Pairwise, Ranked
from trimtab_trainer.engine.ppo import PpoLoop
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import BadConfiguration


def build_loop(
    config: TrainConfig, group: Group, prepared: PreparedData, engine: Engine, told_to_stop: Callable[[], bool]
) -> Loop | PpoLoop:
    """What makes the steps of the stage's type, around the model in training.

    Raises:
        BadConfiguration: the stage's JSON lacks a model that the type needs.
    """
    if config.type is not StageType.PPO:
        return Loop(engine, group, prepared, config, build_objective(config, group, engine), told_to_stop)
    if config.reference is None or config.reward is None or config.ppo is None:
        raise BadConfiguration("a ppo stage needs reference, reward and ppo", stage=config.stage)
    verify = group.is_first_of_pod
    critic, offset = load_scorer(config.reward, config.precision, verify=verify)
    if config.recipe.gradient_checkpointing:
        critic.model.gradient_checkpointing_enable({"use_reentrant": False})
    judge, _ = load_scorer(config.reward, config.precision, verify=False)
    models = Models(
        actor=engine,
        critic=Engine(critic, config),
        reference=load_reference(config.reference, config, group.device, verify=verify),
        reward=frozen(judge, group.device),
        offset=offset,
    )
    return PpoLoop(models, group, prepared, config, config.ppo, told_to_stop)


def build_objective(config: TrainConfig, group: Group, engine: Engine) -> Objective:
    """The loss of the stage's type, with the models that it needs besides the one in training.

    The frozen weights below an adapter are the reference of `dpo` where the stage starts from it: no second copy then.

    Raises:
        BadConfiguration: the stage's JSON names no reference.
    """
    if config.type is StageType.REWARD:
        return Ranked()
    if config.type is not StageType.DPO:
        return NextToken()
    if config.reference is None or config.preference is None:
        raise BadConfiguration("a dpo stage needs reference and preference", stage=config.stage)
    if config.lora is not None and config.reference == config.model:

        def switched_off(batch: MicroBatch) -> torch.Tensor:
            with adapter_off(engine.module):
                return engine.outputs(batch)

        return Pairwise(switched_off, config.preference)
    model = load_reference(config.reference, config, group.device, verify=group.is_first_of_pod)

    return Pairwise(model, config.preference)
