"""The folder of checkpoints without torch: publication, fencing, choice, damage."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tests.trainer.engine import stages

from trimtab_trainer import manifest
from trimtab_trainer.checkpoints import Checkpoints, TrainerState, identity
from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.errors import BadConfiguration, CorruptArtifact, Superseded
from trimtab_trainer.supervisor.fence import Fence

CONFIG = stages.stage(Artifact(uri="pvc://models/prepared/x", digest="sha256:" + "1" * 64))


def state(step: int, config: TrainConfig = CONFIG) -> TrainerState:
    return TrainerState(
        identity=identity(config), step=step, epoch=0, row=step, tokens=step, world_size=1, threads=1, attempt=1
    )


def publish(checkpoints: Checkpoints, *steps: int, keep: int = 2) -> None:
    for step in steps:
        checkpoints.draft(step).mkdir(parents=True)
        (checkpoints.draft(step) / "weights.pt").write_bytes(bytes([step] * 100))
        checkpoints.publish(state(step), keep)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path, Fence(tmp_path, 1))


def test_keeps_the_newest_by_number_not_by_name(checkpoints: Checkpoints) -> None:
    publish(checkpoints, 8, 9, 10)
    assert checkpoints.steps() == [9, 10]
    newest = checkpoints.newest_verified(CONFIG)
    assert newest is not None
    assert newest.step == 10
    assert [report.step for report in checkpoints.reports()] == [9, 10]
    assert checkpoints.reports()[1].digest == manifest.manifest_digest(checkpoints.path(10))


def test_one_changed_byte_means_the_one_before_and_a_warning(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    publish(checkpoints, 1, 2)
    (checkpoints.path(2) / "weights.pt").write_bytes(bytes([2] * 99 + [3]))
    with caplog.at_level(logging.WARNING):
        newest = checkpoints.newest_verified(CONFIG)
    assert newest is not None
    assert newest.step == 1
    assert "weights.pt" in caplog.text
    assert "set aside as step-2.corrupt" in caplog.text
    assert (checkpoints.folder / "step-2.corrupt").is_dir()


def test_the_only_one_damaged_is_refused_in_every_later_attempt_too(checkpoints: Checkpoints) -> None:
    publish(checkpoints, 5)
    (checkpoints.path(5) / "weights.pt").unlink()
    for _ in range(2):
        with pytest.raises(CorruptArtifact, match=r"no checkpoint is left .* restore one from a backup, or remove"):
            checkpoints.newest_verified(CONFIG)


def test_without_any_checkpoint_training_starts_anew(checkpoints: Checkpoints) -> None:
    checkpoints.draft(3).mkdir(parents=True)
    assert checkpoints.newest_verified(CONFIG) is None
    checkpoints.remove_drafts()
    assert not list(checkpoints.folder.iterdir())


def test_an_older_attempt_publishes_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    Fence(tmp_path, 2).take()
    with pytest.raises(Superseded, match="attempt 2 has taken over; attempt 1 stops"):
        publish(checkpoints, 1)
    assert checkpoints.steps() == []
    with pytest.raises(Superseded):
        Fence(tmp_path, 1).take()
    Fence(tmp_path, 2).take()  # a restarted container of the same attempt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"learning_rate": 1e-4}}, "written with another recipe"),
        ({"zero_stage": 1}, "written with another zero_stage"),
    ],
)
def test_other_settings_are_refused(checkpoints: Checkpoints, changes: dict, message: str) -> None:
    publish(checkpoints, 1)
    with pytest.raises(BadConfiguration, match=message):
        checkpoints.newest_verified(stages.stage(CONFIG.prepared, **changes))


@pytest.mark.parametrize(("optimizer", "zero"), [("adamw", 3), ("sgd", 0)])
def test_another_number_of_processes_is_welcome(
    checkpoints: Checkpoints, optimizer: str, zero: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = stages.stage(CONFIG.prepared, recipe={"optimizer": optimizer}, zero_stage=zero)
    checkpoints.draft(1).mkdir(parents=True)
    checkpoints.publish(state(1, config), 2)
    assert checkpoints.newest_verified(config.model_copy(update={"nodes": 3})) is not None
    assert "written by 1 processes, this attempt has 3" in caplog.text


def test_the_shards_of_sgd_can_not_be_converted(checkpoints: Checkpoints) -> None:
    config = stages.stage(CONFIG.prepared, recipe={"optimizer": "sgd"}, zero_stage=2)
    checkpoints.draft(1).mkdir(parents=True)
    checkpoints.publish(state(1, config), 2)
    with pytest.raises(BadConfiguration, match="state of sgd: set nodes x processesPerNode to 1, or remove"):
        checkpoints.newest_verified(config.model_copy(update={"processes_per_node": 2}))
