"""A reward model that is centred on demonstrations: what the offset is the mean of, at any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.trainer.engine import stages
from transformers import AutoModelForSequenceClassification

from trimtab_trainer.config import Artifact
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.reward import read_offset

ROWS = 7
"""One of two processes has one more."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("demonstrations")
    run, code = stages.run(root, stages.stage(stages.write_prepared(root, row_counts=[8], batch=8)))
    assert code == 0, run.output
    return run


def scored(base: stages.Run, name: str, processes: int, demonstrations: int = ROWS) -> stages.Run:
    prepared = stages.write_prepared(
        base.root,
        row_counts=[24],
        batch=8,
        validation=6,
        demonstrations=demonstrations,
        stage_type=stages.StageType.REWARD,
    )
    config = stages.stage(
        prepared,
        stage=name,
        type="reward",
        folder=f"pvc://models/tiny/{name}",
        model=Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest),
        recipe={"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2},
        processes_per_node=processes,
        zero_stage=3,
    )
    run, code = stages.run(base.root, config)
    assert code == 0, run.output + run.log()
    return run


def prepared_of(run: stages.Run) -> PreparedData:
    return PreparedData(run.root / "volume" / run.config.prepared.uri.removeprefix("pvc://models/"))


@torch.no_grad()
def scores(folder: Path, prepared: PreparedData) -> list[float]:
    """Of each text of the first plan, by the model as transformers reads it back, one at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for index in range(prepared.rows(0)):
        row = prepared.row(0, index)
        for ids in np.split(row.input_ids, np.cumsum(row.segment_lengths)[:-1]):
            found.append(float(model(input_ids=torch.from_numpy(ids).long()[None]).logits[0, 0]))
    return found


def test_r6_read_back_the_demonstrations_have_a_mean_reward_of_0_and_the_accuracy_is_as_it_was(
    base: stages.Run,
) -> None:
    two, one, without = (
        scored(base, name, processes, rows)
        for name, processes, rows in (("two", 2, ROWS), ("one", 1, ROWS), ("no", 2, 0))
    )
    offsets = []
    for run in (two, one):
        folder = run.folder / "model"
        demonstrations = prepared_of(run).demonstrations
        assert demonstrations is not None
        found = scores(folder, demonstrations)
        assert len(found) > ROWS
        offsets.append(read_offset(folder))
        assert np.mean(found) - offsets[-1] == pytest.approx(0, abs=1e-6)
        card = (folder / "README.md").read_text(encoding="utf-8")
        records = demonstrations.info.records
        assert f"| offset | {offsets[-1]:.6g}: the mean score of {records} demonstrations |" in card
    assert offsets[0] == pytest.approx(offsets[1], abs=1e-5)
    of_best = read_offset(without.folder / "model")
    assert abs(of_best - offsets[0]) > 1e-3, "the best answers have another mean"
    prompts = prepared_of(without).rankings(0, 0, prepared_of(without).rows(0))
    card = (without.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| offset | {of_best:.6g}: the mean score of the best answers to {prompts} prompts |" in card
    assert stages.same_weights(two, without)
    assert two.report.metrics == without.report.metrics
    assert "validation_accuracy" in {metric.name for metric in two.report.metrics}
