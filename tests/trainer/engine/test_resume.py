"""One stage through every way an attempt can end, beside an undisturbed run of it; real processes throughout."""

from __future__ import annotations

import signal
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file
from tests.trainer.engine import stages

from trimtab_trainer import manifest
from trimtab_trainer.config import Progress, TrainConfig

ROWS = [90, 90, 90, 90]
"""Batches of 16, so the last one of each epoch has 10 rows; 24 steps."""
STEPS, EVERY = 24, 4
DROPOUT = {**stages.TINY_LLAMA, "attention_dropout": 0.1}


@dataclass
class Attempt:
    """What was seen of one attempt."""

    run: stages.Run
    code: int = -1
    report: Any = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    pids: dict[int, int] = field(default_factory=dict)
    orphans: list[int] = field(default_factory=list)
    logs: dict[int, str] = field(default_factory=dict)
    progress: Progress | None = None
    metrics: str = ""
    checkpoints: list[str] = field(default_factory=list)

    def end(self) -> None:
        self.code = self.run.finish()
        self.report = self.run.report
        self.rows = self.run.rows()
        self.orphans = [pid for pid in self.pids.values() if is_running(pid)]
        self.logs = {rank: self.run.log(rank) for rank in (0, 1)}
        self.checkpoints = sorted(p.name for p in (self.run.folder / "checkpoints").glob("*"))


def is_running(pid: int) -> bool:
    """A zombie has ended; whoever adopted it has yet to take note."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def configure(root: Path, port: int = 0, **changes: Any) -> TrainConfig:
    prepared = stages.write_prepared(root, row_counts=ROWS, batch=16, validation=6, task=5, model_config=DROPOUT)
    return stages.stage(
        prepared,
        recipe={"global_batch_size": 16, "micro_batch_size": 1, "epochs": 4},
        checkpoint={"every_steps": EVERY, "keep": 2},
        processes_per_node=2,
        zero_stage=2,
        validation_every_steps=10,
        progress_port=port,
        **changes,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("undisturbed")
    return stages.finished(root, configure(root))


def start(root: Path, config: TrainConfig, step: int) -> Attempt:
    """Start an attempt and wait until it has done `step` and both processes are known."""
    attempt = Attempt(stages.start(root, config, stages.container))
    attempt.run.wait_for_step(step)
    attempt.pids = attempt.run.rank_pids()
    assert attempt.pids.keys() == {0, 1}
    return attempt


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory, unused_tcp_port_factory: Any) -> list[Attempt]:
    """Killed; then told to stop; then, with its newest checkpoint damaged, hung; then left alone."""
    root = tmp_path_factory.mktemp("disturbed")
    port = unused_tcp_port_factory()
    config = configure(root, port)

    killed = start(root, config, 6)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/progress") as answer:
        killed.progress = Progress.model_validate_json(answer.read())
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        killed.metrics = answer.read().decode()
    psutil.Process(killed.pids[1]).kill()
    killed.end()

    stopped = start(root, config.model_copy(update={"attempt": 2}), 10)
    stopped.run.signal(signal.SIGTERM)
    stopped.run.signal(signal.SIGTERM)
    stopped.end()

    newest = max((stopped.run.folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    flip_a_byte(max(newest.rglob("*.pt"), key=lambda p: p.stat().st_size))
    hung = start(root, config.model_copy(update={"attempt": 3, "progress_deadline_seconds": 3}), 14)
    psutil.Process(hung.pids[1]).suspend()
    hung.end()

    last = Attempt(stages.start(root, config.model_copy(update={"attempt": 4}), stages.container))
    last.end()
    return [killed, stopped, hung, last]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_killed_process_ends_the_attempt_with_137_and_leaves_nothing(history: list[Attempt]) -> None:
    killed = history[0]
    assert (killed.code, killed.report.reason) == (137, "Killed")
    assert "rank 1 died of SIGKILL" in killed.report.message
    assert not killed.orphans
    assert killed.checkpoints == ["step-4"]


def test_progress_and_metrics_are_served_while_it_trains(history: list[Attempt]) -> None:
    progress = history[0].progress
    assert progress is not None
    assert progress.step >= 6
    assert progress.total_steps == STEPS
    assert {metric.name for metric in progress.metrics} >= {"loss", "validation_loss", "learning_rate", "gradient_norm"}
    families = {family.name: family for family in text_string_to_metric_families(history[0].metrics)}
    tokens = families["trimtab_stage_tokens"].samples[0]
    assert tokens.name == "trimtab_stage_tokens_total"
    assert tokens.labels == {"namespace": "default", "job": "tiny", "stage": "base"}
    assert tokens.value > 0
    for name in ("step", "total_steps", "loss", "tokens_per_second"):
        assert families[f"trimtab_stage_{name}"].samples[0].value > 0
    (task,) = families["trimtab_stage_held_out_loss"].samples
    assert task.labels == {**tokens.labels, "task": "other-task"}
    assert {m.name: float(m.value) for m in progress.metrics}["held_out_loss"] == pytest.approx(task.value, rel=1e-5)
    assert not families["trimtab_stage_mfu"].samples, "no peak is known for a CPU"


def test_the_next_attempt_goes_on_after_the_checkpoint(history: list[Attempt]) -> None:
    killed, stopped = history[:2]
    lost = killed.rows[-1]["step"] - 4
    assert lost > 0, "the kill was to come away from a checkpoint"
    assert f"; {lost} steps are recomputed" in stopped.logs[0]
    assert next(row["step"] for row in stopped.rows if row["attempt"] == 2) == 5
    assert not set(killed.pids.values()) & set(stopped.pids.values())


def test_sigterm_saves_on_all_processes_at_one_step_and_ends_with_75(history: list[Attempt]) -> None:
    stopped = history[1]
    assert (stopped.code, stopped.report.reason) == (75, "Preempted")
    step = stopped.rows[-1]["step"]
    assert f"at step {step} of {STEPS}" in stopped.report.message
    assert f"step-{step}" in stopped.checkpoints
    assert all(f"at step {step} of" in log for log in stopped.logs.values())
    assert not stopped.orphans


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(history: list[Attempt]) -> None:
    stopped, hung = history[1:3]
    step = stopped.rows[-1]["step"]
    before = max(s for s in range(EVERY, step, EVERY))
    assert f"set aside as step-{step}.corrupt" in hung.run.output
    assert next(row["step"] for row in hung.rows if row["attempt"] == 3) == before + 1


def test_a_hang_ends_with_71_and_the_stacks_of_all_processes(history: list[Attempt]) -> None:
    hung = history[2]
    assert (hung.code, hung.report.reason) == (71, "Stalled")
    assert f"after step {hung.rows[-1]['step']} of {STEPS}" in hung.report.message
    for log in hung.logs.values():
        assert "(most recent call first)" in log
        assert 'engine/loop.py"' in log
    assert not hung.orphans


def test_s10_after_all_that_the_weights_are_bitwise_those_of_an_undisturbed_run(
    history: list[Attempt], undisturbed: stages.Run
) -> None:
    last = history[-1]
    assert last.code == 0, last.run.output
    disturbed_weights = load_file(last.run.folder / "model" / "model.safetensors")
    weights = load_file(undisturbed.folder / "model" / "model.safetensors")
    assert weights.keys() == disturbed_weights.keys()
    assert all(torch.equal(weights[name], disturbed_weights[name]) for name in weights)


def test_s10_no_step_stands_twice_in_the_metrics(history: list[Attempt], undisturbed: stages.Run) -> None:
    rows = history[-1].run.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["attempt"] for row in rows] == sorted(row["attempt"] for row in rows)
    # what the attempts between leave depends on where their signals met the checkpoints
    assert {1, 4} <= {row["attempt"] for row in rows} <= {1, 2, 3, 4}
    for key in ("loss", "gradientNorm", "tokens", "epoch", "learningRate"):
        assert [row[key] for row in rows] == [row[key] for row in undisturbed.rows()]
    validations = [(row["step"], row["validationLoss"]) for row in undisturbed.all_rows() if "validationLoss" in row]
    assert [step for step, _ in validations] == [0, 10, 20, 24]
    assert validations == [
        (r["step"], r["validationLoss"]) for r in history[-1].run.all_rows() if "validationLoss" in r
    ]


def test_the_result_is_verified_complete_and_takes_the_place_of_the_checkpoints(undisturbed: stages.Run) -> None:
    report = undisturbed.report
    found = manifest.verify(undisturbed.folder / "model", report.digest)
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "loss.png",
    } <= (found.files.keys())
    assert found.lineage["job"]["uid"] == stages.JOB.uid
    assert found.lineage["identity"]["prepared"] == undisturbed.config.prepared.digest
    values = {metric.name: float(metric.value) for metric in report.metrics}
    measured = ("validation_loss", "held_out_loss")
    assert values.keys() == {"loss", *measured, *(f"{name}_start" for name in measured)}
    assert all(values[name] < values[f"{name}_start"] for name in measured)
    assert not (undisturbed.folder / "checkpoints").exists()
    assert list((undisturbed.folder / "tensorboard").iterdir())


def test_a_held_out_task_is_measured_apart_from_the_start_to_the_end(
    history: list[Attempt], undisturbed: stages.Run
) -> None:
    rows = [row for row in undisturbed.all_rows() if "heldOutLoss" in row]
    assert [row["step"] for row in rows] == [0, 10, 20, 24]
    losses = [row["heldOutLoss/other-task"] for row in rows]
    assert losses == [row["heldOutLoss"] for row in rows], "the mean of a single task"
    assert all(row["heldOutLoss"] != row["validationLoss"] for row in rows)
    again = [row["heldOutLoss"] for row in history[-1].run.all_rows() if "heldOutLoss" in row]
    assert again == losses
    card = (undisturbed.folder / "model" / "README.md").read_text(encoding="utf-8")
    assert f"| other-task | 5 | {losses[0]:.4f} | {losses[-1]:.4f} |" in card


def test_a_stage_that_is_done_says_so_without_training(undisturbed: stages.Run) -> None:
    again, code = stages.run(undisturbed.root, undisturbed.config.model_copy(update={"attempt": 2}), stages.container)
    assert code == 0
    assert again.report.already_done
    assert again.report.digest == manifest.manifest_digest(undisturbed.folder / "model")
    assert not (undisturbed.folder / "logs" / "attempt-2").exists()
