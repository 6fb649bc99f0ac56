"""`train.autotune`: what was measured of each micro-batch size, and the choice that follows. Imports no torch.

`<stage>/autotune.json` holds it, so every attempt trains with the same choice. Both settings change speed and rounding
only. How long ZeRO's communication takes is not measured: of the stages with which a size fits the lowest is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.settings import Contract

AUTOTUNE_FILE = "autotune.json"
MARGIN = 0.92
"""Of the memory that there is: what a choice may need."""
GAIN = 0.03
"""A larger micro-batch that gains less than this part of the time is not worth its memory."""


class Measured(Contract):
    """Of one micro-batch size, by one process on the longest rows."""

    micro_batch_size: int
    seconds_per_row: float
    memory_bytes: int
    """The most that the process took, alone and without sharding."""
    needs: list[int]
    """Bytes that a process of the stage will need with each ZeRO stage, from 0: the estimate, set right by `memory`."""
    limit_bytes: int
    """What a process may take."""
    may_double: bool
    """Twice the size is expected to fit into one process, too."""

    @property
    def zero_stage(self) -> int | None:
        """The lowest with which it fits."""
        return next((zero for zero, need in enumerate(self.needs) if need <= MARGIN * self.limit_bytes), None)


class Tuning(Contract):
    """The state of the search; `micro_batch_size` and `zero_stage` are set once it is over."""

    measured: list[Measured] = []
    trying: int | None = None
    """Being measured; a container that was killed meanwhile leaves it."""
    micro_batch_size: int | None = None
    zero_stage: int | None = None

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The stage with the choice, once there is one."""
        if self.micro_batch_size is None or self.zero_stage is None:
            raise ValueError("nothing is chosen yet")
        recipe = config.recipe.model_copy(update={"micro_batch_size": self.micro_batch_size})
        return config.model_copy(update={"recipe": recipe, "zero_stage": self.zero_stage})


def next_size(measured: Sequence[Measured], largest: int, too_large: int | None) -> int | None:
    """The micro-batch size to measure next, from 1 by doubling; None: the search is over.

    Args:
        measured: so far, ascending.
        largest: rows that a process has in a step.
        too_large: a size that took too much memory, if one is known.
    """
    if not measured:
        return 1
    last = measured[-1]
    size = min(2 * last.micro_batch_size, largest)
    if last.micro_batch_size >= largest or not last.may_double or (too_large is not None and size >= too_large):
        return None
    best = min((each.seconds_per_row for each in measured[:-2]), default=None)
    if best is not None and min(each.seconds_per_row for each in measured[-2:]) > (1 - GAIN) * best:
        return None
    return size


def choose(measured: Sequence[Measured]) -> tuple[int, int] | None:
    """Micro-batch size and ZeRO stage: the fastest that fits; of about equals the lowest stage, then the smallest."""
    fitting = [(each, each.zero_stage) for each in measured]
    known = [(each, zero) for each, zero in fitting if zero is not None]
    if not known:
        return None
    fastest = min(each.seconds_per_row for each, _ in known)
    equals = [(zero, each.micro_batch_size) for each, zero in known if each.seconds_per_row <= fastest * (1 + GAIN)]
    zero, size = min(equals)
    return size, zero


def table(tuning: Tuning) -> list[str]:
    """Lines of Markdown: what was measured, the chosen size in bold."""
    stages = range(max((len(each.needs) for each in tuning.measured), default=0))
    heads = ["micro-batch", "milliseconds a row", "measured", *(f"needs, ZeRO {zero}" for zero in stages)]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---:' for _ in heads)} |"]
    for each in tuning.measured:
        size = str(each.micro_batch_size)
        cells = [f"**{size}**" if each.micro_batch_size == tuning.micro_batch_size else size]
        cells += [
            f"{1000 * each.seconds_per_row:.3g}",
            *(f"{n / 2**30:.3g} GiB" for n in (each.memory_bytes, *each.needs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(folder: Path) -> str:
    """Of the model card: what `train.autotune` measured and chose for the stage in `folder`."""
    found = Tuning.model_validate_json((folder / AUTOTUNE_FILE).read_bytes())
    chosen = f"Chosen: `microBatchSize` {found.micro_batch_size}, `zeroStage` {found.zero_stage}."
    return "\n".join(["", "## Autotune", "", *table(found), "", chosen, ""])
