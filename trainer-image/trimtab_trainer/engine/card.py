"""The model card: what the model is, where it comes from, how its loss went, and what changed in its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab_trainer import tuning
from trimtab_trainer.config import COMPARING, StageType, TrainConfig
from trimtab_trainer.data.store import PreparedData, PreparedInfo
from trimtab_trainer.engine import answer_lengths, calibration, change
from trimtab_trainer.engine.calibration import Calibration
from trimtab_trainer.engine.change import Change
from trimtab_trainer.lineage import Lineage, Outcome
from trimtab_trainer.progress.metrics_log import HELD_OUT_LOSS, key_of
from trimtab_trainer.volumes import local_path

_PLOT = "loss.png"
_CHANGE_PLOT = "weight-change.png"
_UNITS = {StageType.DPO: "pair", StageType.REWARD: "prompt", StageType.PPO: "action"}


def write_card(
    folder: Path,
    config: TrainConfig,
    prepared: PreparedData,
    lineage: Lineage,
    outcome: Outcome,
    moved: Change | None,
    calibrated: Calibration | None,
) -> None:
    """Write `README.md` and the plots beside it.

    `moved`: None where the weights were random at first; `calibrated`: of a reward model with held-out comparisons.
    """
    info, rows = prepared.info, outcome.rows
    unit = _UNITS.get(config.type, "loss-bearing token")
    _plot(folder / _PLOT, rows, unit, lineage.best_step)
    if moved is not None:
        change.draw(moved, folder / _CHANGE_PLOT)
    if calibrated is not None:
        calibration.draw(calibrated, folder / calibration.CALIBRATION_PLOT)
    metrics = "\n".join(f"| {metric.name} | {metric.value} |" for metric in lineage.metrics)
    settings = config.recipe.model_dump(mode="json", by_alias=True)
    if config.lora:
        settings["lora"] = config.lora.model_dump(mode="json", by_alias=True)
    if config.preference:
        settings["preference"] = config.preference.model_dump(mode="json", by_alias=True)
    if config.ppo:
        settings["ppo"] = config.ppo.model_dump(mode="json", by_alias=True, exclude_none=True)
    answers = answer_lengths.section(prepared) if config.type in COMPARING else ""
    if calibrated is not None:
        answers += calibration.section(calibrated)
    base = f"`{config.model.digest}`" if config.model else "random weights"
    text = f"""---
library_name: transformers
pipeline_tag: {"text-classification" if config.type is StageType.REWARD else "text-generation"}
tags: [trimtab, {config.type.value}]
---

# {config.job.name} / {config.stage}

Made by stage `{config.stage}` (`{config.type.value}`) of job `{config.job.namespace}/{config.job.name}` with Trimtab.

| | |
| --- | --- |
| starting weights | {base} |
| prepared data | `{config.prepared.digest}` |
| records an epoch | {info.records:,} |
| records dropped | {_dropped(info)} |
| records cut to {info.max_length:,} tokens | {info.truncated:,} |
| tokens trained on | {lineage.tokens:,} |
| optimiser steps | {_steps(lineage)} |
| dtype | {lineage.dtype} |
{_offset(prepared, outcome.offset)}
| metric (losses per {unit}) | value |
| --- | --- |
{metrics}

![Loss over steps]({_PLOT})
{_held_out(info, rows)}{answers}{change.section(moved, _CHANGE_PLOT) if moved is not None else ""}
## Recipe

```json
{json.dumps(settings, indent=2)}
```
{tuning.section(local_path(config.folder)) if config.autotune else ""}"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _steps(lineage: Lineage) -> str:
    """How many, and whose weights the result has."""
    planned = lineage.total_steps or lineage.step
    done = f"{lineage.step:,}" + (f" of {planned:,}: stopped early" if lineage.step < planned else "")
    if lineage.best_step is None:
        return done
    best = "held-out score" if lineage.identity.type is StageType.PPO else "validation loss"
    return f"{done}; the weights are those of step {lineage.best_step:,}, where the {best} was best"


def _offset(prepared: PreparedData, offset: float | None) -> str:
    """Of a reward model: what is taken off its scores, and what it is the mean of."""
    if offset is None:
        return ""
    if prepared.demonstrations is not None:
        over = f"{prepared.demonstrations.info.records:,} demonstrations"
    else:
        over = f"the best answers to {prepared.rankings(0, 0, prepared.rows(0)):,} prompts"
    return f"| offset | {offset:.6g}: the mean score of {over} |\n"


def _dropped(info: PreparedInfo) -> str:
    """How many, and why."""
    causes = ", ".join(f"{cause} {count:,}" for cause, count in info.dropped_by_cause.items())
    return f"{info.dropped:,}{f' ({causes})' if causes else ''}"


def _held_out(info: PreparedInfo, rows: list[dict[str, Any]]) -> str:
    """The losses on each task that was never trained on, before the first step and after the last."""
    if not info.held_out_tasks:
        return ""
    lines = [
        "",
        "## Tasks never trained on",
        "",
        "Nats per loss-bearing token.",
        "",
        "| task | records | loss before | loss after |",
        "| --- | --- | --- | --- |",
    ]
    for task, records in info.held_out_tasks.items():
        losses = [row[key] for row in rows if (key := key_of(f"{HELD_OUT_LOSS}/{task}")) in row]
        lines.append(f"| {task} | {records:,} | {losses[0]:.4f} | {losses[-1]:.4f} |")
    return "\n".join([*lines, ""])


def _plot(file: Path, rows: list[dict[str, Any]], unit: str, best_step: int | None) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (
        ("loss", "training", "-"),
        ("validationLoss", "validation", "o--"),
        ("heldOutLoss", "tasks held out", "s:"),
    ):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    if best_step is not None:
        axes.axvline(
            best_step, color="0.6", linestyle="-.", linewidth=1, label=f"the result: step {best_step}", zorder=0
        )
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.legend()
    figure.savefig(file, dpi=120, metadata={"Software": None})
