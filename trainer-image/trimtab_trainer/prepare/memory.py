"""What a stage's processes hold in memory at most. Measured on CPU: `make bench-memory` compares it with real runs.

Bytes of one process; c bytes of a weight (bf16 2, fp32 4), P parameters, T trained ones (P, or the adapter's A), W
processes, z the ZeRO stage (bf16 runs 0 as 1), s = 8 T of AdamW, 0 of SGD; B = min(T, 5e8), DeepSpeed's bucket.

    between steps   weights   c P            z = 3: c P / W + c min(P, 1e9), gathered ones that stay
                    master    0              z > 0: 4 T / W
                    states    s              z > 0: s / W
                    gradients 0              fp32 sums that stay: 4 T (bf16, z = 1), 4 T / W (z = 3)
    backward        + the larger of: activations (on a CPU with the heap's holes) and head, with the gradients of the
                    micro-batches before;
                    and all gradients with the buckets that reduce them
    update          + gradients, their flat copy, and two temporaries of the optimiser, z = 3: of 1e9 weights at a time
    publishing      + c P copied and c P read back for comparison, on the first process

    head            chunks of logits, 12 bytes each, and the head's gradient, V h (4 + c), but 0 for an adapter
    reference       c P: `dpo` that asks it in each step; an adapter's is the frozen model
    lora.           the adapted layers' Q weights take NF4 Q in place of c Q, and one of them is whole while it is used
    quantization
    ppo             the critic's between-steps part and gradients again, the reference as above, the reward model c P
                    (a verifier has no weights), c P for a reward model that watches, and while sampling keys and values
                    of all layers, 2 c k L a token, and 28 V bytes of logits a row
    ppo.ema         4 T of host memory, on the first process
    vLLM            its share of the accelerator's memory, between rollouts too unless it sleeps; without one, and where
                    that memory is not known, c P and the keys and values of a step's answers

On an accelerator publishing takes host memory, and so does loading: each process reads the weights on the CPU first.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_trainer.chunks import tokens_of_chunk
from trimtab_trainer.config import PrepareStage, StageType
from trimtab_trainer.lora_targets import choose_targets
from trimtab_trainer.ppo_settings import CPU_ROLLOUT_CACHE_BYTES, GPU_SHARE, RolloutEngine
from trimtab_trainer.prepare.activations import Activations
from trimtab_trainer.prepare.shape import ModelShape
from trimtab_trainer.settings import Optimizer, Precision

BUCKET = 500_000_000
"""Elements of DeepSpeed's gradient bucket (`reduce_bucket_size`)."""
GATHERED = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered (`stage3_max_live_parameters`)."""
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO 3 updates at a time (`sub_group_size`)."""
RUNTIME = 100 << 20
"""Bytes that a process adds beside tensors of the model: thread pools, buffers, the log."""
HEAP = 1.4
"""On a CPU: activations of less than 32 MiB lie in the heap, and freed in another order than they were made they leave
holes; measured on a Llama of 4 layers, 2,048 tokens, from 1.36 to 1.52."""
HEAP_OF_ADAPTER = 1.75
"""The same with an adapter, whose sums leave more holes: on a Llama of 12 layers 1.43 with one row, 1.76 with 4, 1.78
with 10."""

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight of 4 bits: blocks of 64 share a scale of 8 bits, and 256 scales one in fp32."""


@dataclass(frozen=True)
class Engine:
    """One model in training: bytes of one process at its three kinds of moments."""

    rest: float
    """Between steps."""
    gradients: float
    """More, while a second micro-batch is put through the model."""
    reducing: float
    """More than `rest`, at the end of the backward pass."""
    update: float
    """More than `rest`, in the optimiser."""


def engine_memory(stage: PrepareStage, parameters: int, trained: int) -> Engine:
    """Of one model, from its own and its trained parameters."""
    bf16 = stage.precision is Precision.BF16
    width, world = (2 if bf16 else 4), stage.world_size
    zero = max(stage.zero_stage, int(bf16))
    bucket, adam = min(trained, BUCKET), stage.recipe.optimizer is Optimizer.ADAMW
    states, temporaries = (8, 8) if adam else (0, 4)
    if zero == 0:
        return Engine(parameters * width + trained * states, 4 * trained, 4 * trained, 4 * (trained + bucket))
    part = trained / world
    weights = parameters * width if zero < 3 else parameters * width / world + width * min(parameters, GATHERED)
    kept = {1: 4 * trained if bf16 else 0, 2: 0, 3: 4 * part}[zero]
    rest = weights + part * (4 + states) + kept
    updated = min(part, SUB_GROUP) if zero == 3 else part
    flat = 0 if bf16 and world == 1 and zero < 3 else 4 * updated
    if zero == 1:
        gradients: float = width * trained
        return Engine(rest, gradients, gradients, gradients + flat + temporaries * part)
    reducing = 4 * part + (bucket * (8 - 4 / world) if zero == 2 else width * bucket)
    accumulated = 4 * part if zero == 2 else 0
    return Engine(rest, accumulated, reducing, accumulated + flat + temporaries * updated)


@dataclass(frozen=True)
class Phases:
    """Bytes of one process at the peak of each part of a stage; of its device, where it has one."""

    training: int
    publishing: int
    """0 on an accelerator."""

    @property
    def peak(self) -> int:
        """Of the stage."""
        return max(self.training, self.publishing)


def process_memory(stage: PrepareStage, shape: ModelShape, activations: Activations, row: int) -> Phases:
    """Of one process, above its size after imports.

    Args:
        stage: what is asked for.
        shape: of its model.
        activations: of one row.
        row: tokens of the longest row.
    """
    width = 2 if stage.precision is Precision.BF16 else 4
    whole = shape.parameters * width
    adapter = adapter_size(stage, shape)
    engine = engine_memory(stage, shape.parameters + adapter, adapter or shape.parameters)
    recipe = stage.recipe
    rows = min(recipe.micro_batch_size, -(-recipe.global_batch_size // stage.world_size))
    more_than_one = recipe.global_batch_size > rows * stage.world_size
    frozen, critic = -_packed(stage, shape, width), Engine(0, 0, 0, 0)
    sampling = 0.0
    if stage.type is StageType.DPO and not adapter and recipe.epochs == 1:
        frozen += whole
    if stage.type is StageType.PPO:
        frozen += (0 if adapter else whole) + (0 if stage.verifier else whole) + _average(stage, shape)
        frozen += whole if stage.held_out_reward_stage else 0
        critic = engine
        always, sampling = _sampling(stage, shape, rows, row)
        frozen += always
    heap = 1 if stage.accelerator else HEAP_OF_ADAPTER if adapter else HEAP
    backward = heap * rows * activations.of(shape.layers) + _head(stage, shape, rows * row, trained=not adapter)
    if more_than_one:
        backward += engine.gradients
    peak = max(backward, engine.reducing, engine.update, sampling)
    if stage.type is StageType.PPO:  # the critic's gradients wait while the actor learns, and the other way round
        peak += critic.rest + max(critic.reducing, critic.update - engine.update)
    rest = engine.rest + frozen + RUNTIME
    publishing = 0.0 if stage.accelerator else rest + _publishing(shape, width, adapter=bool(adapter))
    return Phases(round(rest + peak), round(publishing))


def adapter_size(stage: PrepareStage, shape: ModelShape) -> int:
    """Weights of the stage's adapter; 0 without one."""
    if stage.lora is None:
        return 0
    return stage.lora.rank * sum(shape.adaptable[name] for name in choose_targets(stage.lora, shape.adaptable))


def _head(stage: PrepareStage, shape: ModelShape, tokens: int, *, trained: bool) -> float:
    """Of logits and the head's gradient; a reward model's head is a vector."""
    if stage.type is StageType.REWARD:
        return 0
    width = 2 if stage.precision is Precision.BF16 else 4
    chunk = min(tokens, tokens_of_chunk(shape.vocabulary, on_accelerator=stage.accelerator))
    gradient = shape.vocabulary * shape.hidden * (4 + (width if width < 4 else 0)) if trained else 0
    return 12 * chunk * shape.vocabulary + gradient


def _publishing(shape: ModelShape, width: int, *, adapter: bool) -> float:
    """A copy of the weights, the merged ones of an adapter, and those read back."""
    return (2.15 + adapter) * shape.parameters * width


def _packed(stage: PrepareStage, shape: ModelShape, width: int) -> float:
    """What 4 bits save of the frozen weights, one layer unpacked."""
    if stage.lora is None or stage.lora.quantization is None:
        return 0
    weights = [shape.linear[name] for name in choose_targets(stage.lora, shape.linear)]
    return (width - NF4) * sum(weights) - width * max(weights) / shape.layers


def _average(stage: PrepareStage, shape: ModelShape) -> float:
    """The policy's averaged weights, those that are trained: in host memory."""
    averages = stage.ppo is not None and stage.ppo.ema is not None and not stage.accelerator
    return 4 * (adapter_size(stage, shape) or shape.parameters) if averages else 0


def _sampling(stage: PrepareStage, shape: ModelShape, rows: int, row: int) -> tuple[float, float]:
    """What takes part of the memory all the time for the sake of sampling, and what more while it goes on."""
    width = 2 if stage.precision is Precision.BF16 else 4
    answer = row * 2 * width * shape.key_value * shape.layers
    if stage.ppo is None or stage.ppo.rollout.engine is not RolloutEngine.VLLM:
        return 0, rows * (answer + 28 * shape.vocabulary)
    settings = stage.ppo.rollout.vllm
    if stage.accelerator and stage.process_memory_bytes:
        takes = (settings.gpu_memory_utilization or GPU_SHARE) * stage.process_memory_bytes
    else:
        cache = answer * -(-stage.recipe.global_batch_size // stage.world_size)
        takes = shape.parameters * width + (cache if stage.accelerator else min(cache, CPU_ROLLOUT_CACHE_BYTES))
    return (0, takes) if settings.sleep else (takes, 0)
