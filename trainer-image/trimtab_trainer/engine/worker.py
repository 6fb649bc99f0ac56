"""A training process, as `torchrun` starts it: `python -m trimtab_trainer.engine.worker FILE`.

Sets up what must be in place before torch is imported: it dies with its parent, its output goes to its own log, SIGTERM
is only noted, and whatever ends it is recorded for the supervisor.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType

from trimtab_trainer.config import ExitCode, TrainConfig, TrainReport
from trimtab_trainer.errors import Preempted, StageError
from trimtab_trainer.failures import PeerLost, to_stage_error
from trimtab_trainer.report import failure_report
from trimtab_trainer.supervisor import processes
from trimtab_trainer.supervisor.run_folder import MEASUREMENT_VARIABLE, RUN_FOLDER_VARIABLE, Cause, RunFolder
from trimtab_trainer.supervisor.supervise import log_file
from trimtab_trainer.volumes import local_path


def main() -> int:
    """Train; returns the exit code. A preempted process ends with 0, so that torchrun waits for the others."""
    processes.die_with_parent()
    processes.keep_freed_memory()
    config = TrainConfig.model_validate_json(Path(sys.argv[1]).read_bytes())
    rank = int(os.environ["RANK"])
    container = processes.redirect_output(log_file(local_path(config.folder), config.attempt, rank))
    _log_to(sys.stdout, os.fdopen(container, "w") if rank == 0 else None)
    run = RunFolder(Path(os.environ[RUN_FOLDER_VARIABLE]))
    stop = _StopRequest()
    run.write_pid(rank, os.getpid())
    try:
        report = _work(config, run, stop)
    except BaseException as error:
        failure = to_stage_error(error)
        if failure is not error:
            traceback.print_exc()
        _record(run, rank, failure, config.stage)
        return 0 if isinstance(failure, Preempted) else int(failure.exit_code)
    if report is not None:
        run.write_report(report)
    return int(ExitCode.DONE)


def _work(config: TrainConfig, run: RunFolder, stop: _StopRequest) -> TrainReport | None:
    """Train, or measure where the supervisor asks for it."""
    from transformers.utils.logging import disable_progress_bar

    from trimtab_trainer.engine.probe import probe
    from trimtab_trainer.engine.train import train

    disable_progress_bar()
    # DeepSpeed's calls at each step; who trains can't mend them.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed collects garbage several times as it starts; through all that was imported that takes 0.4 s a time.
    gc.freeze()
    if measurement := os.environ.get(MEASUREMENT_VARIABLE):
        probe(config, run, Path(measurement), stop)
        return None
    return train(config, run, stop)


class _StopRequest:
    """Whether SIGTERM has come."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def __call__(self) -> bool:
        return self._received


def _record(run: RunFolder, rank: int, failure: StageError, stage: str) -> None:
    logging.getLogger(__name__).error("%s: %s", failure.reason, failure.message)
    report = failure_report(failure).model_copy(update={"stage": stage})
    run.write_cause(
        Cause(rank=rank, exit_code=failure.exit_code, report=report, secondary=isinstance(failure, PeerLost))
    )


def _log_to(*streams: object) -> None:
    """Log what we say, and of others what may need attention; for `trimtab local logs` and `kubectl logs`."""
    handlers = [logging.StreamHandler(stream) for stream in streams if stream is not None]
    for handler in handlers:
        handler.addFilter(_is_worth_reading)
    logging.basicConfig(handlers=handlers, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("trimtab_trainer").setLevel(logging.INFO)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.startswith("trimtab_trainer")


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # no interpreter shutdown: the destructors of a broken process group can block for ever
    os._exit(code)
