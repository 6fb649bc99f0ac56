"""The `ppo` stage: what it learns from, and how."""

from __future__ import annotations

from pydantic import Field

from trimtab_operator.api.base import ApiModel, StageName, rules
from trimtab_operator.api.data import DataSource, DataSources, Validation
from trimtab_operator.api.verifier import Verifier
from trimtab_trainer.ppo_settings import (
    ClipRange,
    Discount,
    EmaDecay,
    GaeLambda,
    GamedPatience,
    GpuMemoryUtilization,
    ImportanceCap,
    KlCoefficient,
    KlHorizon,
    KlMaximum,
    KlTarget,
    MaxNewTokens,
    Minibatches,
    MinimumFall,
    MissingEndReward,
    Passes,
    PretrainingCoefficient,
    PretrainingRows,
    RolloutEngine,
    Sleep,
    Temperature,
    ValueClipRange,
)
from trimtab_trainer.settings import LearningRate, MaxDropped, MaxLength, OnInvalid

HELD_OUT = "validation.earlyStopping.heldOutRewardFrom"
HAS_HELD_OUT = "has({0}.validation) && has({0}.validation.earlyStopping)"
"""CEL: whether a `ppo` has it."""


class KlPenalty(ApiModel):
    """What holds the policy to its starting weights."""

    coefficient: KlCoefficient | None = None
    target: KlTarget | None = None
    horizon: KlHorizon | None = None
    maximum: KlMaximum | None = None


class Vllm(ApiModel):
    """Of sampling with vLLM."""

    gpu_memory_utilization: GpuMemoryUtilization | None = None
    sleep: Sleep | None = None
    importance_cap: ImportanceCap | None = None


class PpoRollout(ApiModel):
    """How answers are sampled."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            (
                "!has(self.vllm) || (has(self.engine) && self.engine == 'vllm')",
                "rollout.vllm belongs to engine: vllm; set that, or remove it",
            )
        )
    }

    engine: RolloutEngine | None = Field(
        default=None, description="transformers (the model in training itself, default) or vllm, an engine beside it."
    )
    vllm: Vllm | None = Field(default=None, description="Of engine: vllm.")
    max_new_tokens: MaxNewTokens | None = None
    temperature: Temperature | None = None
    missing_end_reward: MissingEndReward | None = None


class Critic(ApiModel):
    """The model of the value; it starts from the reward model, else from the stage's weights with a head of zeros."""

    learning_rate: LearningRate | None = None


class PretrainingMix(ApiModel):
    """PPO-ptx: gradients of a language model are added to those of each update, before clipping."""

    data: DataSources = Field(
        description="Running text, or conversations, of which the assistant's turns bear loss; longer ones than "
        "maxLength are cut."
    )
    coefficient: PretrainingCoefficient
    rows_per_update: PretrainingRows | None = None


class Ema(ApiModel):
    """An exponential moving average of the policy's weights, from the starting weights on."""

    decay: EmaDecay | None = None


class HeldOutReward(ApiModel):
    """Stop where the reward rises and the score of another reward model falls: the policy is gaming its reward."""

    held_out_reward_from: StageName = Field(
        description="Earlier stage of type reward, whose model scores the answers to held-out prompts, and from which "
        "nothing learns. The result has the weights of the measurement with its highest score."
    )
    patience: GamedPatience | None = None
    minimum_fall: MinimumFall | None = None


class PromptValidation(Validation):
    """Held-out prompts; the answers to them can end the stage."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            ("has(self.data) != has(self.fraction)", "give exactly one of data and fraction"),
            (
                "!has(self.earlyStopping) || has(self.everySteps)",
                "earlyStopping compares measurements of the held-out score; add everySteps",
            ),
        )
    }

    early_stopping: HeldOutReward | None = Field(
        default=None,
        description="Let another reward model watch, and stop where the reward is gamed; absent: train to the last "
        "step, whose weights are the result.",
    )


class Ppo(ApiModel):
    """Proximal policy optimisation: the model answers prompts, and learns from the scores of its answers."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            ("has(self.rewardFrom) != has(self.verifier)", "give exactly one of rewardFrom and verifier"),
            (
                f"!has(self.rewardFrom) || !({HAS_HELD_OUT.format('self')}) || self.{HELD_OUT} != self.rewardFrom",
                "earlyStopping.heldOutRewardFrom must name another stage than rewardFrom: what the policy learns from "
                "can't watch it",
            ),
        )
    }

    reward_from: StageName | None = Field(
        default=None, description="Earlier stage of type reward, whose model scores the answers."
    )
    verifier: Verifier | None = Field(
        default=None, description="Says whether an answer is right, without a model; in place of rewardFrom."
    )
    prompts: DataSources = Field(
        description="Prompts, or conversations, whose last answer is left off; with a verifier that compares, each "
        "record has the reference in a field beside."
    )
    validation: PromptValidation | None = Field(default=None, description="Held-out prompts.")
    kl: KlPenalty | None = Field(default=None, description="What holds the policy to its starting weights.")
    rollout: PpoRollout | None = Field(default=None, description="How answers are sampled.")
    critic: Critic | None = Field(default=None, description="The model of the value.")
    minibatches: Minibatches | None = None
    passes: Passes | None = None
    clip_range: ClipRange | None = None
    value_clip_range: ValueClipRange | None = None
    discount: Discount | None = None
    gae_lambda: GaeLambda | None = None
    pretraining_mix: PretrainingMix | None = Field(
        default=None, description="Data whose next-token loss is learnt beside, against forgetting (PPO-ptx)."
    )
    ema: Ema | None = Field(default=None, description="Average the policy's weights; the average becomes the result.")
    max_length: MaxLength | None = None
    on_invalid: OnInvalid | None = Field(default=None, description="fail (default) or drop an invalid record.")
    max_dropped: MaxDropped | None = None

    @property
    def data(self) -> list[DataSource]:
        """The prompts, as other tasks name their data."""
        return self.prompts

    @property
    def held_out_reward_from(self) -> str | None:
        """The stage whose reward model watches, if one does."""
        stopping = self.validation and self.validation.early_stopping
        return stopping.held_out_reward_from if stopping else None

    @property
    def reward_stages(self) -> list[str]:
        """The stages whose reward models score the answers."""
        return [name for name in (self.reward_from, self.held_out_reward_from) if name is not None]
