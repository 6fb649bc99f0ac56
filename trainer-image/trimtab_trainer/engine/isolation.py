"""A probe before the first step: do the segments of a packed row really not see each other in this model?"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_trainer.config import StageType
from trimtab_trainer.data.store import PreparedData, Row
from trimtab_trainer.engine.batches import collate
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import BadConfiguration

_TOLERANCE = 1e-3
"""Of the largest output. Masked positions have weight 0, so an isolated segment does not change at all."""


@torch.no_grad()
def check_isolation(engine: Engine, prepared: PreparedData, stage: str) -> None:
    """Change the first of two segments and see whether the second one's outputs move; collective.

    Not every architecture in transformers takes segments from `position_ids`; one that does not would train on
    contaminated rows without a word.

    Raises:
        BadConfiguration: they move, and this stage's rows hold several segments.
    """
    model_type = engine.module.config.model_type
    if prepared.info.type is StageType.SFT and not prepared.info.packing:
        return
    highest = prepared.info.vocabulary_size
    first, second = np.arange(6, dtype=np.int32) % highest, np.arange(3, 9, dtype=np.int32) % highest
    engine.deepspeed.eval()
    one, other = (_second_outputs(engine, head, second) for head in (first, (first + highest // 2) % highest))
    engine.deepspeed.train()
    moved = float((one - other).abs().max())
    if moved > _TOLERANCE * float(one.abs().max()):
        raise BadConfiguration(
            f"{model_type}: records packed into one row see each other in this architecture "
            f"(outputs move by {moved:.2g}); use another architecture, or sft with packing: false",
            stage=stage,
        )


def _second_outputs(engine: Engine, first: NDArray[np.int32], second: NDArray[np.int32]) -> torch.Tensor:
    """fp32 [K, 5 or 6]: outputs for tokens of the second of two packed segments only."""
    ids = np.concatenate([first, second])
    bears_loss = np.arange(len(ids)) > len(first)
    row = Row(ids, bears_loss, [len(first), len(second)], [0, 0])
    batch = collate([row], padding_id=0).to(engine.device)
    return engine.outputs(batch)[:, -np.count_nonzero(bears_loss) :]
