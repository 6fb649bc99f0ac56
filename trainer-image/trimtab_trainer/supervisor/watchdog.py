"""When an attempt counts as hung. Pure."""

from __future__ import annotations

from trimtab_trainer.progress.heartbeat import Heartbeat, Phase

STARTUP_ALLOWANCE = 1800.0
"""Seconds that loading, a checkpoint or the result may take; reading a large model from a slow volume is no hang."""
SHORTEST_DEFAULT_DEADLINE = 300.0
"""Seconds; the least default deadline between two steps."""
STEPS_PER_DEADLINE = 10
"""The default deadline in medians of a step."""


def deadline(heartbeat: Heartbeat, configured: int | None) -> float:
    """Seconds that may pass after `heartbeat` before the attempt counts as hung.

    Args:
        heartbeat: the last sign of life.
        configured: `progressDeadlineSeconds`, if the stage has one.
    """
    between_steps = (
        float(configured)
        if configured is not None
        else max(SHORTEST_DEFAULT_DEADLINE, STEPS_PER_DEADLINE * heartbeat.median_step_seconds)
    )
    return between_steps if heartbeat.phase is Phase.TRAINING else max(between_steps, STARTUP_ALLOWANCE)


def is_stalled(heartbeat: Heartbeat, configured: int | None, now: float) -> bool:
    """Whether the attempt is hung at monotonic time `now` (seconds)."""
    return now - heartbeat.at > deadline(heartbeat, configured)
