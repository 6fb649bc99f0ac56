"""Whether vLLM can sample for a stage here: asked by prepare, before a GPU is claimed, and by training. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import Rollout, RolloutEngine


def check_rollout(rollout: Rollout, stage: str, *, accelerator: bool) -> None:
    """Refuse what can't run, or would do nothing.

    Raises:
        BadConfiguration: vLLM is asked for, and is not installed; or a setting needs a GPU.
    """
    if rollout.engine is not RolloutEngine.VLLM:
        return
    if find_spec("vllm") is None:
        raise BadConfiguration(
            "ppo.rollout.engine is vllm, but this trainer image holds no vLLM; use one that is built with it "
            "(docs/images.md), or set ppo.rollout.engine: transformers",
            stage=stage,
        )
    if accelerator:
        return
    if rollout.vllm.sleep:
        raise BadConfiguration(
            "ppo.rollout.vllm.sleep needs a GPU: on a CPU vLLM keeps all its memory; remove it", stage=stage
        )
    if rollout.vllm.gpu_memory_utilization is not None:
        raise BadConfiguration(
            "ppo.rollout.vllm.gpuMemoryUtilization needs a GPU, and the stage asks for none; remove it", stage=stage
        )
