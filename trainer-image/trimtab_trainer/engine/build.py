"""What each stage type trains with: its loop, its objective, and the models besides the one in training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.experience import Models
from trimtab_trainer.engine.loop import Loop
from trimtab_trainer.engine.lora import adapter_off
from trimtab_trainer.engine.model import frozen, load_critic, load_reference, load_scorer, make_trainable
from trimtab_trainer.engine.networks import Scorer
from trimtab_trainer.engine.objectives import Forward, NextToken, Objective, Pairwise, Ranked, RecordedPairwise
from trimtab_trainer.engine.ppo import PpoLoop
from trimtab_trainer.engine.reference import Recorder
from trimtab_trainer.engine.reward import Reward, RewardModel
from trimtab_trainer.engine.rollout_store import RolloutStore
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.engine.verified import VerifiedReward
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import Ppo
from trimtab_trainer.settings import Preference
from trimtab_trainer.supervisor.fence import Fence


def build_loop(
    config: TrainConfig,
    group: Group,
    prepared: PreparedData,
    engine: Engine,
    fence: Fence,
    told_to_stop: Callable[[], bool],
    beat: Callable[[], None],
) -> Loop | PpoLoop:
    """What makes the steps of the stage's type, around the model in training.

    `beat` is called while this takes long.

    Raises:
        BadConfiguration: the stage's JSON lacks a model that the type needs.
    """
    if config.type is not StageType.PPO:
        is_dpo = config.type is StageType.DPO
        recorder = Recorder(config, group, prepared, fence, told_to_stop, beat) if is_dpo else None
        objective = build_objective(config, group, engine, recorder)
        return Loop(engine, group, prepared, config, objective, told_to_stop)
    if config.reference is None or config.ppo is None:
        raise BadConfiguration("a ppo stage needs reference and ppo", stage=config.stage)
    critic, reward, offset = _critic_and_reward(config, config.ppo, config.reference, prepared, group)
    make_trainable(critic.model, config)
    models = Models(
        actor=engine,
        critic=Engine(critic, config),
        reference=_reference(config, config.reference, group, engine),
        reward=reward,
        offset=offset,
        held_out=_held_out(config, group),
    )
    rollouts = RolloutStore(config, group, prepared, fence)
    return PpoLoop(models, group, prepared, config, config.ppo, rollouts, told_to_stop)


def _critic_and_reward(
    config: TrainConfig, ppo: Ppo, start: Artifact, prepared: PreparedData, group: Group
) -> tuple[Scorer, Reward, float]:
    """What gives values and what scores answers, and by what their scales differ.

    With a verifier the critic starts from the stage's own weights and the value 0.
    """
    verify = group.is_first_of_pod
    if ppo.verifier is not None:
        critic = load_critic(start, config.precision, verify=verify)
        return critic, VerifiedReward(ppo.verifier, prepared), 0.0
    if config.reward is None:
        raise BadConfiguration("a ppo stage needs reward, or ppo.verifier", stage=config.stage)
    critic, offset = load_scorer(config.reward, config.precision, verify=verify)
    judge, _ = load_scorer(config.reward, config.precision, verify=False)
    return critic, RewardModel(frozen(judge, group.device), offset), offset


def _held_out(config: TrainConfig, group: Group) -> RewardModel | None:
    """The reward model that watches, where there is one."""
    if config.held_out_reward is None:
        return None
    scorer, offset = load_scorer(config.held_out_reward, config.precision, verify=group.is_first_of_pod)
    return RewardModel(frozen(scorer, group.device), offset)


def build_objective(config: TrainConfig, group: Group, engine: Engine, recorder: Recorder | None = None) -> Objective:
    """The loss of the stage's type, with the models that it needs besides the one in training.

    `recorder`: computes what `dpo` needs of its reference once, where that pays; without one the reference is asked in
    each step.

    Raises:
        BadConfiguration: the stage's JSON names no reference.
    """
    if config.type is StageType.REWARD:
        return Ranked()
    if config.type is not StageType.DPO:
        return NextToken()
    if config.reference is None or config.preference is None:
        raise BadConfiguration("a dpo stage needs reference and preference", stage=config.stage)
    online = partial(_online, config, config.reference, config.preference, group, engine)
    if recorder is None or not recorder.pays:
        return online()
    return RecordedPairwise(recorder.recorded(lambda: online().reference_log_probs), config.preference)


def _online(config: TrainConfig, reference: Artifact, preference: Preference, group: Group, engine: Engine) -> Pairwise:
    return Pairwise(_reference(config, reference, group, engine), preference)


def _reference(config: TrainConfig, reference: Artifact, group: Group, engine: Engine) -> Forward:
    """The frozen weights below an adapter are the reference where the stage starts from it: no second copy then."""
    if config.lora is None or reference != config.model:
        return load_reference(reference, config, group.device, verify=group.is_first_of_pod)

    def switched_off(batch: MicroBatch) -> torch.Tensor:
        with adapter_off(engine.module):
            return engine.outputs(batch)

    return switched_off
