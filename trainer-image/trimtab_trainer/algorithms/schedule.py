"""The learning rate as a function of the step; nothing to save in a checkpoint."""

from __future__ import annotations

import math

from trimtab_trainer.settings import Recipe, Schedule


def learning_rate(recipe: Recipe, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0, out of `total_steps`.

    Warm-up of w = round(warmupRatio · total) steps: peak · (step + 1) / (w + 1), so no step is wasted at 0 and step w
    has the peak. Then, with t = (step - w) / (total - w) in [0, 1): cosine: min + (peak - min) · (1 + cos πt) / 2
    (Loshchilov and Hutter 2017, without restarts); linear: peak + (min - peak) · t.
    """
    peak, lowest = recipe.learning_rate, recipe.minimum_learning_rate
    warmup = round(recipe.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if recipe.schedule is Schedule.COSINE:
        return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2
    if recipe.schedule is Schedule.LINEAR:
        return peak + (lowest - peak) * progress
    return peak
