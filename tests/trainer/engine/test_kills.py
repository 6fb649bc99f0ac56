"""Each type of stage, killed again and again strictly between its checkpoints, beside an undisturbed run of it.

Two kills a type here; `make test-resume` has ten, twice.
"""

from __future__ import annotations

import os
import random
import re
import signal
from typing import Any

import pytest
from tests.trainer.engine import stages

from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.ppo_settings import Critic, Ema, KlPenalty, Ppo, Rollout
from trimtab_trainer.settings import Lora, Preference

KILLS = int(os.environ.get("TRIMTAB_KILLS", "2"))
LIVES = int(os.environ.get("TRIMTAB_LIVES", "1"))
ROWS = [70, 70, 70]
STEPS, EVERY = 27, 4
"""The last batch of each epoch is smaller, and no epoch ends at a checkpoint."""
CLOCKS = {"time", "tokensPerSecond", "attempt"}
"""What tells an attempt from another."""
KINDS = ("pretrain", "sft", "sft-lora", "dpo", "reward", "ppo", *(("ppo-lora",) if LIVES > 1 else ()))
"""The last one in `make test-resume` only; `test_ppo_exact` resumes adapters as well."""
DROPOUT = {**stages.TINY_LLAMA, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("kills")
    prepared = stages.write_prepared(root, row_counts=[8], batch=8, model_config=DROPOUT)
    return stages.finished(root, stages.stage(prepared, recipe={"global_batch_size": 8}))


@pytest.fixture(scope="module")
def reward(base: stages.Run) -> Artifact:
    """A reward model from the base."""
    prepared = stages.write_prepared(base.root, row_counts=[24], batch=8, stage_type=StageType.REWARD)
    return model_of(stages.finished(base.root, stage(base, prepared, StageType.REWARD, "judge")))


def model_of(run: stages.Run) -> Artifact:
    return Artifact(uri=f"{run.config.folder}/model", digest=run.report.digest)


def stage(base: stages.Run, prepared: Artifact, kind: StageType, name: str, **changes: Any) -> TrainConfig:
    """Two processes, micro-batches of two rows, a checkpoint every four steps."""
    recipe = {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 3e-3, **changes.pop("recipe", {})}
    settings = {
        "folder": f"pvc://models/tiny/{name}",
        "model": model_of(base),
        "checkpoint": {"every_steps": EVERY, "keep": 2},
        "processes_per_node": 2,
        "validation_every_steps": 6,
    }
    return stages.stage(prepared, stage=name, type=kind, recipe=recipe, **{**settings, **changes})


def settings_of(kind: str, start: Artifact, reward: Artifact) -> dict[str, Any]:
    """What is particular to each; between them they have every ZeRO stage, both precisions, and dropout."""
    ppo = Ppo(
        kl=KlPenalty(coefficient=0.05, target=1.0, horizon=10),
        rollout=Rollout(max_new_tokens=6, missing_end_reward=-1.0),
        critic=Critic(learning_rate=1e-3),
        passes=2,
        minibatches=2,
    )
    return {
        "pretrain": {"model": None, "zero_stage": 0},
        "sft": {"zero_stage": 1, "precision": "bf16"},
        "sft-lora": {"zero_stage": 3, "precision": "bf16", "lora": Lora(rank=4, dropout=0.1)},
        "dpo": {"zero_stage": 3, "reference": start, "preference": Preference(beta=0.5)},
        "reward": {"zero_stage": 3},
        "ppo": {"zero_stage": 2, "reference": start, "reward": reward, "ppo": ppo},
        "ppo-lora": {
            "zero_stage": 3,
            "reference": start,
            "reward": reward,
            "ppo": ppo.model_copy(update={"ema": Ema(decay=0.8)}),
            "lora": Lora(rank=4, dropout=0.1),
        },
    }[kind]


def test_every_type_of_stage_is_killed() -> None:
    assert {kind.split("-")[0] for kind in KINDS} == {*StageType}


@pytest.mark.parametrize("kind", KINDS)
def test_s10_killed_between_checkpoints_it_ends_bitwise_as_if_undisturbed(
    base: stages.Run, reward: Artifact, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage_type = StageType(kind.split("-")[0])
    prepared = stages.write_prepared(
        base.root, row_counts=ROWS, batch=8, validation=5, stage_type=stage_type, model_config=DROPOUT
    )

    def configure(name: str) -> TrainConfig:
        return stage(base, prepared, stage_type, f"{kind}-{name}", **settings_of(kind, model_of(base), reward))

    calm = stages.finished(base.root, configure("calm"))
    noise = [line for line in calm.log(0).splitlines() if re.search("FutureWarning|Loading weights|INFO gcc", line)]
    assert not noise
    for number in range(LIVES):
        seed = random.SystemRandom().getrandbits(32)
        lost, resumed = life_with_kills(configure(f"life-{number}"), base, random.Random(seed))
        with capsys.disabled():
            print(f"\n{kind}: killed {len(lost)} times, steps computed again: {lost} (seed {seed})", flush=True)
        assert stages.same_weights(calm, resumed)
        if calm.config.lora is not None:
            assert stages.same_weights(calm, resumed, "adapter/adapter_model.safetensors")
        assert told(resumed) == told(calm), "no step twice, none left out, each as it was"


def life_with_kills(config: TrainConfig, base: stages.Run, rng: random.Random) -> tuple[list[int], stages.Run]:
    """Steps that each kill made the next attempt compute again, and the run that came to the end.

    A kill that happened to come when nothing was lost does not count.
    """
    lost: list[int] = []
    attempt, saved = 1, 0
    while len(lost) < KILLS:
        run = stages.start(base.root, config.model_copy(update={"attempt": attempt}))
        run.wait_for(lambda run=run: run.rank_pids().keys() == {0, 1})  # type: ignore[misc]
        victim = run.rank_pids()[rng.randrange(2)]
        # further on with each kill, and now and then within the steps that the one before threw away
        limit = (STEPS - 2 * EVERY) * (len(lost) + 1) // KILLS
        run.wait_for_step(rng.choice([step for step in range(saved + 1, max(saved + EVERY, limit)) if step % EVERY]))
        os.kill(victim, signal.SIGKILL)
        assert run.finish() == 137, run.output
        saved = max((int(each.name.split("-")[1]) for each in (run.folder / "checkpoints").glob("step-*")), default=0)
        if (last := run.rows()[-1]["step"]) > saved:
            lost.append(last - saved)
        attempt += 1
    resumed = stages.finished(base.root, config.model_copy(update={"attempt": attempt}))
    return lost, resumed


def told(run: stages.Run) -> list[dict[str, Any]]:
    """All rows of the metrics, without what the clock says."""
    return [{key: value for key, value in row.items() if key not in CLOCKS} for row in run.all_rows()]
