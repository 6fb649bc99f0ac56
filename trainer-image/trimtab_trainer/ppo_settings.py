"""The settings of a `ppo` stage, as in `settings`: each bound and description is said once, and used twice.

Imports no torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from trimtab_trainer.settings import Contract, LearningRate
from trimtab_trainer.verifier_settings import Verifier

KlCoefficient = Annotated[
    float, Field(ge=0, le=100, description="Beta: how much each nat away from the starting weights costs.")
]
KlTarget = Annotated[
    float,
    Field(gt=0, le=10_000, description="Nats a sequence that the coefficient is steered to; absent: it stays fixed."),
]
KlHorizon = Annotated[
    int, Field(ge=1, le=1_000_000_000, description="Episodes in which the steered coefficient changes by a fifth.")
]
KlMaximum = Annotated[
    float, Field(gt=0, le=10_000, description="More nats a sequence than this, as the mean of a step, fail the stage.")
]
MaxNewTokens = Annotated[int, Field(ge=1, le=1_048_576, description="Longest answer that is sampled, in tokens.")]
Temperature = Annotated[
    float, Field(gt=0, le=10, description="Of sampling, and of every log-probability that the stage computes.")
]
GpuMemoryUtilization = Annotated[
    float, Field(gt=0, le=0.95, description="Share of each GPU's memory for vLLM's weights and cache; 0.3 by default.")
]
Sleep = Annotated[
    bool, Field(description="Free vLLM's memory while the stage trains, and take it again to sample; GPUs only.")
]
ImportanceCap = Annotated[
    float,
    Field(ge=1, le=100, description="Largest importance weight of a token, against what vLLM computes otherwise."),
]
MissingEndReward = Annotated[
    float,
    Field(ge=-1e6, le=1e6, description="Reward of an answer that did not end, in place of its own."),
]
Minibatches = Annotated[
    int, Field(ge=1, le=1024, description="Updates in one pass over a step's episodes, each with its part of them.")
]
Passes = Annotated[int, Field(ge=1, le=64, description="Passes over a step's episodes.")]
ClipRange = Annotated[
    float, Field(gt=0, le=10, description="Epsilon: how far from 1 a token's probability ratio still has a gradient.")
]
ValueClipRange = Annotated[
    float, Field(gt=0, le=1e6, description="How far a value may move within a step, in units of reward.")
]
Discount = Annotated[float, Field(gt=0, le=1, description="Gamma: what the reward of one token later is worth now.")]
GaeLambda = Annotated[
    float, Field(ge=0, le=1, description="Lambda of the advantages: 1 trusts what came, 0 the critic.")
]

PretrainingCoefficient = Annotated[
    float,
    Field(ge=0, le=1000, description="Gamma: weight of the mix's mean next-token loss; InstructGPT's is 27.8."),
]
PretrainingRows = Annotated[
    int,
    Field(
        ge=1,
        le=1_048_576,
        description="Rows of the mix in each update, over all processes; by default as many as it has prompts.",
    ),
]

EmaDecay = Annotated[
    float,
    Field(gt=0, lt=1, description="Part of the average that each update keeps; InstructGPT's is 0.992."),
]


GamedPatience = Annotated[
    int,
    Field(
        ge=1,
        le=1000,
        description="Stop after so many measurements in a row in which the reward is above and the held-out score "
        "below that of the best one; 3 by default.",
    ),
]
MinimumFall = Annotated[
    float,
    Field(
        ge=0,
        le=1e6,
        description="The held-out score is below the best when it is lower by more than this; 0 by default.",
    ),
]


class KlPenalty(Contract):
    """What holds the policy to its starting weights."""

    coefficient: KlCoefficient = 0.05
    target: KlTarget | None = None
    horizon: KlHorizon = 10_000
    maximum: KlMaximum | None = None


class RolloutEngine(StrEnum):
    """What samples: the model in training itself, or vLLM beside it."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


CPU_ROLLOUT_CACHE_BYTES = 2**30
"""vLLM's key-value cache in each process that has no GPU; pages that no token needs stay untouched."""


GPU_SHARE = 0.3
"""Of each GPU's memory for vLLM, by default."""


class Vllm(Contract):
    """Of sampling with vLLM."""

    gpu_memory_utilization: GpuMemoryUtilization | None = None
    sleep: Sleep = False
    importance_cap: ImportanceCap = 2.0


class Rollout(Contract):
    """How answers are sampled: from the full distribution, since anything else biases the gradient."""

    engine: RolloutEngine = RolloutEngine.TRANSFORMERS
    vllm: Vllm = Vllm()
    max_new_tokens: MaxNewTokens = 256
    temperature: Temperature = 1.0
    missing_end_reward: MissingEndReward | None = None


class Critic(Contract):
    """The model of the value; it starts from the reward model, else from the stage's weights with a head of zeros."""

    learning_rate: LearningRate = 1e-5


class PretrainingMix(Contract):
    """PPO-ptx: gradients of a language model, added to those of each update (Ouyang et al. 2022, equation 2)."""

    coefficient: PretrainingCoefficient
    rows_per_update: PretrainingRows | None = None


class Ema(Contract):
    """An exponential moving average of the policy's weights; it becomes the result."""

    decay: EmaDecay = 0.992


class HeldOutReward(Contract):
    """Stop where the reward rises and the score of another reward model falls, and take the weights before."""

    patience: GamedPatience = 3
    minimum_fall: MinimumFall = 0.0


class Ppo(Contract):
    """How a `ppo` stage learns from what it samples."""

    verifier: Verifier | None = None
    """Absent: a reward model scores the answers."""
    kl: KlPenalty = KlPenalty()
    rollout: Rollout = Rollout()
    critic: Critic = Critic()
    minibatches: Minibatches = 1
    passes: Passes = 1
    clip_range: ClipRange = 0.2
    value_clip_range: ValueClipRange = 0.2
    discount: Discount = 1.0
    gae_lambda: GaeLambda = 0.95
    pretraining_mix: PretrainingMix | None = None
    ema: Ema | None = None
    early_stopping: HeldOutReward | None = None

    def updates(self, prompts: int) -> int:
        """Updates of a step of so many prompts."""
        return self.passes * min(self.minibatches, prompts)

    def pretraining_rows(self, global_batch_size: int) -> int:
        """Rows of the mix in each update; 0 without one."""
        if self.pretraining_mix is None:
            return 0
        return self.pretraining_mix.rows_per_update or -(-global_batch_size // self.minibatches)
