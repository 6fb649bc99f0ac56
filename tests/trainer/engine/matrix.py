"""Run by torchrun: five steps of the real loop for each cell of the matrix; each cell's weights go to a file.

Arguments: the prepared folder, the output folder. Cell names: zero-micro-optimizer-precision[-naive].
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.trainer.engine.stages import stage
from torch.nn.functional import cross_entropy

from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import loop
from trimtab_trainer.engine.batches import plan_steps
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.setup import Engine

RECIPE = {
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "global_batch_size": 4,
    "epochs": 2,
    "seed": 7,
}


def cell_name(zero: int, micro: int, optimizer: str, precision: str) -> str:
    return f"{zero}-{micro}-{optimizer}-{precision}"


def cells() -> list[tuple[int, int, str, str]]:
    exact = itertools.product((0, 1, 2, 3), (1, 4), ("sgd", "adamw"), ("fp32",))
    rounded = itertools.product((0, 1, 2, 3), (1,), ("adamw",), ("bf16",))
    return [*exact, *rounded]


def mean_of_micro_batch(logits: torch.Tensor, input_ids: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """The plausible mistake: each micro-batch counts the same, whatever its number of tokens."""
    mask = loss_mask[:, 1:]
    return 6.0 * cross_entropy(logits[:, :-1][mask].float(), input_ids[:, 1:][mask]) if mask.any() else 0 * logits.sum()


def run_cell(config: TrainConfig, prepared: PreparedData, group: Group, out: Path) -> None:
    torch.manual_seed(0)
    engine = Engine(load_model(config, prepared, verify=False), config)
    trainer = loop.Loop(engine, group, prepared, config, lambda: False)
    results = [trainer.step(step) for step in plan_steps(prepared.info.epoch_rows, 4, prepared.info.total_steps)]
    validation = trainer.validate(lambda: None)
    weights = engine.weights()
    if group.is_first:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out.with_suffix(".safetensors"))
        rows = [{"loss": r.loss, "norm": r.gradient_norm, "tokens": r.tokens} for r in results]
        out.with_suffix(".json").write_text(json.dumps({"steps": rows, "validation": validation}))
    engine.deepspeed.destroy()


def main() -> None:
    prepared_folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    group = Group()
    prepared = PreparedData.open(prepared_folder, None)
    artifact = Artifact(uri="pvc://models/unused", digest="sha256:" + "0" * 64)
    for zero, micro, optimizer, precision in cells():
        config = stage(
            artifact,
            zero_stage=zero,
            precision=precision,
            recipe={**RECIPE, "micro_batch_size": micro, "optimizer": optimizer, "epsilon": 1e-6},
        )
        run_cell(config, prepared, group, out / cell_name(zero, micro, optimizer, precision))
    loop.token_loss_sum = mean_of_micro_batch
    config = stage(artifact, recipe={**RECIPE, "micro_batch_size": 1, "optimizer": "sgd"})
    run_cell(config, prepared, group, out / "naive")
    group.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # as the worker: no interpreter shutdown, whose order of destructors may abort a process that has done its work
    os._exit(0)
