"""Variants of KWOK's Stages: pods that say nothing at their end, and pods that take their time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from tests.controlplane.cluster import STAGES

Stage = dict[str, Any]


def without_messages(directory: Path) -> list[Path]:
    """Pods end as always, but leave no termination message."""

    def silence(stage: Stage) -> None:
        if stage["metadata"]["name"] == "pod-succeeded":
            after = stage["spec"]["next"]
            lines = after["statusTemplate"].splitlines()
            after["statusTemplate"] = "\n".join(line for line in lines if not line.strip().startswith("message:"))

    return _edited(directory, silence)


def slowly(directory: Path, milliseconds: int) -> list[Path]:
    """Pods take so long to run, and as long again to end."""

    def delay(stage: Stage) -> None:
        if stage["metadata"]["name"] in ("pod-running", "pod-succeeded"):
            stage["spec"]["delay"] = {"durationMilliseconds": milliseconds}

    return _edited(directory, delay)


def _edited(directory: Path, edit: Callable[[Stage], None]) -> list[Path]:
    files = []
    for source in STAGES:
        stages = list(yaml.safe_load_all(source.read_text()))
        for stage in stages:
            edit(stage)
        file = directory / source.name
        file.write_text(yaml.safe_dump_all(stages))
        files.append(file)
    return files
