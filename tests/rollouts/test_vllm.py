"""Rollouts with vLLM, at length: a whole stage, killed and resumed; bf16 with sharded weights."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.trainer.engine import stages
from tests.trainer.engine.test_vllm_rollout import check, root, told
from tests.trainer.engine.vllm_rollouts import BATCH

from trimtab_trainer.config import Artifact
from trimtab_trainer.ppo_settings import Critic, Ppo, Rollout, RolloutEngine

__all__ = ["root"]


def test_p13_bf16_with_sharded_weights(root: Path) -> None:
    check(told(root, "bf16", 3), "bf16")


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 3), ("bf16", 2)])
def test_p13_an_adapter_is_merged_into_what_vllm_is_given(root: Path, precision: str, zero: int) -> None:
    check(told(root, precision, zero, adapter=4), precision)


def test_a_ppo_stage_samples_with_vllm_to_its_end_and_after_a_kill_draws_the_same(root: Path) -> None:
    artifacts = {name: Artifact(**each) for name, each in json.loads((root / "artifacts.json").read_text()).items()}
    rollout = Rollout(max_new_tokens=12, engine=RolloutEngine.VLLM, temperature=0.7)

    def config(name: str) -> stages.TrainConfig:
        return stages.stage(
            artifacts["prepared"],
            stage=name,
            type="ppo",
            folder=f"pvc://models/tiny/{name}",
            model=artifacts["model"],
            reference=artifacts["model"],
            reward=artifacts["reward"],
            processes_per_node=2,
            zero_stage=2,
            ppo=Ppo(rollout=rollout, critic=Critic(learning_rate=1e-3)),
            recipe={"global_batch_size": BATCH, "micro_batch_size": 2, "learning_rate": 3e-3, "epochs": 2},
            checkpoint={"every_steps": 2},
        )

    calm, code = stages.run(root, config("calm"))
    assert code == 0, calm.output + calm.log()
    rows = calm.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["rolloutDifference"] < 1e-4 for row in rows)
    killed = stages.start(root, config("killed"))
    killed.wait_for(lambda: 1 in killed.rank_pids())
    pid = killed.rank_pids()[1]
    killed.wait_for_step(3)
    os.kill(pid, signal.SIGKILL)
    assert killed.finish() == 137
    resumed, code = stages.run(root, config("killed").model_copy(update={"attempt": 2}))
    assert code == 0, resumed.output + resumed.log()
    assert "resuming from" in resumed.log()
    assert stages.same_weights(calm, resumed)
