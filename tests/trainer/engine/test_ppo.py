"""PPO as a stage: a reward model that likes one token, and a policy that learns to write it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.engine import stages

from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.engine.batches import Step, rows_of_rank
from trimtab_trainer.engine.ppo import PpoLoop
from trimtab_trainer.ppo_settings import Critic, Ema, KlPenalty, Ppo, PretrainingMix, Rollout

TOLD = (
    "step",
    "score",
    "klSequence",
    "klCoefficient",
    "valueLoss",
    "entropy",
    "explainedVariance",
    "responseLength",
    "pretrainingLoss",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    """A base model and a reward model from it, on one volume."""
    root = tmp_path_factory.mktemp("ppo")
    base, code = stages.run(root, stages.stage(stages.write_prepared(root, row_counts=[8], batch=8)))
    assert code == 0, base.output
    rankings = stages.write_prepared(root, row_counts=[24], batch=8, stage_type=stages.StageType.REWARD)
    start = Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest)
    scoring = stages.stage(rankings, stage="reward", type="reward", folder="pvc://models/tiny/reward", model=start)
    reward, code = stages.run(root, scoring)
    assert code == 0, reward.output
    return reward


def learning(models: stages.Run, name: str, ppo: Ppo | None = None, **changes: object) -> TrainConfig:
    prompts = stages.write_prepared(
        models.root, row_counts=[9, 9], batch=5, validation=4, mix=48, stage_type=stages.StageType.PPO
    )
    kl = KlPenalty(coefficient=0.05, target=1.0, horizon=10)
    recipe = {"global_batch_size": 5, "micro_batch_size": 2, "epochs": 2, "learning_rate": 3e-3}
    return stages.stage(
        prompts,
        stage=name,
        type="ppo",
        folder=f"pvc://models/tiny/{name}",
        model=models.config.model,
        reference=models.config.model,
        reward=Artifact(uri="pvc://models/tiny/reward/model", digest=models.report.digest),
        ppo=ppo
        or Ppo(
            kl=kl,
            rollout=Rollout(max_new_tokens=6, missing_end_reward=-1.0),
            critic=Critic(learning_rate=1e-3),
            passes=2,
            minibatches=2,
            pretraining_mix=PretrainingMix(coefficient=0.5, rows_per_update=3),
            ema=Ema(decay=0.8),
        ),
        recipe=recipe,
        **{"checkpoint": {"every_steps": 2}, **changes},
    )


def test_a_ppo_stage_starts_at_its_reference(models: stages.Run) -> None:
    two = {"processes_per_node": 2, "zero_stage": 2}
    calm, code = stages.run(models.root, learning(models, "ppo", **two))
    assert code == 0, calm.output + calm.log()
    rows = calm.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["ratioFirst"] < 1e-6, "P7"
    assert rows[0]["klSequence"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["klSequence"] != pytest.approx(0, abs=1e-5)
    assert rows[0]["klCoefficient"] == 0.05
    assert rows[1]["klCoefficient"] < 0.05
    answers = [json.loads(line) for line in (calm.folder / "sampleAnswers.jsonl").read_text().splitlines()]
    assert {line["step"] for line in answers} == {0, 4}


def test_a_policy_too_far_from_its_start_fails_the_stage(models: stages.Run) -> None:
    ppo = Ppo(kl=KlPenalty(coefficient=0, maximum=1e-4), rollout=Rollout(max_new_tokens=6))
    run, code = stages.run(models.root, learning(models, "ppo-far", ppo))
    assert (code, run.report.reason) == (70, "KlTooLarge")
    assert "nats a sequence away" in run.report.message


@given(rows=st.integers(1, 40), minibatches=st.integers(1, 12), size=st.integers(1, 5), start=st.integers(0, 9))
def test_p15_every_episode_is_in_one_update_of_each_pass(rows: int, minibatches: int, size: int, start: int) -> None:
    """Of any number of rows, whatever does not divide: none is left out, none comes twice."""
    step = Step(index=3, epoch=0, start=start, stop=start + rows, epoch_rows=50)
    ranks = []
    for rank in range(size):
        loop = PpoLoop.__new__(PpoLoop)
        loop._ppo, loop._group = Ppo(minibatches=minibatches), SimpleNamespace(rank=rank, size=size)
        ranks.append((loop, list(rows_of_rank(step.start, step.stop, rank, size))))
    updates = list(ranks[0][0]._minibatches(step))
    assert len(updates) == min(minibatches, rows)
    for first, last in updates:
        assert sorted(row for loop, own in ranks for row in loop._part(own, step, first, last)) == list(
            range(first, last)
        )
    assert [row for first, last in updates for row in range(first, last)] == list(range(step.start, step.stop))
