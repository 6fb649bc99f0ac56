"""Rollouts with vLLM that can't run are refused before a GPU is claimed."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab_trainer import rollout_limits
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import Rollout, RolloutEngine, Vllm

ON_GPU_ONLY = [({"sleep": True}, "sleep needs a GPU"), ({"gpu_memory_utilization": 0.5}, "gpuMemoryUtilization needs")]


def check(*, accelerator: bool, engine: RolloutEngine = RolloutEngine.VLLM, **vllm: Any) -> None:
    rollout = Rollout(engine=engine, vllm=Vllm(**vllm))
    rollout_limits.check_rollout(rollout, "policy", accelerator=accelerator)


@pytest.mark.parametrize(("settings", "message"), ON_GPU_ONLY)
def test_what_would_do_nothing_on_a_cpu_is_refused_there(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfiguration, match=message):
        check(accelerator=False, **settings)
    check(accelerator=True, **settings)


def test_an_image_without_vllm_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_limits, "find_spec", lambda name: None)
    with pytest.raises(BadConfiguration, match="holds no vLLM; use one that is built with it"):
        check(accelerator=True)
    check(accelerator=True, engine=RolloutEngine.TRANSFORMERS)
