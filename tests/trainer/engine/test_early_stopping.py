"""Early stopping: where it stops, whose weights are the result, and that kills change nothing of it."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.trainer.engine import oracle, stages
from transformers import AutoModelForCausalLM

from trimtab_trainer import manifest
from trimtab_trainer.checkpoints import Best, Checkpoints, TrainerState, identity
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import VALIDATION, PreparedData
from trimtab_trainer.engine.early_stopping import LowestLoss, Stopper, build_stopper
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import EarlyStopping
from trimtab_trainer.supervisor.fence import Fence

STEPS, EVERY, PATIENCE = 60, 2, 8


def stopper(**settings: Any) -> Stopper:
    return Stopper(LowestLoss(EarlyStopping(**settings)))


def follow(made: Stopper, *losses: float) -> list[bool]:
    """Measurements after steps 0, 10, 20 and so on, until it stops."""
    told = []
    for i, loss in enumerate(losses):
        assert not made.has_stopped
        told.append(made.is_improvement(10 * i, {"validation_loss": loss}))
    return told


def test_stops_when_patience_is_at_its_end_and_the_start_does_not_count() -> None:
    made = stopper(patience=2)
    assert follow(made, 0.5, 3.0, 2.0, 2.5, 2.0) == [False, True, True, False, False]
    assert made.has_stopped
    assert made.best == Best(step=20, loss=2.0, measured_since=2)


def test_an_improvement_starts_the_count_anew() -> None:
    made = stopper(patience=2)
    follow(made, 9, 3.0, 3.1, 2.9, 3.0)
    assert not made.has_stopped
    assert made.best == Best(step=30, loss=2.9, measured_since=1)


def test_less_than_the_minimum_is_no_improvement_however_often_it_comes() -> None:
    made = stopper(patience=3, minimum_improvement=0.1)
    assert follow(made, 9, 3.0, 2.95, 2.92, 2.91) == [False, True, False, False, False], "from the best, not the last"
    assert made.has_stopped


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    made = stopper(patience=1)
    assert follow(made, 9, float("nan"), 3.0, float("nan")) == [False, False, True, False]
    assert made.has_stopped
    assert made.best is not None
    assert made.best.step == 20


def test_without_the_setting_nothing_is_kept_and_nothing_stops() -> None:
    made = Stopper(None)
    assert follow(made, 1, 2, 3, 4, 5) == [False] * 5
    assert (made.best, made.has_stopped) == (None, False)


def test_it_needs_something_to_measure(tmp_path: Path) -> None:
    prepared = stages.write_prepared(tmp_path, row_counts=[8], batch=8)
    config = stages.stage(prepared, early_stopping=EarlyStopping(), validation_every_steps=5)
    info = PreparedData(tmp_path / "volume" / prepared.uri.removeprefix("pvc://models/")).info
    with pytest.raises(BadConfiguration, match="needs held-out rows"):
        build_stopper(config, info)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("early")


def overfitting(root: Path, name: str, **changes: Any) -> TrainConfig:
    """Eight rows learnt by heart: the loss on the others soon rises."""
    prepared = stages.write_prepared(
        root, row_counts=[8] * STEPS, batch=8, validation=8, stage_type=stages.StageType.SFT
    )
    return stages.stage(
        prepared,
        type="sft",
        folder=f"pvc://models/tiny/{name}",
        recipe={"global_batch_size": 8, "micro_batch_size": 4, "epochs": STEPS, "learning_rate": 1e-2},
        validation_every_steps=EVERY,
        early_stopping=EarlyStopping(patience=PATIENCE),
        **{"processes_per_node": 2, "checkpoint": {"every_steps": 3, "keep": 1}, **changes},
    )


def killed(root: Path, config: TrainConfig, step: int) -> stages.Run:
    """A process is killed once `step` is done."""
    run = stages.start(root, config)
    run.wait_for(lambda: 1 in run.rank_pids())
    pid = run.rank_pids()[1]
    run.wait_for_step(step)
    os.kill(pid, signal.SIGKILL)
    assert run.finish() == 137
    return run


@pytest.fixture(scope="module")
def calm(root: Path) -> stages.Run:
    return stages.finished(root, overfitting(root, "calm"))


def validation_loss(run: stages.Run) -> float:
    """Of the published model, by plain transformers."""
    prepared = PreparedData(run.root / "volume" / run.config.prepared.uri.removeprefix("pvc://models/"))
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model", attn_implementation="eager").eval()
    rows = [prepared.row(VALIDATION, i) for i in range(prepared.rows(VALIDATION))]
    with torch.no_grad():
        return float(torch.cat([oracle.token_losses(model, row).float() for row in rows]).mean())


def measured(run: stages.Run) -> dict[int, float]:
    return {row["step"]: row["validationLoss"] for row in run.all_rows() if "validationLoss" in row}


def test_the_result_has_the_weights_of_the_best_measurement(calm: stages.Run) -> None:
    losses = measured(calm)
    best = min(list(losses)[1:], key=losses.__getitem__)
    last = best + PATIENCE * EVERY
    assert last < STEPS
    assert (calm.report.best_step, calm.report.step, calm.report.total_steps) == (best, last, STEPS)
    assert calm.rows()[-1]["step"] == last
    assert validation_loss(calm) == pytest.approx(losses[best], abs=1e-4)
    assert losses[last] > losses[best] + 0.01
    told = {metric.name: float(metric.value) for metric in calm.report.metrics}
    assert told["validation_loss"] == pytest.approx(losses[best], rel=1e-5), "that of the result"
    assert told["loss"] == pytest.approx(calm.rows()[best - 1]["loss"], rel=1e-5)
    card = (calm.folder / "model" / "README.md").read_text()
    assert f"| {last} of {STEPS}: stopped early; the weights are those of step {best}, where" in card
    lineage = manifest.read_manifest(calm.folder / "model").lineage
    assert (lineage["step"], lineage["bestStep"], lineage["totalSteps"]) == (last, best, STEPS)
    assert not (calm.folder / "checkpoints").exists()


def test_kills_change_neither_the_stop_nor_a_bit_of_the_result(calm: stages.Run, root: Path) -> None:
    best, last = calm.report.best_step, calm.report.step
    drawn = random.Random(os.urandom(4)).randint  # another place each time, on both sides of the best one
    kills = [drawn(2, best), drawn(best + 1, best + 2 * EVERY)]
    config = overfitting(root, "killed")
    for attempt, step in enumerate(kills, start=1):
        killed(root, config.model_copy(update={"attempt": attempt}), step)
    again = stages.finished(root, config.model_copy(update={"attempt": 3}))
    assert stages.same_weights(calm, again), kills
    assert measured(again) == measured(calm), kills
    assert [row["step"] for row in again.rows()] == list(range(1, last + 1)), kills
    assert (again.report.best_step, again.report.step) == (best, last)
    assert "steps are recomputed" in again.log()


@pytest.mark.parametrize(("zero", "precision"), [(2, "bf16"), (3, "fp32")])
def test_sharded_weights_go_back_to_the_best_step(root: Path, zero: int, precision: str) -> None:
    name = f"zero-{zero}"
    run = stages.finished(root, overfitting(root, name, zero_stage=zero, precision=precision))
    best = run.report.best_step
    assert best is not None
    losses = measured(run)
    tolerance = 1e-4 if precision == "fp32" else 0.02
    assert validation_loss(run) == pytest.approx(losses[best], abs=tolerance)
    assert losses[run.report.step] > losses[best] + 2 * tolerance


def test_a_damaged_best_checkpoint_is_trained_again(calm: stages.Run, root: Path) -> None:
    """Those that count on it are set aside with it, so the next attempt goes back to before it."""
    best = calm.report.best_step
    config = overfitting(root, "damaged", checkpoint={"every_steps": 3, "keep": 99})
    folder = killed(root, config, best + 2 * EVERY).folder / "checkpoints"
    after = [path for path in folder.iterdir() if int(path.name.removeprefix("step-")) > best]
    assert after
    victim = next((folder / f"step-{best}").rglob("*.pt"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    again = stages.finished(root, config.model_copy(update={"attempt": 2}))
    assert stages.same_weights(calm, again)
    assert any(f"{path} counts on the weights of" in again.output for path in after)


def test_other_intervals_or_patience_are_another_result(tmp_path: Path) -> None:
    config = overfitting(tmp_path, "x")
    checkpoints = Checkpoints(tmp_path, Fence(tmp_path, 1))
    checkpoints.draft(2).mkdir(parents=True)
    state = TrainerState(
        identity=identity(config), step=2, epoch=0, row=0, tokens=0, world_size=2, threads=1, attempt=1
    )
    checkpoints.publish(state, 1)
    for other in ({"validation_every_steps": 3}, {"early_stopping": EarlyStopping(patience=9)}):
        with pytest.raises(BadConfiguration, match=f"written with another {next(iter(other))}"):
            checkpoints.newest_verified(config.model_copy(update=other))
    plain = config.model_copy(update={"early_stopping": None})
    assert identity(plain) == identity(plain.model_copy(update={"validation_every_steps": 7}))
