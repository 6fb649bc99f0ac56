"""`metrics.jsonl`: one row a step, and one for each validation; and the same values as TensorBoard files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

METRICS_FILE = "metrics.jsonl"
HELD_OUT_LOSS = "held_out_loss"
"""Mean over the held-out tasks, each counting the same; `held_out_loss/TASK` is that of one."""


def key_of(name: str) -> str:
    """A metric's key in a row: camelCase, and after a slash the name of a held-out task as it is."""
    metric, slash, task = name.partition("/")
    return f"{to_camel(metric)}{slash}{task}"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """All complete rows; a last line that a crash cut short is left out."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def cut_rows(file: Path, step: int) -> int:
    """Drop the rows of the steps after `step`; returns how many optimiser steps that were (they are done again).

    The file is replaced whole, so a crash leaves either version.
    """
    if not file.exists():
        return 0
    rows = read_rows(file)
    kept = [row for row in rows if row["step"] <= step]
    draft = file.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in kept)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)
    return len({row["step"] for row in rows if row["step"] > step and "loss" in row})


class MetricsLog:
    """Appends rows; `sync` before a checkpoint makes them last."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = folder / METRICS_FILE
        self._out = self.file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it has a `step`."""
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()
        for name, value in row.items():
            if isinstance(value, float) and name != "epoch":
                self._board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Flush the rows to disk."""
        self._out.flush()
        os.fsync(self._out.fileno())

    def close(self) -> None:
        """Flush and close both."""
        self.sync()
        self._out.close()
        self._board.close()
