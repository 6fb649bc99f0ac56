"""`python -m trimtab_trainer FILE`: what a container runs. FILE holds the stage's JSON."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from pathlib import Path

from pydantic import ValidationError

from trimtab_trainer.config import (
    STAGE_CONFIG,
    ExitCode,
    FailureReport,
    PrepareConfig,
    PrepareReport,
    TrainConfig,
    TrainReport,
)
from trimtab_trainer.errors import BadConfiguration, InputMissing, StageError
from trimtab_trainer.failures import to_stage_error
from trimtab_trainer.report import failure_report, write_report

_log = logging.getLogger("trimtab_trainer")


def read_config(file: Path) -> PrepareConfig | TrainConfig:
    """Parse the stage's JSON.

    Raises:
        InputMissing: there is no such file.
        BadConfiguration: it does not follow the contract; the message names each field.
    """
    try:
        return STAGE_CONFIG.validate_json(file.read_bytes())
    except OSError as error:
        raise InputMissing(f"{file}: {error.strerror}; it must hold the stage's JSON") from error
    except ValidationError as error:
        faults = sorted(error.errors(), key=lambda fault: fault["type"] == "missing")  # what is wrong before what lacks
        listed = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in faults[:5])
        raise BadConfiguration(
            f"{file}: not a stage of this contract: {listed}; operator and trainer image must be of the same release"
        ) from error


def run(config: PrepareConfig | TrainConfig) -> tuple[PrepareReport | TrainReport | FailureReport | None, int]:
    """Do what the file asks; returns the report and the exit code."""
    if isinstance(config, PrepareConfig):
        from trimtab_trainer import prepare

        return prepare.run(config), ExitCode.DONE
    from trimtab_trainer.supervisor.supervise import supervise

    return supervise(config)


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; returns the exit code of the contract."""
    parser = argparse.ArgumentParser(prog="python -m trimtab_trainer", description="Run one stage of a FineTuneJob.")
    parser.add_argument("file", type=Path, help="the stage's JSON")
    file = parser.parse_args(arguments).file
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s")
    try:
        report, exit_code = run(read_config(file))
    except Exception as error:
        if not isinstance(error, StageError):
            traceback.print_exc()
        failure = to_stage_error(error)
        report, exit_code = failure_report(failure), failure.exit_code
    if isinstance(report, FailureReport):
        _log.error("%s: %s", report.reason, report.message)
    if report is not None:
        write_report(report)
    return int(exit_code)


if __name__ == "__main__":
    sys.exit(main())
