"""One attempt of a stage in one pod: fence, start `torchrun`, watch, end, answer."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from trimtab_trainer.checkpoints import Checkpoints
from trimtab_trainer.config import ExitCode, FailureReport, TrainConfig, TrainReport, dump
from trimtab_trainer.errors import StageError, Stalled
from trimtab_trainer.progress.heartbeat import Heartbeat, read_heartbeat
from trimtab_trainer.progress.server import ProgressServer
from trimtab_trainer.report import failure_report
from trimtab_trainer.supervisor import autotune, causes, launch, processes
from trimtab_trainer.supervisor.done import find_result
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.supervisor.run_folder import Cause, RunFolder
from trimtab_trainer.supervisor.watchdog import deadline, is_stalled
from trimtab_trainer.tuning import Measured
from trimtab_trainer.volumes import local_path

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.1
_STACKS_SECONDS = 5.0
"""How long the processes get to print their stacks before they are killed."""
_TAIL_LINES = 40
MEASUREMENT_FOLDER = ".autotune"
"""Below the stage's, while `train.autotune` measures."""


def log_file(folder: Path, attempt: int, rank: int) -> Path:
    """Log of one training process."""
    return folder / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log"


def supervise(config: TrainConfig) -> tuple[TrainReport | FailureReport | None, ExitCode]:
    """Run the attempt; returns the report (None in a pod other than the first that ended well) and the exit code.

    Raises:
        StageError: the attempt can't start.
    """
    node = launch.node_rank(os.environ, config.nodes)
    folder = local_path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    fence = Fence(folder, config.attempt)
    if node == 0:
        fence.take()
    else:
        fence.check()
    if config.autotune:
        config = autotune.settle(config, folder, fence, node, partial(_measure, config, folder))
    if (report := find_result(config, folder)) is not None:
        _log.info("%s: the result is there and verified; nothing to do", folder / "model")
        return (report if node == 0 else None), ExitCode.DONE
    if node > 0:
        return _attempt(config, node, folder, None, None)
    checkpoints = Checkpoints(folder, fence)
    checkpoints.remove_drafts()
    state = checkpoints.newest_verified(config)
    try:
        return _attempt(config, node, folder, state.step if state else None, checkpoints)
    finally:
        checkpoints.remove_drafts()


def _measure(config: TrainConfig, folder: Path, micro_batch_size: int) -> Measured:
    """Run a training process that measures the size for `train.autotune`.

    Raises:
        StageError: as the process ended.
    """
    scratch = folder / MEASUREMENT_FOLDER
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    recipe = config.recipe.model_copy(update={"micro_batch_size": micro_batch_size})
    own = config.model_copy(update={"recipe": recipe, "folder": f"{config.folder}/{MEASUREMENT_FOLDER}"})
    out = scratch / "measured.json"
    report, code = _attempt(own, 0, scratch, None, None, measurement=out)
    if isinstance(report, FailureReport):
        error = StageError(report.message, reason=report.reason, stage=config.stage)
        error.exit_code = code
        raise error
    found = Measured.model_validate_json(out.read_bytes())
    shutil.rmtree(scratch)
    return found


def _attempt(
    config: TrainConfig,
    node: int,
    folder: Path,
    resume_step: int | None,
    first: Checkpoints | None,
    *,
    measurement: Path | None = None,
) -> tuple[TrainReport | FailureReport | None, ExitCode]:
    """Run the training processes of this pod to their end; with `measurement` a single one, which only measures."""
    single = {"nodes": 1, "processes_per_node": 1}
    launched, environ = (config, os.environ) if measurement is None else (config.model_copy(update=single), {})
    with tempfile.TemporaryDirectory(prefix="trimtab-") as temporary, _termination() as told_to_stop:
        run = RunFolder(Path(temporary))
        server = ProgressServer(config, run.heartbeat) if first else None
        run.config.write_text(dump(config), encoding="utf-8")
        oom_kills_before = causes.oom_kills()
        torchrun = subprocess.Popen(
            launch.torchrun_command(launched, run.config, node, launch.rendezvous(environ, launched.nodes)),
            env=launch.torchrun_environment(os.environ, config, run.path, resume_step, measurement),
            start_new_session=True,  # the terminal's Ctrl-C is for the supervisor alone
        )
        if server:
            server.start()
        try:
            hang = _watch(config, torchrun, run, told_to_stop)
        finally:
            _kill(torchrun, run)
            if server:
                server.stop()
        ended_well = torchrun.returncode == 0 and not run.causes()
        if ended_well and not hang:
            return run.report(), ExitCode.DONE
        cause = hang or causes.choose_cause(
            run.causes(),
            run.read_exit_codes(),
            config.stage,
            causes.oom_kills() - oom_kills_before,
            torchrun.returncode,
        )
    _show_tail(log_file(folder, config.attempt, cause.rank))
    return cause.report, cause.exit_code


def _watch(
    config: TrainConfig, torchrun: subprocess.Popen[bytes], run: RunFolder, told_to_stop: list[int]
) -> Cause | None:
    """Wait for the end of `torchrun`; pass SIGTERM on once to each process; a cause if the attempt hangs."""
    started = Heartbeat(at=time.monotonic())
    signalled: set[int] = set()
    while torchrun.poll() is None:
        if told_to_stop:
            # straight to the processes: torchrun would kill them all after 30 s
            for pid in set(run.pids().values()) - signalled:
                processes.send(pid, signal.SIGTERM)
                signalled.add(pid)
        last = read_heartbeat(run.heartbeat) or started
        if is_stalled(last, config.progress_deadline_seconds, time.monotonic()):
            return _hung(config, run, last)
        time.sleep(_POLL_SECONDS)
    return None


def _hung(config: TrainConfig, run: RunFolder, last: Heartbeat) -> Cause:
    """Have every process print its stacks and end; SIGCONT wakes one that is stopped."""
    pids = run.pids()
    for pid in pids.values():
        processes.send(pid, processes.STACKS_SIGNAL)
        processes.send(pid, signal.SIGCONT)
    processes.wait_ended(pids.values(), _STACKS_SECONDS)
    limit = deadline(last, config.progress_deadline_seconds)
    error = Stalled(
        f"no step for {limit:.0f} s after step {last.step} of {last.total_steps} ({last.phase.value}); the stacks of "
        f"all processes are in logs/attempt-{config.attempt}/; raise progressDeadlineSeconds if a step may take that",
        stage=config.stage,
    )
    return Cause(rank=min(pids, default=0), exit_code=error.exit_code, report=failure_report(error, last.step))


def _kill(torchrun: subprocess.Popen[bytes], run: RunFolder) -> None:
    """End what is left of the attempt and wait for it."""
    if torchrun.poll() is None:
        torchrun.kill()
    torchrun.wait()
    for pid in run.pids().values():  # they die with torchrun; this only waits until they have
        processes.wait_gone(pid)


def _show_tail(log: Path) -> None:
    text = processes.tail(log, _TAIL_LINES)
    if text:
        sys.stdout.write(f"--- the last lines of {log} ---\n{text}\n---\n")
        sys.stdout.flush()


@contextmanager
def _termination() -> Iterator[list[int]]:
    """Within, SIGTERM and SIGINT append to the list instead of ending this process."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
