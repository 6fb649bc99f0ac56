"""A stage from another stage's artifact: bf16, ZeRO 3, gradient checkpointing, preempted and resumed."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tests.trainer.engine import stages
from transformers import AutoModelForSequenceClassification

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.data.store import VALIDATION, PreparedData
from trimtab_trainer.engine.reward import read_offset
from trimtab_trainer.settings import Preference

DROPOUT = {**stages.TINY_LLAMA, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("chain")
    prepared = stages.write_prepared(root, row_counts=[8], batch=8, model_config=DROPOUT)
    run, code = stages.run(root, stages.stage(prepared, recipe={"global_batch_size": 8}))
    assert code == 0, run.output
    return run


def tuned(base: stages.Run, name: str, **changes: object) -> TrainConfig:
    sft = stages.StageType.SFT
    prepared = stages.write_prepared(base.root, row_counts=[75, 75], batch=16, stage_type=sft, model_config=DROPOUT)
    return stages.stage(
        prepared,
        stage=name,
        type="sft",
        folder=f"pvc://models/tiny/{name}",
        model=Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest),
        recipe={"global_batch_size": 16, "micro_batch_size": 2, "epochs": 2, "gradient_checkpointing": True},
        precision="bf16",
        zero_stage=3,
        processes_per_node=2,
        **changes,
    )


def test_resume_is_bitwise_in_bf16_with_sharded_weights(base: stages.Run) -> None:
    calm, code = stages.run(base.root, tuned(base, "calm"))
    assert code == 0, calm.output
    stopped = stages.start(base.root, tuned(base, "stopped"))
    stopped.wait_for_step(3)
    stopped.signal(signal.SIGTERM)
    assert stopped.finish() == 75
    resumed, code = stages.run(base.root, tuned(base, "stopped", attempt=2))
    assert code == 0, resumed.output

    weights = load_file(calm.folder / "model" / "model.safetensors")
    again = load_file(resumed.folder / "model" / "model.safetensors")
    started_from = load_file(base.folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not all(torch.equal(weights[name], started_from[name].bfloat16()) for name in weights)

    lineage = manifest.read_manifest(calm.folder / "model").lineage
    assert lineage["identity"]["model"] == base.report.digest
    assert lineage["dtype"] == "bfloat16"
    assert json.loads((calm.folder / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((calm.folder / "model" / "generation_config.json").read_text())["eos_token_id"] == 1


def test_dpo_starts_at_its_reference(base: stages.Run) -> None:
    start = Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest)

    def preferred(name: str, **changes: object) -> TrainConfig:
        prepared = stages.write_prepared(
            base.root, row_counts=[80, 80], batch=16, validation=4, stage_type=stages.StageType.DPO
        )
        return stages.stage(
            prepared,
            stage=name,
            type="dpo",
            folder=f"pvc://models/tiny/{name}",
            model=start,
            reference=start,
            preference=Preference(beta=0.5),
            recipe={"global_batch_size": 16, "micro_batch_size": 2, "epochs": 2},
            checkpoint={"every_steps": 2},
            processes_per_node=2,
            zero_stage=3,
            **changes,
        )

    calm, code = stages.run(base.root, preferred("preferred"))
    assert code == 0, calm.output
    first = calm.rows()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "D2"
    assert (first["rewardsMargin"], first["accuracy"]) == (0, 0.5)
    told = {metric.name: float(metric.value) for metric in calm.report.metrics}
    assert told["validation_loss_start"] == pytest.approx(math.log(2), abs=1e-6)
    assert told["rewards_margin"] > 0
    assert not (calm.folder / "reference").exists(), "removed with the checkpoints"
    assert "computing the reference's log-probabilities once" in calm.log()
    card = (calm.folder / "model" / "README.md").read_text()
    _, best, others, _, _ = next(line for line in card.splitlines() if line.startswith("| held out |")).split("|")[1:]
    lengths = [int(mask.sum()) for mask in answer_masks(calm)]
    assert float(best) == pytest.approx(np.mean(lengths[::2]), abs=0.051)
    assert float(others) == pytest.approx(np.mean(lengths[1::2]), abs=0.051)
    lineage = manifest.read_manifest(calm.folder / "model").lineage["identity"]
    assert lineage["reference"] == base.report.digest
    assert lineage["preference"] == {"loss": "sigmoid", "beta": 0.5, "labelSmoothing": 0.0, "referenceLogProbs": "auto"}


def test_r4_r6_a_reward_model_is_centred_and_scores_the_same_when_read_back(base: stages.Run) -> None:
    def scoring(name: str, **changes: object) -> TrainConfig:
        prepared = stages.write_prepared(
            base.root, row_counts=[48, 48], batch=8, validation=4, stage_type=stages.StageType.REWARD
        )
        return stages.stage(
            prepared,
            stage=name,
            type="reward",
            folder=f"pvc://models/tiny/{name}",
            model=Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest),
            recipe={"global_batch_size": 8, "micro_batch_size": 2, "epochs": 2, "learning_rate": 1e-3},
            checkpoint={"every_steps": 2},
            processes_per_node=2,
            zero_stage=3,
            **changes,
        )

    calm, code = stages.run(base.root, scoring("reward"))
    assert code == 0, calm.output
    weights = load_file(calm.folder / "model" / "model.safetensors")

    folder = calm.folder / "model"
    assert manifest.read_manifest(folder).kind == "reward"
    card = (folder / "README.md").read_text(encoding="utf-8")
    error = float(card.partition("calibration error: ")[2].partition(".\n")[0])
    told_error = next(m.value for m in calm.report.metrics if m.name == "validation_calibration_error")
    assert float(told_error) == pytest.approx(error, abs=5.1e-4)
    assert (folder / "calibration.png").stat().st_size > 5000
    held = calm.config.prepared.uri.removeprefix("pvc://models/")
    assert calibration_of(folder, PreparedData(base.root / "volume" / held)) == pytest.approx(
        float(told_error), abs=1e-5
    )
    assert "New in this stage, so without a distance: `score.weight`." in card
    assert "| `self_attn.q_proj` | 0." in card
    assert weights["score.weight"].shape == (1, stages.TINY_LLAMA["hidden_size"])
    told = {metric.name: float(metric.value) for metric in calm.report.metrics}
    assert {"accuracy", "margin", "confidence", "validation_accuracy"} <= told.keys()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    prepared = PreparedData(base.root / "volume" / calm.config.prepared.uri.removeprefix("pvc://models/"))
    best = [
        float(model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, 0])
        for ids, label in answers(prepared)
        if label["position"] == 0
    ]
    assert read_offset(folder) == pytest.approx(sum(best) / len(best), abs=1e-5), "R6"

    refused, code = stages.run(
        base.root,
        stages.stage(
            calm.config.prepared,
            stage="from-reward",
            type="sft",
            folder="pvc://models/tiny/from-reward",
            model=Artifact(uri="pvc://models/tiny/reward/model", digest=calm.report.digest),
        ),
    )
    assert (code, refused.report.reason) == (64, "BadConfiguration")
    assert "holds a reward, not a model" in refused.report.message


def calibration_of(folder: Path, prepared: PreparedData) -> float:
    """The expected calibration error on the held-out rows, one answer at a time, one comparison at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    bins: dict[int, list[float]] = {}
    count = 0
    for index in range(prepared.rows(VALIDATION)):
        row = prepared.row(VALIDATION, index)
        ids = np.split(row.input_ids, np.cumsum(row.segment_lengths)[:-1])
        with torch.no_grad():
            scores = [float(model(input_ids=torch.from_numpy(each).long()[None]).logits[0, 0]) for each in ids]
        places = row.labels["position"].tolist()
        for i, j in itertools.combinations(range(len(places)), 2):
            is_one_ranking = places[j] - places[i] == j - i
            if is_one_ranking and row.labels["rank"][i] < row.labels["rank"][j]:
                confidence = 1 / (1 + math.exp(-abs(scores[i] - scores[j])))
                probability = float(row.labels["probability"][i])
                right = probability if scores[i] > scores[j] else 1 - probability
                bins.setdefault(min(9, int((confidence - 0.5) * 20)), []).append(confidence - right)
                count += 1
    return sum(abs(sum(gaps)) for gaps in bins.values()) / count


def answer_masks(run: stages.Run) -> Iterator[NDArray[np.bool_]]:
    """Of each held-out answer: which of its tokens bear loss."""
    prepared = PreparedData(run.root / "volume" / run.config.prepared.uri.removeprefix("pvc://models/"))
    for index in range(prepared.rows(VALIDATION)):
        row = prepared.row(VALIDATION, index)
        yield from np.split(row.loss_mask, np.cumsum(row.segment_lengths)[:-1])


def answers(prepared: PreparedData) -> Iterator[tuple[NDArray[np.int32], np.void]]:
    """Each text of the first epoch, with its label."""
    for index in range(prepared.rows(0)):
        row = prepared.row(0, index)
        ends = np.cumsum(row.segment_lengths)
        yield from zip(np.split(row.input_ids, ends[:-1]), row.labels, strict=True)


def test_a_base_with_one_byte_changed_is_not_trained_from(base: stages.Run) -> None:
    config = tuned(base, "from-damaged")
    weights = base.folder / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        run, code = stages.run(base.root, config)
    finally:
        weights.write_bytes(content)
    assert (code, run.report.reason) == (66, "CorruptArtifact")
    assert "model.safetensors: its bytes differ from manifest.json" in run.report.message
