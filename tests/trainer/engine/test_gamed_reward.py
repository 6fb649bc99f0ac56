"""Early stopping of PPO by a reward model that watches: where the reward rises and its score falls."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.trainer.engine import stages
from transformers import AutoModelForSequenceClassification

from trimtab_trainer import manifest
from trimtab_trainer.checkpoints import Best, identity
from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.early_stopping import GamedReward, Stopper, build_stopper
from trimtab_trainer.engine.reward import add_zero_head, write_offset
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.ppo_settings import Critic, HeldOutReward, KlPenalty, Ppo, Rollout
from trimtab_trainer.verifier_settings import RegularExpression, Verifier

EVERY, PATIENCE = 2, 2
WANTED = range(10, 40)
"""Words that the policy is rewarded for."""


def stopper(**settings: Any) -> Stopper:
    return Stopper(GamedReward(HeldOutReward(**settings)))


def follow(made: Stopper, *scores: tuple[float, float]) -> list[int]:
    """Rewards and held-out scores after steps 0, 1 and so on; how many measurements in a row asked for an end then."""
    told = []
    for step, (reward, held_out) in enumerate(scores):
        measured = {"validation_score": reward, "validation_held_out_score": held_out}
        improved = made.is_improvement(step, measured)
        assert improved == (made.best is not None and made.best.step == step)
        told.append(made.best.measured_since if made.best else 0)
    return told


def test_the_reward_rises_and_the_held_out_score_falls() -> None:
    made = stopper(patience=2)
    assert follow(made, (9, 9), (1, 1), (2, 3), (3, 2), (4, 2.5)) == [0, 0, 0, 1, 2]
    assert made.has_stopped
    assert made.best == Best(step=2, loss=-3, reward=2, measured_since=2)


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ((2, 2.9), 0),  # the reward has not risen: the policy is worse by both
        ((1, 2.9), 0),
        ((3, 3), 0),  # the held-out score has not fallen
        ((3, 2.75), 0),  # nor by more than the minimum
        ((3, 2.7), 2),
        ((3, 3.01), 0),  # a new best one
    ],
)
def test_only_both_at_once_count_and_anything_else_starts_the_count_anew(then: tuple[float, float], told: int) -> None:
    made = stopper(patience=3, minimum_fall=0.25)
    assert follow(made, (0, 0), (2, 3), (3, 2), then) == [0, 0, 1, told]
    assert not made.has_stopped


def test_what_is_no_number_is_never_the_best_and_never_gamed() -> None:
    nan = float("nan")
    made = stopper(patience=1)
    assert follow(made, (0, 0), (1, nan), (2, 3), (3, nan), (nan, 1)) == [0, 0, 0, 0, 0]
    assert made.best is not None
    assert made.best.step == 2


SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30)


@given(SCORES, st.integers(1, 4), st.integers(0, 2))
def test_it_stops_exactly_where_so_many_in_a_row_are_gamed(
    scores: list[tuple[int, int]], patience: int, fall: int
) -> None:
    """Against the rule in one sentence, of all measurements at once."""
    made = stopper(patience=patience, minimum_fall=fall)
    for step, (reward, held_out) in enumerate(scores):
        made.is_improvement(step, {"validation_score": reward, "validation_held_out_score": held_out})
        seen = scores[1 : step + 1]
        best = max(range(len(seen)), key=lambda i: (seen[i][1], -i), default=None)  # the first of the highest
        gamed = [best is not None and r > seen[best][0] and h < seen[best][1] - fall for r, h in seen]
        since = gamed[(best or 0) + 1 :]
        assert made.has_stopped == (len(since) >= patience and all(since[-patience:]))
        assert (made.best.step - 1 if made.best else None) == best
        if made.has_stopped:
            return


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("gamed")
    run, code = stages.run(root, stages.stage(stages.write_prepared(root, row_counts=[8], batch=8)))
    assert code == 0, run.output
    return run


@pytest.fixture(scope="module")
def watcher(base: stages.Run) -> Artifact:
    """A reward model that dislikes the words that the verifier rewards: -4 for one, 4 for others."""
    folder = base.root / "volume" / "watcher"
    model: Any = add_zero_head(base.folder / "model", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # a text's last hidden state is its last word's embedding
            elif "norm" in name:
                parameter.fill_(1)
        model.model.embed_tokens.weight.fill_(1)
        model.model.embed_tokens.weight[WANTED.start : WANTED.stop] = -1
        model.score.weight.fill_(4 / model.config.hidden_size)
    model.save_pretrained(folder)
    write_offset(folder, 0.5)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (loaded.score.weight == 4 / 32).all()
    return Artifact(uri="pvc://models/watcher", digest=manifest.seal(folder, "reward", {}))


def learning(base: stages.Run, watcher: Artifact | None, name: str, steps: int, **changes: Any) -> TrainConfig:
    prompts = stages.write_prepared(
        base.root, row_counts=[32] * 6, batch=16, max_steps=steps, validation=24, stage_type=StageType.PPO
    )
    start = Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest)
    ppo = Ppo(
        verifier=Verifier(regular_expression=RegularExpression(pattern="^w[1-3][0-9]$")),
        kl=KlPenalty(coefficient=0.0),
        rollout=Rollout(max_new_tokens=1),
        critic=Critic(learning_rate=1e-3),
        passes=2,
        minibatches=2,
        early_stopping=HeldOutReward(patience=PATIENCE, minimum_fall=0.1) if watcher else None,
    )
    recipe = {
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "epochs": 6,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    return stages.stage(
        prompts,
        stage=name,
        type="ppo",
        folder=f"pvc://models/tiny/{name}",
        model=start,
        reference=start,
        held_out_reward=watcher,
        ppo=ppo,
        recipe=recipe,
        checkpoint={"every_steps": 3, "keep": 1},
        **{"validation_every_steps": EVERY, **changes},
    )


def test_a_gamed_reward_ends_the_stage_with_the_weights_before_and_kills_change_nothing(
    base: stages.Run, watcher: Artifact
) -> None:
    calm, code = stages.run(base.root, learning(base, watcher, "watched", 12))
    assert code == 0, calm.output + calm.log()
    measured = {row["step"]: row for row in calm.all_rows() if "validationScore" in row}
    for row in measured.values():  # the two scores say the same of each answer, with another sign
        assert row["validationHeldOutScore"] == pytest.approx(4 - 8 * row["validationScore"] - 0.5, abs=1e-3)
    best, last = calm.report.best_step, calm.report.step
    assert best == max(list(measured)[1:], key=lambda step: measured[step]["validationHeldOutScore"])
    assert last == best + PATIENCE * EVERY < 12
    assert calm.rows()[-1]["step"] == last
    told = {metric.name: float(metric.value) for metric in calm.report.metrics}
    assert told["validation_held_out_score"] == pytest.approx(measured[best]["validationHeldOutScore"], rel=1e-5)
    card = (calm.folder / "model" / "README.md").read_text()
    assert f"| {last} of 12: stopped early; the weights are those of step {best}, where the held-out score was" in card

    until, code = stages.run(base.root, learning(base, None, "until", best))
    assert code == 0, until.output
    assert stages.same_weights(calm, until)

    config = learning(base, watcher, "killed", 12)
    run = stages.start(base.root, config)
    run.wait_for(lambda: 0 in run.rank_pids())
    pid = run.rank_pids()[0]
    run.wait_for_step(best + 1)
    os.kill(pid, signal.SIGKILL)
    assert run.finish() == 137
    again, code = stages.run(base.root, config.model_copy(update={"attempt": 2}))
    assert code == 0, again.output
    assert stages.same_weights(calm, again)
    assert (again.report.best_step, again.report.step) == (best, last)
    assert [row["validationHeldOutScore"] for row in again.all_rows() if "validationScore" in row] == [
        row["validationHeldOutScore"] for row in measured.values()
    ]


def test_another_watcher_or_other_intervals_are_another_result(base: stages.Run, watcher: Artifact) -> None:
    config = learning(base, watcher, "identity", 12)
    other = watcher.model_copy(update={"digest": f"sha256:{'a' * 64}"})
    for change in ({"held_out_reward": other}, {"validation_every_steps": EVERY + 1}):
        assert identity(config.model_copy(update=change)) != identity(config)


def test_it_needs_somebody_to_watch(base: stages.Run, watcher: Artifact) -> None:
    config = learning(base, watcher, "alone", 12, validation_every_steps=None)
    folder = base.root / "volume" / config.prepared.uri.removeprefix("pvc://models/")
    info = PreparedData(folder).info
    with pytest.raises(BadConfiguration, match="earlyStopping needs held-out rows and everySteps"):
        build_stopper(config, info)
    blind = config.model_copy(update={"validation_every_steps": 2, "held_out_reward": None})
    with pytest.raises(BadConfiguration, match="needs a held-out reward model"):
        build_stopper(blind, info)
