"""Run by torchrun: the real steps of PPO for each cell; its weights and what it tells go to files.

Arguments: the root that `test_ppo_exact` has filled, and the output folder.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.trainer.engine.stages import stage

from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import model
from trimtab_trainer.engine.batches import plan_steps
from trimtab_trainer.engine.build import build_loop
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Critic, Ema, KlPenalty, Ppo, PretrainingMix, Rollout
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.volumes import local_path

ROWS, BATCH = 9, 5
UPDATES, MIX_ROWS = 8, 24
"""Of two steps with two passes of two minibatches each."""
GAMMA, CLIP = 27.8, 0.5
ONE_UPDATE = {"passes": 1, "minibatches": 1}
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Cell:
    """What differs from one run to the other."""

    name: str
    zero: int = 0
    micro: int = 2
    optimizer: str = "sgd"
    clip: float = 0.0
    steps: int = 2
    mix: float | None = None
    """Its coefficient."""
    ppo: dict[str, Any] = field(default_factory=dict)
    dropout: bool = False
    temperature: float = 1.0


ALONE = [Cell(f"alone-{optimizer}", 0, 4, optimizer, clip=1.0, mix=2.0) for optimizer in ("sgd", "adamw")]
MATRIX = [
    Cell(f"matrix-{zero}-{micro}-{optimizer}", zero, micro, optimizer, clip=1.0, mix=2.0)
    for zero, micro, optimizer in ((0, 1, "sgd"), (1, 2, "adamw"), (2, 1, "adamw"), (3, 2, "sgd"))
]
ONE_STEP = [
    Cell("plain", steps=1, ppo=ONE_UPDATE, temperature=0.7),
    Cell("plain-twice", ppo=ONE_UPDATE, temperature=0.7),
    Cell("averaged", zero=3, ppo={**ONE_UPDATE, "ema": Ema(decay=0.75)}, temperature=0.7),
    Cell("mixed", steps=1, ppo=ONE_UPDATE, temperature=0.7, mix=GAMMA),
    Cell("mixed-clipped", steps=1, ppo=ONE_UPDATE, temperature=0.7, mix=GAMMA, clip=CLIP),
]
ADAMW = [
    Cell("without", optimizer="adamw", clip=1.0),
    Cell("zero-coefficient", optimizer="adamw", clip=1.0, mix=0.0),
    Cell("dropout", steps=1, dropout=True),
]
CELLS = {1: [*ALONE, *ONE_STEP], 2: [*MATRIX, *ONE_STEP, *ADAMW]}
"""By the number of processes."""


def configure(cell: Cell, artifacts: dict[str, Artifact]) -> TrainConfig:
    mix = None if cell.mix is None else PretrainingMix(coefficient=cell.mix, rows_per_update=3)
    rate = LEARNING_RATE if cell.optimizer == "sgd" else 1e-3
    ppo = {"passes": 2, "minibatches": 2, "critic": Critic(learning_rate=rate), "pretraining_mix": mix}
    rollout = Rollout(max_new_tokens=6, missing_end_reward=-1.0, temperature=cell.temperature)
    recipe = {
        "global_batch_size": BATCH,
        "micro_batch_size": cell.micro,
        "optimizer": cell.optimizer,
        "learning_rate": rate,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "clip_norm": cell.clip,
        "epsilon": 1e-6,
    }
    return stage(
        artifacts["prepared"],
        type="ppo",
        model=artifacts["model"],
        reference=artifacts["model"],
        reward=artifacts["reward"],
        zero_stage=cell.zero,
        ppo=Ppo(**{"kl": KlPenalty(coefficient=0.05), "rollout": rollout, **ppo, **cell.ppo}),
        recipe=recipe,
    )


def run_cell(cell: Cell, config: TrainConfig, prepared: PreparedData, group: Group, out: Path) -> None:
    torch.manual_seed(0)
    engine = Engine(load_model(config, prepared, verify=False), config)
    loop = build_loop(config, group, prepared, engine, Fence(out, 1), lambda: False, lambda: None)
    told = [loop.step(step) for step in plan_steps(prepared.info.epoch_rows, BATCH, cell.steps)]
    found = {"deepspeed": loop.weights(), "critic": loop.engines["critic"].weights()}
    for name, weights in found.items():
        if group.is_first:
            save_file({key: t.contiguous() for key, t in weights.items()}, out / f"{cell.name}.{name}.safetensors")
    for name in found:
        loop.engines[name].deepspeed.destroy()
    rows = [{"loss": step.loss, "norm": step.gradient_norm, **step.metrics} for step in told]
    if group.is_first:
        (out / f"{cell.name}.json").write_text(json.dumps({"steps": rows, "state": loop.state}))


def main() -> None:
    root, out = map(Path, sys.argv[1:])
    artifacts = {name: Artifact(**each) for name, each in json.loads((root / "artifacts.json").read_text()).items()}
    prepared = PreparedData.open(local_path(artifacts["prepared"].uri), None)
    group = Group()
    disable = model.disable_dropout
    for cell in CELLS[group.size]:
        model.disable_dropout = (lambda _: None) if cell.dropout else disable
        run_cell(cell, configure(cell, artifacts), prepared, group, out)
    group.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the worker
