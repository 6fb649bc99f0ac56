"""PPO whose rewards a program gives: no reward model, and a critic that begins with the value 0."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import stages

from trimtab_trainer.config import VOLUMES_VARIABLE, Artifact, StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData, Row
from trimtab_trainer.engine.batches import collate
from trimtab_trainer.engine.model import load_critic
from trimtab_trainer.engine.rollout import Episode
from trimtab_trainer.engine.verified import VerifiedReward
from trimtab_trainer.ppo_settings import Critic, KlPenalty, Ppo, Rollout
from trimtab_trainer.settings import Precision
from trimtab_trainer.verifier_settings import Verifier
from trimtab_trainer.volumes import local_path

BATCH = 16
WANTED = r"^w[1-3][0-9]( |$)"
"""An answer whose first word is one of 30 of the 64."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("verified")
    run, code = stages.run(root, stages.stage(stages.write_prepared(root, row_counts=[8], batch=8)))
    assert code == 0, run.output
    return run


def learning(base: stages.Run, name: str, verifier: dict[str, Any], **changes: Any) -> TrainConfig:
    prompts = stages.write_prepared(
        base.root, row_counts=[32] * 6, batch=BATCH, validation=6, stage_type=StageType.PPO, seed=3
    )
    start = Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest)
    ppo = Ppo(
        verifier=Verifier.model_validate(verifier),
        kl=KlPenalty(coefficient=0.0),
        rollout=Rollout(max_new_tokens=4),
        critic=Critic(learning_rate=1e-3),
        passes=2,
        minibatches=2,
    )
    recipe = {"global_batch_size": BATCH, "micro_batch_size": 8, "epochs": 6, "learning_rate": 3e-3}
    settings = {"folder": f"pvc://models/tiny/{name}", "model": start, "reference": start, "ppo": ppo}
    return stages.stage(prompts, stage=name, type="ppo", recipe=recipe, **settings, **changes)


def answers(run: stages.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "sampleAnswers.jsonl").read_text().splitlines()]


def test_a_policy_learns_what_the_verifier_rewards(base: stages.Run) -> None:
    verifier = {"regularExpression": {"pattern": WANTED}}
    run, code = stages.run(base.root, learning(base, "expression", verifier, processes_per_node=2, zero_stage=2))
    assert code == 0, run.output + run.log()
    scores = [row["score"] for row in run.rows()]
    assert len(scores) == 12
    assert all(float(score * BATCH).is_integer() for score in scores), "each answer counts 1 or 0"
    assert np.mean(scores[:2]) < 0.7
    assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 0.25
    assert run.rows()[0]["explainedVariance"] == pytest.approx(0, abs=1e-6), "the critic knows nothing yet"
    shown = answers(run)
    assert {line["score"] for line in shown} == {0.0, 1.0}
    for line in shown:
        assert line["score"] == float(re.match(WANTED, line["answer"]) is not None), line
    card = (run.folder / "model" / "README.md").read_text()
    assert "regularExpression" in card


def test_each_answer_is_compared_with_its_own_prompts_reference(
    base: stages.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VOLUMES_VARIABLE, json.dumps({"models": str(base.root / "volume")}))
    prepared = PreparedData(local_path(learning(base, "compared", {"exactMatch": {}}).prepared.uri))
    reward = VerifiedReward(Verifier.model_validate({"exactMatch": {}}), prepared)
    prompts = [prepared.row(0, i) for i in range(10)]
    right = [3 + prompt.input_ids[-1] % 61 for prompt in prompts]  # the next of the rule: 3 more, from 3 to 63
    ended = [answered(prompt, [int(word), stages.END_OF_TURN]) for prompt, word in zip(prompts, right, strict=True)]
    cut = [answered(prompt, [int(word)], ended=False) for prompt, word in zip(prompts, right, strict=True)]
    wrong = [answered(prompt, [3 + (int(word) - 2) % 61, 1]) for prompt, word in zip(prompts, right, strict=True)]
    forged = [answered(prompt, [2, int(word), 1]) for prompt, word in zip(prompts, right, strict=True)]
    for episodes, score in ((ended, 1.0), (cut, 1.0), (wrong, 0.0), (forged, 0.0), ([], 0.0)):
        batch = collate([each.row for each in episodes], stages.PADDING)
        assert reward(episodes, batch).tolist() == [score] * len(episodes)


def answered(prompt: Row, answer: list[int], ended: bool = True) -> Episode:
    ids = np.concatenate([prompt.input_ids, np.array(answer, dtype=np.int32)])
    mask = np.arange(len(ids)) >= len(prompt.input_ids)
    return Episode(Row(ids, mask, [len(ids)], prompt.record_ids, prompt.labels), ended)


def test_the_critic_has_the_stages_weights_and_a_head_of_zeros(
    base: stages.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VOLUMES_VARIABLE, json.dumps({"models": str(base.root / "volume")}))
    start = Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest)
    critic = load_critic(start, Precision.FP32, verify=True)
    weights = load_file(base.folder / "model" / "model.safetensors")
    own = critic.model.state_dict()
    assert not own["score.weight"].any()
    assert all(torch.equal(own[name], weights[name]) for name in own if name != "score.weight")
    assert not critic(collate([], stages.PADDING)).any()
