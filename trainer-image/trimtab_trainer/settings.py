"""The recipe of a stage: hyper-parameters with their bounds, descriptions and defaults.

Each bound and description is said once, as an annotated type, and used twice: in the custom resource,
where every field may be absent, and in the stage contract, where the default applies. Imports no torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Contract(BaseModel):
    """A closed, frozen model whose JSON keys are camelCase; an unknown key is an error."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Precision(StrEnum):
    """Number format of weights and activations during training; optimiser states are always fp32."""

    FP32 = "fp32"
    BF16 = "bf16"


class Schedule(StrEnum):
    """Learning rate after warm-up: to `minimumLearningRate` by a cosine or a line, or unchanged."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class Loss(StrEnum):
    """Which tokens of a conversation bear loss."""

    ASSISTANT = "assistant"
    COMPLETION = "completion"
    ALL = "all"


class OnInvalid(StrEnum):
    """What happens to a record that is not valid."""

    FAIL = "fail"
    DROP = "drop"


class OnTooLong(StrEnum):
    """What happens to a record of more than `maxLength` tokens."""

    FAIL = "fail"
    TRUNCATE = "truncate"
    DROP = "drop"


class PreferenceLoss(StrEnum):
    """How a pair is learnt from: DPO's sigmoid of the margin, or IPO's square of its distance from a target."""

    SIGMOID = "sigmoid"
    IPO = "ipo"


class ReferenceLogProbs(StrEnum):
    """When the reference's log-probabilities of the pairs are computed: once before the first step, or in each step."""

    AUTO = "auto"
    PRECOMPUTED = "precomputed"
    ONLINE = "online"


class Quantization(StrEnum):
    """How the frozen weights below an adapter are held: in 4 bits, as quantiles of the normal distribution (QLoRA)."""

    NF4 = "nf4"


class Optimizer(StrEnum):
    """The optimiser; `sgd` is plain gradient descent, useful to check exactness."""

    ADAMW = "adamw"
    SGD = "sgd"


Epochs = Annotated[int, Field(ge=1, le=1000, description="Passes over the training rows.")]
MaxSteps = Annotated[
    int,
    Field(ge=1, le=100_000_000, description="Stop after so many optimiser steps, even in the middle of an epoch."),
]
GlobalBatchSize = Annotated[
    int,
    Field(
        ge=1, le=1_048_576, description="Rows in one optimiser step, over all processes; a packed row counts as one."
    ),
]
MicroBatchSize = Annotated[
    int,
    Field(
        ge=1,
        le=65_536,
        description="Rows that one process puts through the model at once. Changes speed and memory only.",
    ),
]
LearningRate = Annotated[float, Field(gt=0, le=10, description="Peak learning rate.")]
MinimumLearningRate = Annotated[float, Field(ge=0, le=10, description="Learning rate at the end of the schedule.")]
WarmupRatio = Annotated[
    float, Field(ge=0, le=1, description="Part of all steps in which the learning rate rises linearly from 0.")
]
Beta = Annotated[
    float, Field(ge=0, lt=1, description="Decay of AdamW's running average (beta1: gradient, beta2: its square).")
]
Epsilon = Annotated[float, Field(gt=0, le=1, description="AdamW's epsilon.")]
WeightDecay = Annotated[
    float, Field(ge=0, le=10, description="Decoupled weight decay; not applied to norms and biases.")
]
ClipNorm = Annotated[float, Field(ge=0, le=1e6, description="Largest global gradient norm; 0 turns clipping off.")]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1, description="Seed of weights, order of rows and dropout.")]
GradientCheckpointing = Annotated[
    bool, Field(description="Recompute activations in the backward pass: less memory, about a third more time.")
]
Autotune = Annotated[
    bool,
    Field(
        description="Choose microBatchSize and parallelism.zeroStage by a short measurement when the stage first "
        "starts; what is chosen is kept for all attempts. false by default."
    ),
]
ZeroStage = Annotated[
    int,
    Field(
        ge=0,
        le=3,
        description="DeepSpeed ZeRO: 0 replicates, 1 shards optimiser states, 2 gradients too, 3 weights too.",
    ),
]
MaxLength = Annotated[int, Field(ge=8, le=1_048_576, description="Longest row in tokens.")]
Packing = Annotated[bool, Field(description="Put several records into one row; they do not see each other.")]
EverySteps = Annotated[int, Field(ge=1, le=1_000_000, description="Save a checkpoint every so many steps.")]
Keep = Annotated[int, Field(ge=1, le=100, description="How many checkpoints to keep.")]
ValidationEverySteps = Annotated[
    int,
    Field(
        ge=1,
        le=1_000_000,
        description="Measure the validation loss every so many steps, besides before the first and after the last.",
    ),
]
Patience = Annotated[
    int,
    Field(
        ge=1,
        le=1000,
        description="Stop after so many measurements of the validation loss in a row without an improvement; "
        "3 by default.",
    ),
]
MinimumImprovement = Annotated[
    float,
    Field(
        ge=0,
        le=1e6,
        description="A loss is an improvement when it is lower than the best by more than this, in nats; 0 by default.",
    ),
]
Weight = Annotated[float, Field(gt=0, le=1e6, description="Relative weight of this data set in the mixture.")]
Cap = Annotated[
    int,
    Field(
        ge=1,
        le=1_000_000_000,
        description="Count at most so many records of this data set (examples-proportional mixing).",
    ),
]
ReplayFraction = Annotated[
    float,
    Field(
        gt=0, lt=1, description="Part of an epoch's loss-bearing tokens that this data set gives, exact to one record."
    ),
]
TemplateText = Annotated[
    str,
    Field(min_length=1, max_length=8192, description="Jinja; the fields of the record are its variables."),
]
ExampleCount = Annotated[int, Field(ge=1, le=64, description="So many examples, fewer where maxLength is too short.")]
ExampleMaximum = Annotated[
    int, Field(ge=1, le=64, description="1 to so many examples, drawn for each record, fewer where maxLength is short.")
]
FewShotProportion = Annotated[
    float, Field(gt=0, le=1, description="Chance that a record gets examples; the others are zero-shot.")
]
TaskName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=32,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        description="Never trained on: its loss is measured apart, under this name. Equal names make one task.",
    ),
]
PreferenceBeta = Annotated[
    float,
    Field(
        gt=0,
        le=100,
        description="How closely the model is held to the reference: beta of DPO, tau of IPO. Smaller moves further.",
    ),
]
LabelSmoothing = Annotated[
    float, Field(ge=0, lt=0.5, description="Chance that a pair's label is wrong (conservative DPO); 0 trusts them all.")
]
LoraRank = Annotated[int, Field(ge=1, le=1024, description="Rank r of each update B A; 16 by default.")]
LoraAlpha = Annotated[
    int, Field(ge=1, le=65_536, description="The update is scaled by alpha / rank; by default alpha is twice the rank.")
]
LoraDropout = Annotated[
    float,
    Field(
        ge=0, lt=1, description="Dropout before A while training; 0 by default, and always off in dpo, reward and ppo."
    ),
]
LoraTargets = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]],
    Field(
        min_length=1,
        max_length=32,
        description="Linear layers of the blocks to adapt, by the last part of their names, such as q_proj; "
        "all of them by default. Embeddings and the output head can't be adapted.",
    ),
]
MaxDropped = Annotated[int, Field(ge=0, le=1_000_000_000, description="More dropped records than this fail the stage.")]
VocabularySize = Annotated[
    int, Field(ge=264, le=1_000_000, description="Entries of the trained vocabulary, special tokens included.")
]


class Template(Contract):
    """One wording of a task: what is asked, and what is answered."""

    prompt: TemplateText
    completion: TemplateText


class FewShot(Contract):
    """Examples from the same data set before a record's own question: `count` of them, or 1 to `maximum`."""

    count: ExampleCount | None = None
    maximum: ExampleMaximum | None = None
    proportion: FewShotProportion = 0.5


class Recipe(Contract):
    """How a stage trains: every hyper-parameter, with its default."""

    epochs: Epochs = 1
    max_steps: MaxSteps | None = None
    global_batch_size: GlobalBatchSize = 32
    micro_batch_size: MicroBatchSize = 1
    optimizer: Optimizer = Optimizer.ADAMW
    learning_rate: LearningRate = 1e-5
    minimum_learning_rate: MinimumLearningRate = 0.0
    schedule: Schedule = Schedule.COSINE
    warmup_ratio: WarmupRatio = 0.03
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    epsilon: Epsilon = 1e-8
    weight_decay: WeightDecay = 0.0
    clip_norm: ClipNorm = 1.0
    seed: Seed = 42
    gradient_checkpointing: GradientCheckpointing = False


class Preference(Contract):
    """How a `dpo` stage learns from pairs."""

    loss: PreferenceLoss = PreferenceLoss.SIGMOID
    beta: PreferenceBeta = 0.1
    label_smoothing: LabelSmoothing = 0.0
    reference_log_probs: ReferenceLogProbs = ReferenceLogProbs.AUTO


class Lora(Contract):
    """Low-rank adaptation: W + (alpha / rank) B A, where only A and B learn (Hu et al. 2021, equation 3)."""

    rank: LoraRank = 16
    alpha: LoraAlpha | None = None
    dropout: LoraDropout = 0.0
    targets: LoraTargets | None = None
    quantization: Quantization | None = None

    @property
    def effective_alpha(self) -> int:
        """Alpha, or its default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def scaling(self) -> float:
        """Factor of the update B A."""
        return self.effective_alpha / self.rank


class Checkpoint(Contract):
    """When to save, and how much to keep."""

    every_steps: EverySteps = 200
    keep: Keep = 2


class EarlyStopping(Contract):
    """Stop where the validation loss no longer falls; the result has the weights of the best measurement."""

    patience: Patience = 3
    minimum_improvement: MinimumImprovement = 0.0


class SpecialTokens(Contract):
    """Names of the tokens that are never text. All differ from each other."""

    document_separator: Annotated[str, Field(min_length=1, max_length=64)] = "<|document|>"
    end_of_turn: Annotated[str, Field(min_length=1, max_length=64)] = "<|end|>"
    padding: Annotated[str, Field(min_length=1, max_length=64)] = "<|pad|>"
    additional: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=64)] = [
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]


class TokenizerTraining(Contract):
    """A byte-level BPE tokenizer, trained on the stage's training data."""

    vocabulary_size: VocabularySize = 4096
    special_tokens: SpecialTokens = SpecialTokens()
    chat_template: Annotated[
        str | None,
        Field(max_length=65_536, description="Jinja chat template; absent: a plain template of the special tokens."),
    ] = None
