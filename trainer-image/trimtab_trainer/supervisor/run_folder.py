"""The folder that a pod's supervisor shares with its training processes; it lives as long as the attempt."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from trimtab_trainer.config import ExitCode, FailureReport, TrainReport, dump
from trimtab_trainer.settings import Contract

RUN_FOLDER_VARIABLE = "TRIMTAB_RUN_FOLDER"
"""Where the training processes find the folder."""
RESUME_STEP_VARIABLE = "TRIMTAB_RESUME_STEP"
"""Step of the verified checkpoint to resume from; set on the pod with index 0, absent for a fresh start."""
MEASUREMENT_VARIABLE = "TRIMTAB_MEASUREMENT"
"""File for what a training process that only measures finds out; absent for a real attempt."""


class Cause(Contract):
    """Why a training process ended, in its own words."""

    rank: int
    exit_code: ExitCode
    report: FailureReport
    secondary: bool = False
    """The process only noticed that another one had gone."""


class RunFolder:
    """Names and formats of the files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heartbeat = path / "heartbeat.json"
        self.exit_codes = path / "exit-codes.json"
        self.config = path / "stage.json"
        self._report = path / "report.json"

    def write_pid(self, rank: int, pid: int) -> None:
        """Announce a training process whose signal handlers are in place."""
        _write(self.path / f"rank-{rank}.pid", str(pid))

    def pids(self) -> dict[int, int]:
        """Process ids of the announced training processes by rank."""
        return {int(file.stem.removeprefix("rank-")): int(file.read_text()) for file in self.path.glob("rank-*.pid")}

    def write_cause(self, cause: Cause) -> None:
        """Record why a training process ends."""
        _write(self.path / f"rank-{cause.rank}.cause", dump(cause))

    def causes(self) -> list[Cause]:
        """What the training processes recorded, by rank."""
        found = []
        for file in self.path.glob("rank-*.cause"):
            try:
                found.append(Cause.model_validate_json(file.read_bytes()))
            except ValidationError:  # the disk was full when the process wrote its last word
                continue
        return sorted(found, key=lambda cause: cause.rank)

    def write_report(self, report: TrainReport) -> None:
        """Record the result of the stage (rank 0)."""
        _write(self._report, dump(report))

    def report(self) -> TrainReport | None:
        """The result of the stage, if rank 0 of this pod wrote one."""
        return TrainReport.model_validate_json(self._report.read_bytes()) if self._report.exists() else None

    def write_exit_codes(self, codes: dict[int, int]) -> None:
        """Record how the processes that failed first ended; a negative code is a signal's number."""
        _write(self.exit_codes, json.dumps(codes))

    def read_exit_codes(self) -> dict[int, int]:
        """Exit codes by rank of the processes that failed first; empty when none did."""
        if not self.exit_codes.exists():
            return {}
        return {int(rank): int(code) for rank, code in json.loads(self.exit_codes.read_bytes()).items()}


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
