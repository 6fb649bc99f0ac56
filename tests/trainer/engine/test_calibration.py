"""Calibration: the bins and the error of known scores."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab_trainer.data.store import LABELS
from trimtab_trainer.engine.calibration import calibrate, section


def pairs(differences: list[float], probability: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    scores = np.array([value for each in differences for value in (each, 0.0)], dtype=np.float32)
    labels = np.array([(i % 2, i % 2, 0, probability) for i in range(len(scores))], dtype=LABELS)
    return scores, labels


def logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def test_a_model_that_is_as_often_right_as_it_says_has_no_error() -> None:
    difference = logit(0.72)
    found = calibrate(*pairs([difference] * 72 + [-difference] * 28))
    assert found is not None
    (only,) = found.bins
    assert (only.comparisons, only.lowest) == (100, pytest.approx(0.7))
    assert only.confidence == pytest.approx(0.72)
    assert only.accuracy == pytest.approx(0.72)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_one_that_is_too_sure_has_the_gap_as_its_error_weighted_by_comparisons() -> None:
    found = calibrate(*pairs([logit(0.97)] * 3 + [-logit(0.97)] + [logit(0.52)] * 6 + [-logit(0.52)] * 6))
    assert found is not None
    assert [(each.comparisons, each.accuracy) for each in found.bins] == [(12, 0.5), (4, 0.75)]
    assert found.error == pytest.approx((12 * 0.02 + 4 * 0.22) / 16, abs=1e-6)
    assert "| 0.95 to 1.00 | 4 | 0.970 | 0.750 |" in section(found)


def test_soft_labels_ties_and_rankings() -> None:
    soft = calibrate(*pairs([logit(0.75), -logit(0.75)], probability=0.75))
    assert soft is not None
    assert soft.bins[0].accuracy == pytest.approx(0.5), "0.75 where it agrees, 0.25 where not"
    same = calibrate(*pairs([0.0]))
    assert same is not None
    assert (same.bins[0].accuracy, same.bins[0].confidence) == (0.5, 0.5)
    labels = np.array([(0, 0, 0, 1), (1, 0, 0, 1), (2, 1, 0, 1)], dtype=LABELS)  # the two best are ties
    ranking = calibrate(np.array([3.0, -3.0, 0.0], dtype=np.float32), labels)
    assert ranking is not None
    assert [(each.comparisons, each.accuracy) for each in ranking.bins] == [(2, 0.5)]
    assert calibrate(np.zeros(0, dtype=np.float32), labels[:0]) is None
