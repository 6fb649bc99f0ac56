"""K-wise: each answer of a ranking goes through the model once; expanded to pairs, three times."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from bench.trainer import data
from bench.trainer.ours import prepare
from torch import nn
from transformers import PreTrainedConfig

from trimtab_trainer.engine.batches import collate
from trimtab_trainer.engine.networks import Scorer
from trimtab_trainer.engine.objectives import Ranked

TEXTS = data.texts(7, 4)
LENGTHS = [len(text.prompt) + len(answer) for text in TEXTS for answer in text.answers]


class Counting(nn.Module):
    """In place of a backbone and its head: scores by the ids, and how often each text came by."""

    config = PreTrainedConfig()

    def __init__(self) -> None:
        super().__init__()
        self.base_model, self.score = self.hidden, nn.Identity()
        self.tokens, self.forwards = 0, 0

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> list[torch.Tensor]:
        self.tokens += input_ids.numel()
        self.forwards += int((position_ids == 0).sum())
        return [(input_ids * 0.001)[..., None]]


@pytest.mark.parametrize(("workload", "times"), [("rankings", 1), ("pairs", 3)])
def test_r2_each_answer_of_four_is_forwarded_so_often(workload: str, times: int, tmp_path: Path) -> None:
    prepared, model = prepare(tmp_path, workload, TEXTS), Counting()
    scorer, loss = Scorer(model), 0.0
    for index in range(prepared.rows(0)):
        batch = collate([prepared.row(0, index)], data.PADDING)
        loss += float(Ranked().sums(scorer(batch), batch).loss)
    assert model.forwards == times * len(LENGTHS)
    assert model.tokens == times * sum(LENGTHS), "no padding either"
    # the objective is the same: the mean over a ranking's six pairs, or their sum
    expected = 0.0
    for text in TEXTS:
        for best, worse in combinations([answer[-1] * 0.001 for answer in text.answers], 2):
            expected += float(nn.functional.softplus(torch.tensor(worse - best)))
    assert loss == pytest.approx(expected / (6 if times == 1 else 1), rel=1e-5)
