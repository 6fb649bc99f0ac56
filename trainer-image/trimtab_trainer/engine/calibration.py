"""Calibration of a reward model: of the held-out comparisons that it calls 70 % sure, does it get 70 % right?

A comparison's confidence is sigma(abs(difference of the scores)), from 0.5 to 1. Expected calibration error: the mean
distance between confidence and accuracy, bin by bin, weighted by the bins' comparisons (Guo et al. 2017, equation 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_trainer.algorithms.reward import pool_last
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import VALIDATION, PreparedData
from trimtab_trainer.engine.batches import collate, micro_batch_count, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.setup import Engine

BINS = 10
CALIBRATION_PLOT = "calibration.png"


@dataclass(frozen=True)
class Bin:
    """Comparisons of about one confidence."""

    lowest: float
    highest: float
    comparisons: int
    confidence: float
    """Mean."""
    accuracy: float
    """Observed: the share of comparisons that the labels decide as the model does; a soft label counts in part."""


@dataclass(frozen=True)
class Calibration:
    """The bins that hold a comparison, least confident first."""

    bins: list[Bin]
    error: float
    """Expected calibration error, 0 to 0.5 or a little more."""


@torch.no_grad()
def measure(
    engine: Engine, group: Group, prepared: PreparedData, config: TrainConfig, beat: Callable[[], None]
) -> Calibration | None:
    """Of the held-out comparisons; None where there are none. Collective."""
    if not prepared.info.has_validation:
        return None
    engine.deepspeed.eval()
    scores = np.full(prepared.text_count, -np.inf, dtype=np.float32)
    rows, size = prepared.rows(VALIDATION), config.recipe.micro_batch_size
    own = iter(rows_of_rank(0, rows, group.rank, group.size))
    for _ in range(micro_batch_count(rows, group.size, size)):
        chunk = [prepared.row(VALIDATION, i) for i in islice(own, size)]
        batch = collate(chunk, prepared.info.padding_id).to(group.device)
        scores[list(batch.record_ids)] = pool_last(engine.outputs(batch), batch.segment_lengths).cpu().numpy()
        beat()
    engine.deepspeed.train()
    texts = prepared.texts(VALIDATION, 0, rows)
    return calibrate(group.largest(scores)[texts], prepared.labels(texts))


def calibrate(scores: NDArray[np.float32], labels: NDArray[np.void]) -> Calibration | None:
    """Args: scores [T] of the answers, ranking by ranking, and `data.store.LABELS` [T]."""
    compared = list(_comparisons(scores, labels))
    if not compared:
        return None
    differences, probabilities = (np.array(each, dtype=np.float64) for each in zip(*compared, strict=True))
    confidences = 1 / (1 + np.exp(-np.abs(differences)))
    right = np.where(differences > 0, probabilities, 1 - probabilities)
    right[differences == 0] = 0.5
    edges = np.linspace(0.5, 1, BINS + 1)
    which = np.clip(np.searchsorted(edges, confidences, side="right") - 1, 0, BINS - 1)
    bins = [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int(np.count_nonzero(which == i)),
            float(confidences[which == i].mean()),
            float(right[which == i].mean()),
        )
        for i in np.unique(which)
    ]
    error = sum(each.comparisons * abs(each.confidence - each.accuracy) for each in bins) / len(right)
    return Calibration(bins, error)


def _comparisons(scores: NDArray[np.float32], labels: NDArray[np.void]) -> Iterator[tuple[float, float]]:
    """Score of the better answer less that of the other, and the probability that it is better; no ties."""
    starts = np.append(np.flatnonzero(labels["position"] == 0), len(labels))
    for start, stop in pairwise(starts.tolist()):
        for better in range(start, stop):
            for other in range(better + 1, stop):
                if labels["rank"][better] < labels["rank"][other]:
                    yield float(scores[better] - scores[other]), float(labels["probability"][start])


def section(found: Calibration) -> str:
    """Of the model card."""
    rows = [
        f"| {each.lowest:.2f} to {each.highest:.2f} | {each.comparisons:,} "
        f"| {each.confidence:.3f} | {each.accuracy:.3f} |"
        for each in found.bins
    ]
    return "\n".join(
        [
            "",
            "## Calibration",
            "",
            "Held-out comparisons by the model's confidence in its own verdict, sigma(abs(difference)). "
            f"Expected calibration error: {found.error:.3f}.",
            "",
            "| confidence | comparisons | mean confidence | observed accuracy |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"![Observed accuracy over confidence]({CALIBRATION_PLOT})",
            "",
        ]
    )


def draw(found: Calibration, file: Path) -> None:
    """Observed accuracy over confidence; a calibrated model lies on the diagonal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], ":", color="0.5", label="calibrated")
    most = max(each.comparisons for each in found.bins)
    axes.scatter(
        [each.confidence for each in found.bins],
        [each.accuracy for each in found.bins],
        s=[20 + 180 * each.comparisons / most for each in found.bins],
        label="held out; area: comparisons",
    )
    axes.set_xlabel("confidence")
    axes.set_ylabel("observed accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120, metadata={"Software": None})
