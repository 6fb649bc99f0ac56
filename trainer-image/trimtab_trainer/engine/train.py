"""One training process from start to end: load, resume, train, save, publish."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from trimtab_trainer import manifest
from trimtab_trainer.checkpoints import Checkpoints, TrainerState, identity
from trimtab_trainer.config import CheckpointReport, Metric, StageType, TrainConfig, TrainReport
from trimtab_trainer.data.store import VALIDATION, PreparedData, task_plan
from trimtab_trainer.engine import calibration, checkpoint
from trimtab_trainer.engine.agenda import agenda_of
from trimtab_trainer.engine.batches import Step, plan_steps
from trimtab_trainer.engine.build import build_loop
from trimtab_trainer.engine.calibration import Calibration
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.early_stopping import HELD_OUT_SCORE, build_stopper
from trimtab_trainer.engine.isolation import check_isolation
from trimtab_trainer.engine.loop import Loop, StepResult
from trimtab_trainer.engine.model import DTYPES, flops_per_token, load_model, peak_flops
from trimtab_trainer.engine.objectives import BestScores
from trimtab_trainer.engine.result import publish_result
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import CorruptArtifact, InputMissing, Preempted, StorageError
from trimtab_trainer.lineage import Outcome
from trimtab_trainer.progress.heartbeat import Phase, Pulse
from trimtab_trainer.progress.metrics_log import HELD_OUT_LOSS, METRICS_FILE, MetricsLog, cut_rows, key_of, read_rows
from trimtab_trainer.progress.pace import Pace
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.supervisor.run_folder import RESUME_STEP_VARIABLE, RunFolder
from trimtab_trainer.volumes import local_path

ANSWERS_FILE = "sampleAnswers.jsonl"
_log = logging.getLogger(__name__)


def train(config: TrainConfig, run: RunFolder, told_to_stop: Callable[[], bool]) -> TrainReport | None:
    """Train the stage to its end; the report on rank 0, None on the others.

    Raises:
        Preempted: told to stop; a checkpoint is saved.
        StageError: any other failure.
    """
    group = Group()
    return Trainer(config, group, run, told_to_stop).run()


class Trainer:
    """The state of one training process."""

    def __init__(self, config: TrainConfig, group: Group, run: RunFolder, told_to_stop: Callable[[], bool]) -> None:
        self._config = config
        self._group = group
        self._pulse = Pulse(run.heartbeat) if group.is_first_of_pod else None
        self._folder = local_path(config.folder)
        self._fence = Fence(self._folder, config.attempt)
        self._checkpoints = Checkpoints(self._folder, self._fence)
        self._prepared = PreparedData.open(local_path(config.prepared.uri), config.prepared.digest)
        self._total_steps = self._prepared.info.total_steps
        network = load_model(config, self._prepared, verify=group.is_first_of_pod)
        group.barrier()
        self._flops_per_token = flops_per_token(network.model, self._prepared.info.max_length)
        self._engine = Engine(network, config)
        peak = peak_flops(self._engine.device, DTYPES[config.precision])
        self._peak_flops = peak * group.size if peak else None
        check_isolation(self._engine, self._prepared, config.stage)
        checkpoint.seed_all(config.recipe.seed, group.rank)
        self._stopper = build_stopper(config, self._prepared.info)
        self._loop = build_loop(config, group, self._prepared, self._engine, self._fence, told_to_stop, self._beat)
        self._told_to_stop = told_to_stop
        self._pace = Pace(agenda_of(config, self._prepared, self._engine.module))
        self._tokens = 0
        self._log: MetricsLog | None = None
        self._shown: dict[str, float] = {}

    def run(self) -> TrainReport | None:
        """Resume or begin, train to the last step, publish the result."""
        done = self._begin()
        self._beat(phase=Phase.TRAINING, step=done, total_steps=self._total_steps, tokens=self._tokens)
        info = self._prepared.info
        self._pace.begin()
        if done == 0:
            self._validate(0)
        for step in plan_steps(info.epoch_rows, info.global_batch_size, self._total_steps, first=done):
            if self._stopper.has_stopped:
                break
            self._step(step)
            done = step.index + 1
        self._beat(phase=Phase.SAVING)
        self._group.barrier()
        best_step = self._return_to_best(done)
        if self._log:
            self._log.close()
        rows = read_rows(self._folder / METRICS_FILE) if self._group.is_first else []
        known = [row for row in rows if row["step"] <= (best_step or done)]
        metrics = _final_metrics(known, self._loop.metrics)
        calibrated = self._calibration()
        if calibrated is not None:
            metrics.append(Metric(name="validation_calibration_error", value=f"{calibrated.error:.6g}"))
        outcome = Outcome(done, best_step, self._tokens, metrics, rows, self._offset())
        digest = publish_result(
            self._engine,
            self._loop.weights(),
            self._group,
            self._config,
            self._prepared,
            self._fence,
            outcome,
            calibrated,
        )
        if digest is None:
            return None
        return TrainReport(
            digest=digest,
            step=done,
            total_steps=self._total_steps,
            best_step=best_step,
            tokens=self._tokens,
            metrics=metrics,
        )

    def _return_to_best(self, done: int) -> int | None:
        """Load the weights of the best step; returns it, or None where the weights are those of the last one already.

        Raises:
            StorageError: its checkpoint is damaged; the next attempt resumes from one that does not count on it.
        """
        best = self._stopper.best
        if best is None or best.step == done:
            return None
        folder = self._checkpoints.path(best.step)
        if self._group.is_first:
            try:
                manifest.verify(folder)
            except (CorruptArtifact, InputMissing) as error:
                raise StorageError(f"{error.message}; the best weights are trained again") from error
        self._group.barrier()
        checkpoint.restore(self._loop.engines, self._group, self._checkpoints, best.step, self._beat)
        _log.info("step %d/%d: the result has the weights of step %d", done, self._total_steps, best.step)
        return best.step

    def _offset(self) -> float | None:
        """Of a reward model: the mean score of the demonstrations; without any, of the best answers of the data."""
        if self._config.type is not StageType.REWARD:
            return None
        centred_on = self._prepared.demonstrations or self._prepared
        scores = Loop(self._engine, self._group, centred_on, self._config, BestScores(), self._told_to_stop)
        return scores.validate(0, self._beat)["loss"]

    def _calibration(self) -> Calibration | None:
        """Of a reward model, on what is held out."""
        if self._config.type is not StageType.REWARD:
            return None
        return calibration.measure(self._engine, self._group, self._prepared, self._config, self._beat)

    def _begin(self) -> int:
        """Restore the checkpoint that the supervisor verified, if any; returns the number of steps done."""
        step = self._group.broadcast(int(os.environ.get(RESUME_STEP_VARIABLE, "-1")))
        done = max(step, 0)
        if step >= 0:
            folder = self._checkpoints.path(step)
            state = checkpoint.restore(self._loop.engines, self._group, self._checkpoints, step, self._beat)
            self._loop.state = state.loop
            self._tokens = state.tokens
            self._stopper.best = state.best
        if self._group.is_first:
            again = cut_rows(self._folder / METRICS_FILE, done if step >= 0 else -1)
            cut_rows(self._folder / ANSWERS_FILE, done if step >= 0 else -1)
            if step >= 0:
                _log.info("resuming from %s; %d steps are recomputed", folder, again)
            elif again:
                _log.info("no checkpoint yet: starting anew; %d steps are recomputed", again)
            self._log = MetricsLog(self._folder, done + 1)
        return done

    def _step(self, step: Step) -> None:
        started = time.perf_counter()
        result = self._loop.step(step)
        seconds = time.perf_counter() - started
        self._tokens += result.tokens
        done = step.index + 1
        self._report(step, result, seconds)
        is_last = done == self._total_steps
        every = self._config.validation_every_steps
        is_best = False
        if is_last or (every is not None and done % every == 0):
            is_best = self._stopper.is_improvement(done, self._validate(done))
        is_last = is_last or self._stopper.has_stopped
        # after the last step the result itself is saved, unless this process has to go first
        if result.stop or ((is_best or done % self._config.checkpoint.every_steps == 0) and not is_last):
            self._save(step)
        if result.stop:
            raise Preempted(
                f"told to stop: saved a checkpoint at step {done} of {self._total_steps}", stage=self._config.stage
            )

    def _report(self, step: Step, result: StepResult, seconds: float) -> None:
        done = step.index + 1
        speed = result.tokens / seconds
        remaining = self._pace.step(result.tokens, done)
        self._shown |= {
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "learning_rate": result.learning_rate,
            **result.metrics,
        }
        if self._pulse:
            self._pulse.step(
                seconds,
                step=done,
                total_steps=self._total_steps,
                epoch=step.epochs_done,
                tokens=self._tokens,
                tokens_per_second=speed,
                remaining_seconds=remaining.seconds,
                remaining_guessed_at=remaining.guessed_at,
                mfu=speed * self._flops_per_token / self._peak_flops if self._peak_flops else None,
                metrics=self._shown,
            )
        self._write(
            {
                "step": done,
                "epoch": round(step.epochs_done, 6),
                "loss": result.loss,
                "gradientNorm": result.gradient_norm,
                "learningRate": result.learning_rate,
                "tokens": self._tokens,
                "tokensPerSecond": round(speed, 1),
                **{key_of(name): value for name, value in result.metrics.items()},
            }
        )
        _log.info(
            "step %d/%d  epoch %.2f  loss %.4f  gradient norm %.3g  learning rate %.3g  %.0f tokens/s",
            done,
            self._total_steps,
            step.epochs_done,
            result.loss,
            result.gradient_norm,
            result.learning_rate,
            speed,
        )

    def _validate(self, done: int) -> dict[str, float]:
        """Measure what is held out; returns what was found, by name."""
        self._show(done)
        info = self._prepared.info
        means: dict[str, float] = {}
        if info.has_validation:
            found = self._loop.validate(VALIDATION, self._beat)
            means |= {f"validation_{name}": value for name, value in found.items()}
        tasks = {task: self._loop.validate(task_plan(task), self._beat)["loss"] for task in info.held_out_tasks}
        if tasks:
            means[HELD_OUT_LOSS] = sum(tasks.values()) / len(tasks)
            means |= {f"{HELD_OUT_LOSS}/{task}": loss for task, loss in tasks.items()}
        self._pace.validated()
        if not means:
            return means
        self._shown |= means
        self._beat(metrics=self._shown)
        self._write({"step": done, **{key_of(name): value for name, value in means.items()}})
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in means.items())
        _log.info("step %d/%d  %s", done, self._total_steps, shown)
        return means

    def _show(self, done: int) -> None:
        """Write down what the model writes."""
        lines = self._loop.samples()
        if lines and self._group.is_first:
            with (self._folder / ANSWERS_FILE).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": done, **line}, ensure_ascii=False) + "\n" for line in lines)

    def _save(self, step: Step) -> None:
        if self._log:
            self._log.sync()
        state = TrainerState(
            identity=identity(self._config),
            step=step.index + 1,
            epoch=step.epoch,
            row=step.stop,
            tokens=self._tokens,
            loop=self._loop.state,
            best=self._stopper.best,
            world_size=self._group.size,
            threads=self._config.threads,
            attempt=self._config.attempt,
        )
        self._beat(phase=Phase.SAVING)
        checkpoint.save(self._loop.engines, self._group, self._checkpoints, state, self._config.checkpoint.keep)
        self._pace.saved()
        self._beat(phase=Phase.TRAINING, checkpoints=self._reports())
        _log.info("saved %s", self._checkpoints.path(state.step))

    def _reports(self) -> list[CheckpointReport]:
        return self._checkpoints.reports()

    def _beat(self, **changes: object) -> None:
        if self._pulse:
            self._pulse.beat(**changes)

    def _write(self, row: dict[str, Any]) -> None:
        if self._log:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._log.write({**row, "attempt": self._config.attempt, "time": now})


def _final_metrics(rows: list[dict[str, Any]], own: Sequence[str]) -> list[Metric]:
    """Of the last step and the last validation; the validation losses before the first step, too.

    `own`: names of the objective's metrics.
    """
    found = {}
    validated = [f"validation_{name}" for name in (*own, HELD_OUT_SCORE)]
    for name in ("loss", *own, "validation_loss", *validated, HELD_OUT_LOSS):
        values = [row[key] for row in rows if (key := key_of(name)) in row]
        if values:
            found[name] = values[-1]
            if name in ("validation_loss", HELD_OUT_LOSS):
                found[f"{name}_start"] = values[0]
    return [Metric(name=name, value=f"{value:.6g}") for name, value in found.items()]
