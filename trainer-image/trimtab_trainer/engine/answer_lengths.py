"""A section of the model card: how long the compared answers are. A preference for length hides in many data sets."""

from __future__ import annotations

import numpy as np

from trimtab_trainer.data.store import VALIDATION, PlanName, PreparedData


def section(prepared: PreparedData) -> str:
    """Of the first epoch, and of what is held out."""
    plans: list[tuple[str, PlanName]] = [("training", 0)]
    if prepared.info.has_validation:
        plans.append(("held out", VALIDATION))
    rows = [f"| {name} | {_row(prepared, plan)} |" for name, plan in plans]
    return "\n".join(
        [
            "",
            "## How long the answers are",
            "",
            "Tokens that bear loss. The last column is the accuracy of a judge who prefers the longer answer.",
            "",
            "| pairs | best answer | other answers | best is longer |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _row(prepared: PreparedData, plan: PlanName) -> str:
    positions, lengths = prepared.answers(plan)
    best = lengths[np.maximum.accumulate(np.where(positions == 0, np.arange(len(positions)), 0))]
    others = positions > 0
    longer = (best > lengths).astype(float) + 0.5 * (best == lengths)
    return f"{lengths[~others].mean():.1f} | {lengths[others].mean():.1f} | {100 * longer[others].mean():.0f} %"
