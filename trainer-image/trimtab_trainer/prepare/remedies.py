"""Which settings would make a stage fit into the memory that there is.

Tried in this order, each judged by the estimate of the stage with it:

1. what changes nothing but speed: a smaller train.microBatchSize, train.gradientCheckpointing, a higher
   parallelism.zeroStage where there are several processes, ppo.rollout.vllm.sleep; the fewest of them first;
2. `lora` with its defaults, which trains less of the model;
3. a shorter maxLength, which changes what the model sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from trimtab_trainer.config import PrepareStage
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import RolloutEngine
from trimtab_trainer.settings import Lora, Optimizer

REASON = "DoesNotFit"
SHORTEST = 256
"""Tokens: no shorter maxLength is proposed."""


CONTEXT = 1 << 30
"""Bytes of an accelerator that are no tensor's: its context, libraries, communication buffers."""
_FACTORS = (2, 4, 8, 16)
IMPORTS = 700 << 20
"""Bytes of a process after its imports; the estimate counts from there."""


@dataclass(frozen=True)
class Remedy:
    """Settings that make it fit, by their paths in the manifest, and what the stage needs with them."""

    settings: Mapping[str, str]
    memory_bytes: int

    @property
    def keeps_result(self) -> bool:
        """Whether it changes speed only."""
        return not any(path == "lora" or path.endswith(".maxLength") for path in self.settings)

    def __str__(self) -> str:
        return ", ".join(f"{path}: {value}" for path, value in self.settings.items())


def find_remedy(
    stage: PrepareStage, limit: int, need: Callable[[PrepareStage], int], *, from_weights: bool
) -> Remedy | None:
    """The first change of settings with which the stage fits; None where there is none.

    Args:
        stage: what is asked for.
        limit: bytes that a process may take.
        need: the estimate of a changed stage, in bytes.
        from_weights: the stage starts from a model, so an adapter is possible.
    """
    for changed, settings in _changes(stage, from_weights=from_weights):
        if (needed := need(changed)) <= limit:
            return Remedy(settings, needed)
    return None


def require_fit(stage: PrepareStage, needed: int, need: Callable[[PrepareStage], int], *, from_weights: bool) -> None:
    """Refuse a stage that needs more memory than a process may take, where that is known; arguments: `find_remedy`.

    Raises:
        BadConfiguration: with the setting that would make it fit.
    """
    if stage.process_memory_bytes is None:
        return
    limit = room(stage.process_memory_bytes, accelerator=stage.accelerator)
    if needed <= limit:
        return
    there = "acceleratorMemory" if stage.accelerator else "resources.limits.memory"
    cause = f"a process needs {_gib(needed)} of memory, and {there} leaves {_gib(limit)}"
    remedy = find_remedy(stage, limit, need, from_weights=from_weights)
    advice = "none of the stage's settings makes it fit: give it more memory"
    if remedy is not None:
        advice = f"set {remedy}: then it needs {_gib(remedy.memory_bytes)}"
    if remedy is None or not remedy.keeps_result:
        advice += _more_processes(stage, limit, need)
    raise BadConfiguration(f"{cause}; {advice}", reason=REASON)


def frugal(stage: PrepareStage) -> PrepareStage:
    """What `train.autotune` chooses where memory is shortest."""
    recipe = stage.recipe.model_copy(update={"micro_batch_size": 1})
    return stage.model_copy(update={"recipe": recipe, "zero_stage": _highest_zero_stage(stage)})


def require_probe(stage: PrepareStage, need: Callable[[PrepareStage], int]) -> None:
    """Refuse `train.autotune` where one process can't hold the model to measure with, if that is known.

    Raises:
        BadConfiguration: with the settings to choose by hand.
    """
    if stage.process_memory_bytes is None:
        return
    recipe = stage.recipe.model_copy(update={"micro_batch_size": 1, "optimizer": Optimizer.SGD})
    needed = need(stage.model_copy(update={"recipe": recipe, "world_size": 1, "zero_stage": 0}))
    limit = room(stage.process_memory_bytes, accelerator=stage.accelerator)
    if needed > limit:
        raise BadConfiguration(
            f"train.autotune measures with the whole model in one process: it needs {_gib(needed)} of memory, and has "
            f"{_gib(limit)}; remove it, and set train.microBatchSize and parallelism.zeroStage",
            reason=REASON,
        )


def room(process_memory_bytes: int, *, accelerator: bool) -> int:
    """Bytes that are left for what the estimate counts."""
    return max(0, process_memory_bytes - (CONTEXT if accelerator else IMPORTS))


def _more_processes(stage: PrepareStage, limit: int, need: Callable[[PrepareStage], int]) -> str:
    """With how many it fits, and the result stays the same."""
    for factor in _FACTORS:
        wider = stage.model_copy(update={"world_size": factor * stage.world_size})
        for changed, settings in sorted(_same_result(wider), key=lambda change: len(change[1])):
            if need(changed) <= limit:
                also = f" and {Remedy(settings, 0)}" if settings else ""
                return f"; or take {factor} times as many processes (nodes, processesPerNode){also}"
    return ""


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


_Change = tuple[PrepareStage, dict[str, str]]


def _changes(stage: PrepareStage, *, from_weights: bool) -> Iterator[_Change]:
    adapters = [(stage, dict[str, str]())]
    if from_weights and stage.lora is None:
        adapters.append((stage.model_copy(update={"lora": Lora()}), {"lora": "{}"}))
    for shorter, (adapted, learnt) in product(_lengths(stage), adapters):
        length = {f"{stage.type}.maxLength": str(shorter)} if shorter < stage.max_length else {}
        changed = adapted.model_copy(update={"max_length": shorter})
        speed = [(each, settings) for each, settings in _same_result(changed) if settings or learnt or length]
        for each, settings in sorted(speed, key=lambda change: len(change[1])):
            yield each, {**settings, **learnt, **length}


def _lengths(stage: PrepareStage) -> Iterator[int]:
    """The stage's own first, then halves."""
    length = stage.max_length
    yield length
    while length // 2 >= max(SHORTEST, 2 * stage.max_new_tokens):
        length //= 2
        yield length


def _same_result(stage: PrepareStage) -> Iterator[_Change]:
    """Every combination of what changes speed only, that of no change first."""
    micro = [stage.recipe.micro_batch_size]
    while micro[-1] > 1:
        micro.append(micro[-1] // 2)
    checkpointed = [True] if stage.recipe.gradient_checkpointing else [False, True]
    for sleep, zero, checkpointing, rows in product(
        _sleeps(stage), range(stage.zero_stage, _highest_zero_stage(stage) + 1), checkpointed, micro
    ):
        settings = {}
        if rows != stage.recipe.micro_batch_size:
            settings["train.microBatchSize"] = str(rows)
        if checkpointing and not stage.recipe.gradient_checkpointing:
            settings["train.gradientCheckpointing"] = "true"
        if zero != stage.zero_stage:
            settings["parallelism.zeroStage"] = str(zero)
        recipe = stage.recipe.model_copy(update={"micro_batch_size": rows, "gradient_checkpointing": checkpointing})
        update: dict[str, object] = {"recipe": recipe, "zero_stage": zero}
        if stage.ppo is not None and sleep != stage.ppo.rollout.vllm.sleep:
            settings["ppo.rollout.vllm.sleep"] = "true"
            vllm = stage.ppo.rollout.vllm.model_copy(update={"sleep": sleep})
            rollout = stage.ppo.rollout.model_copy(update={"vllm": vllm})
            update["ppo"] = stage.ppo.model_copy(update={"rollout": rollout})
        yield stage.model_copy(update=update), settings


def _highest_zero_stage(stage: PrepareStage) -> int:
    if stage.world_size == 1:
        return stage.zero_stage
    return 2 if stage.lora is not None and stage.lora.quantization is not None else 3


def _sleeps(stage: PrepareStage) -> list[bool]:
    """VLLM can free its memory between rollouts on a GPU."""
    if stage.ppo is None:
        return [False]
    asked = stage.ppo.rollout.vllm.sleep
    possible = stage.ppo.rollout.engine is RolloutEngine.VLLM and stage.accelerator and not asked
    return [asked, True] if possible else [asked]
