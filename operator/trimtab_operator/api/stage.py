"""Stages: what runs, on what, with which recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimtab_operator.api.base import ApiModel, Quantity, StageName, rules
from trimtab_operator.api.data import (
    DataSource,
    DataSources,
    LossValidation,
    MixtureSources,
    TaskValidation,
)
from trimtab_operator.api.pod import PodShape
from trimtab_operator.api.ppo import Ppo
from trimtab_trainer.settings import (
    Autotune,
    Beta,
    ClipNorm,
    Epochs,
    Epsilon,
    EverySteps,
    GlobalBatchSize,
    GradientCheckpointing,
    Keep,
    LabelSmoothing,
    LearningRate,
    LoraAlpha,
    LoraDropout,
    LoraRank,
    LoraTargets,
    Loss,
    MaxDropped,
    MaxLength,
    MaxSteps,
    MicroBatchSize,
    MinimumLearningRate,
    OnInvalid,
    OnTooLong,
    Optimizer,
    Packing,
    Precision,
    PreferenceBeta,
    PreferenceLoss,
    Quantization,
    ReferenceLogProbs,
    Schedule,
    Seed,
    WarmupRatio,
    WeightDecay,
    ZeroStage,
)

STAGE_TYPES = ("pretrain", "sft", "dpo", "reward", "ppo")


class Train(ApiModel):
    """Hyper-parameters; what is absent takes the trainer's default."""

    epochs: Epochs | None = None
    max_steps: MaxSteps | None = None
    global_batch_size: GlobalBatchSize | None = None
    micro_batch_size: MicroBatchSize | None = None
    optimizer: Optimizer | None = Field(default=None, description="adamw or sgd.")
    learning_rate: LearningRate | None = None
    minimum_learning_rate: MinimumLearningRate | None = None
    schedule: Schedule | None = Field(
        default=None, description="Learning rate after warm-up: cosine, linear or constant."
    )
    warmup_ratio: WarmupRatio | None = None
    beta1: Beta | None = None
    beta2: Beta | None = None
    epsilon: Epsilon | None = None
    weight_decay: WeightDecay | None = None
    clip_norm: ClipNorm | None = None
    seed: Seed | None = None
    gradient_checkpointing: GradientCheckpointing | None = None
    autotune: Autotune | None = None


class Lora(ApiModel):
    """Train a low-rank adapter on frozen weights; the result is merged, and the adapter lies beside it."""

    rank: LoraRank | None = None
    alpha: LoraAlpha | None = None
    dropout: LoraDropout | None = None
    targets: LoraTargets | None = None
    quantization: Quantization | None = Field(
        default=None,
        description="nf4: hold the frozen weights of the adapted layers in 4 bits (QLoRA); needs bitsandbytes in the "
        "trainer's image, and zeroStage 0, 1 or 2. Absent: in the stage's precision.",
    )


class Checkpoint(ApiModel):
    """When to save, and how much to keep."""

    every_steps: EverySteps | None = None
    keep: Keep | None = None


class Parallelism(ApiModel):
    """How the work is spread over processes."""

    zero_stage: ZeroStage | None = None


AUTOTUNE_ALONE = (
    "!has(self.train) || !has(self.train.autotune) || !self.train.autotune || (!has(self.train.microBatchSize)"
    " && (!has(self.parallelism) || !has(self.parallelism.zeroStage)))",
    "train.autotune chooses train.microBatchSize and parallelism.zeroStage; remove these, or autotune",
)


class StageDefaults(PodShape):
    """Fields that any stage may have; `spec.defaults` sets them for all stages."""

    train: Train | None = Field(default=None, description="Hyper-parameters.")
    lora: Lora | None = Field(
        default=None, description="Train a low-rank adapter on frozen weights; absent: all weights."
    )
    checkpoint: Checkpoint | None = Field(default=None, description="When to save, and how much to keep.")
    parallelism: Parallelism | None = Field(default=None, description="How the work is spread over processes.")
    precision: Precision | None = Field(default=None, description="bf16 or fp32; bf16 by default.")
    nodes: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Pods of the stage; 1 by default."
    )
    processes_per_node: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None, description="Training processes in each pod; by default the accelerators in resources, else 1."
    )
    accelerator_memory: Quantity | None = Field(
        default=None,
        description="Memory of each accelerator; prepare refuses a stage that needs more, and names the setting that "
        "would make it fit. Absent: not checked. Without accelerators the limit is that of resources.",
    )
    retries: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="Failed attempts before the stage fails; 3 by default. Preemption is free."
    )
    progress_deadline_seconds: Annotated[int, Field(ge=10, le=604_800)] | None = Field(
        default=None,
        description="No step for so long ends the attempt; by default 10 times the median step, at least 5 minutes.",
    )


class Pretrain(ApiModel):
    """Next-token loss on running text."""

    data: DataSources = Field(description="Text: .txt, or JSONL, CSV or Parquet with a text column.")
    validation: LossValidation | None = Field(default=None, description="Held-out text.")
    max_length: MaxLength | None = None
    on_invalid: OnInvalid | None = Field(default=None, description="fail (default) or drop an invalid record.")
    max_dropped: MaxDropped | None = None


class Sft(ApiModel):
    """Supervised fine-tuning on conversations."""

    data: MixtureSources = Field(description="Conversations, or prompts with completions; several make a mixture.")
    validation: TaskValidation | None = Field(default=None, description="Held-out conversations.")
    loss: Loss | None = Field(
        default=None,
        description="Tokens that bear loss: assistant (every assistant turn, default), completion (the last one), all.",
    )
    max_length: MaxLength | None = None
    packing: Packing | None = None
    on_invalid: OnInvalid | None = Field(default=None, description="fail (default) or drop an invalid record.")
    max_dropped: MaxDropped | None = None
    on_too_long: OnTooLong | None = Field(
        default=None, description="fail (default), truncate or drop a record of more than maxLength tokens."
    )


class Dpo(ApiModel):
    """Direct preference optimisation on pairs of answers; the reference is the stage's starting weights."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            (
                "!has(self.labelSmoothing) || self.labelSmoothing == 0.0 || !has(self.loss) || self.loss != 'ipo'",
                "labelSmoothing belongs to the sigmoid loss; remove it, or use loss: sigmoid",
            )
        )
    }

    data: DataSources = Field(description="Preferences: prompt, chosen and rejected, as text or messages; hh-rlhf.")
    validation: LossValidation | None = Field(default=None, description="Held-out pairs.")
    loss: PreferenceLoss | None = Field(
        default=None, description="sigmoid (DPO, default) or ipo (IPO, with sums of log-probabilities)."
    )
    beta: PreferenceBeta | None = None
    label_smoothing: LabelSmoothing | None = None
    reference_log_probs: ReferenceLogProbs | None = Field(
        default=None,
        description="The reference's log-probabilities: precomputed (once, before the first step), online (in each "
        "step), or auto (default): precomputed where a pair is seen twice or the reference is large.",
    )
    max_length: MaxLength | None = None
    packing: Packing | None = None
    on_invalid: OnInvalid | None = Field(default=None, description="fail (default) or drop an invalid record.")
    max_dropped: MaxDropped | None = None
    on_too_long: OnTooLong | None = Field(
        default=None, description="fail (default), truncate or drop a pair with a text of more than maxLength tokens."
    )


class Reward(ApiModel):
    """A reward model: a scalar head on the model that the stage starts from, trained on compared answers."""

    data: DataSources = Field(
        description="Preferences: prompt, chosen and rejected; or rankings: prompt, completions and ranks."
    )
    validation: LossValidation | None = Field(default=None, description="Held-out comparisons.")
    demonstrations: DataSources | None = Field(
        default=None,
        description="Conversations, or prompts with completions, each scored after its last answer; the mean score "
        "becomes the offset, so that they have a mean reward of 0. All records count the same. Absent: the best "
        "answers of data.",
    )
    max_length: MaxLength | None = None
    packing: Packing | None = None
    on_invalid: OnInvalid | None = Field(default=None, description="fail (default) or drop an invalid record.")
    max_dropped: MaxDropped | None = None
    on_too_long: OnTooLong | None = Field(
        default=None, description="fail (default), truncate or drop a record with a text of more than maxLength tokens."
    )


Task = Pretrain | Sft | Dpo | Reward | Ppo

STAGE_RULES = (
    (
        f"[{', '.join(f'has(self.{kind})' for kind in STAGE_TYPES)}].exists_one(x, x)",
        f"set exactly one stage type: {', '.join(STAGE_TYPES[:-1])} or {STAGE_TYPES[-1]}",
    ),
)


class Stage(StageDefaults):
    """One step of the pipeline. Exactly one stage type is set."""

    name: StageName = Field(description="Unique in this job; a DNS label.")
    from_: StageName | None = Field(
        default=None, alias="from", description="Earlier stage whose result this one starts from; absent: spec.model."
    )
    pretrain: Pretrain | None = Field(default=None, description="Next-token loss on running text.")
    sft: Sft | None = Field(default=None, description="Supervised fine-tuning on conversations.")
    dpo: Dpo | None = Field(default=None, description="Direct preference optimisation on pairs of answers.")
    reward: Reward | None = Field(default=None, description="A reward model from compared answers.")
    ppo: Ppo | None = Field(default=None, description="Proximal policy optimisation against a reward.")

    @property
    def task(self) -> Task | None:
        """What the stage does; None where no stage type is set."""
        return self.pretrain or self.sft or self.dpo or self.reward or self.ppo

    @property
    def sources(self) -> list[DataSource]:
        """Every data set that the stage names."""
        task = self.task
        if task is None:
            return []
        held_out = (task.validation and task.validation.data) or []
        mix = self.ppo and self.ppo.pretraining_mix
        shown = (self.reward and self.reward.demonstrations) or []
        return [*task.data, *held_out, *(mix.data if mix else []), *shown]
