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

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trainer.engine.stages import VOCABULARY, stage

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import model
from trimtab_trainer.engine.batches import plan_steps
from trimtab_trainer.engine.build import build_loop
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.ppo import PpoLoop
from trimtab_trainer.engine.rollout_vllm import present_tensors
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Critic, Ema, KlPenalty, Ppo, PretrainingMix, Rollout
from trimtab_trainer.settings import Lora
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
    lora: Lora | None = None
    copied: bool = False
    """The reference is a copy of the starting weights, under another name."""
    resumed: bool = False
    """Each step by models and optimisers of its own, which go on from the last ones' checkpoint."""


ALONE = [Cell(f"alone-{optimizer}", 0, 4, optimizer, clip=1.0, mix=2.0) for optimizer in ("sgd", "adamw")]
MATRIX = [
    Cell(f"matrix-{zero}-{micro}-{optimizer}", zero, micro, optimizer, clip=1.0, mix=2.0)
    for zero, micro, optimizer in ((0, 1, "sgd"), (1, 2, "adamw"), (2, 1, "adamw"), (3, 2, "sgd"))
]
REPLAYED = Cell("plain-twice", ppo=ONE_UPDATE, temperature=0.7)
ONE_STEP = [
    Cell("plain", steps=1, ppo=ONE_UPDATE, temperature=0.7),
    REPLAYED,
    Cell("averaged", zero=3, ppo={**ONE_UPDATE, "ema": Ema(decay=0.75)}, temperature=0.7),
    Cell("mixed", steps=1, ppo=ONE_UPDATE, temperature=0.7, mix=GAMMA),
    Cell("mixed-clipped", steps=1, ppo=ONE_UPDATE, temperature=0.7, mix=GAMMA, clip=CLIP),
]
ADAMW = [
    Cell("without", optimizer="adamw", clip=1.0),
    Cell("zero-coefficient", optimizer="adamw", clip=1.0, mix=0.0),
    Cell("dropout", steps=1, dropout=True),
]
LORA = Lora(rank=4, dropout=0.1)
LORA_ALONE = [
    Cell(f"lora-alone-{optimizer}", 0, 4, optimizer, clip=1.0, mix=2.0, lora=LORA) for optimizer in ("sgd", "adamw")
]
LORA_MATRIX = [
    Cell(f"lora-matrix-{zero}-{micro}-{optimizer}", zero, micro, optimizer, clip=1.0, mix=2.0, lora=LORA)
    for zero, micro, optimizer in ((0, 1, "sgd"), (1, 2, "adamw"), (2, 1, "adamw"), (3, 2, "sgd"))
]
_AVERAGED = {**ONE_UPDATE, "ema": Ema(decay=0.75)}
LORA_ONE_STEP = [Cell("lora-plain", steps=1, ppo=ONE_UPDATE, temperature=0.7, lora=LORA)]
LORA_STEPS = [
    Cell("lora-plain-twice", ppo=ONE_UPDATE, temperature=0.7, lora=LORA),
    Cell("lora-copied", ppo=ONE_UPDATE, temperature=0.7, lora=LORA, copied=True),
    Cell("lora-averaged", zero=3, ppo=_AVERAGED, temperature=0.7, lora=LORA),
    Cell("lora-resumed", zero=3, ppo=_AVERAGED, temperature=0.7, lora=LORA, resumed=True),
]
CELLS = {
    1: [*ALONE, *ONE_STEP, *LORA_ALONE, *LORA_ONE_STEP],
    2: [*MATRIX, *ONE_STEP, *ADAMW, *LORA_MATRIX, *LORA_ONE_STEP, *LORA_STEPS],
}
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
        reference=artifacts["copy" if cell.copied else "model"],
        reward=artifacts["reward"],
        zero_stage=cell.zero,
        lora=cell.lora,
        ppo=Ppo(**{"kl": KlPenalty(coefficient=0.05), "rollout": rollout, **ppo, **cell.ppo}),
        recipe=recipe,
    )


def build(config: TrainConfig, prepared: PreparedData, group: Group, out: Path) -> PpoLoop:
    torch.manual_seed(0)
    engine = Engine(load_model(config, prepared, verify=False), config)
    loop = build_loop(config, group, prepared, engine, Fence(out, 1), lambda: False, lambda: None)
    assert isinstance(loop, PpoLoop)
    return loop


def run_cell(cell: Cell, config: TrainConfig, prepared: PreparedData, group: Group, out: Path) -> int:
    """Returns how often answers were sampled."""
    loop = build(config, prepared, group, out)
    calls: list[int] = []
    answer = loop._judge.answer
    loop._judge.answer = lambda *args: (calls.append(1), answer(*args))[1]
    told = []
    for step in plan_steps(prepared.info.epoch_rows, BATCH, cell.steps):
        if cell.resumed and told:
            loop = resumed(loop, config, prepared, group, out / f"{cell.name}.checkpoint")
        told.append(loop.step(step))
    present = present_tensors(loop.engines["deepspeed"], cell.lora.scaling if cell.lora else 1.0)
    synced = {name: tensor.clone() for name, tensor in present}
    found = {"deepspeed": loop.weights(), "critic": loop.engines["critic"].weights(), "synced": synced}
    for name, weights in found.items():
        if group.is_first:
            save_file({key: t.contiguous() for key, t in weights.items()}, out / f"{cell.name}.{name}.safetensors")
    destroy(loop)
    rows = [{"loss": step.loss, "norm": step.gradient_norm, **step.metrics} for step in told]
    if group.is_first:
        (out / f"{cell.name}.json").write_text(json.dumps({"steps": rows, "state": loop.state}))
    return len(calls)


def crash(config: TrainConfig, prepared: PreparedData, group: Group, out: Path) -> None:
    """Sample both steps, and end before an update has learnt from the second one."""
    loop = build(config, prepared, group, out)
    first, second = plan_steps(prepared.info.epoch_rows, BATCH, 2)
    loop.step(first)
    loop._update = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="not callable"):
        loop.step(second)
    for engine in (loop._models.actor, loop._models.critic):
        engine.deepspeed.destroy()


def replay(config: TrainConfig, prepared: PreparedData, group: Group, out: Path) -> None:
    """Start anew after a crash: with the stored rollouts, with a changed one, with a damaged one."""
    rollouts = local_path(config.folder) / "rollouts"
    crash(config, prepared, group, out)
    sampled = {"replayed": run_cell(Cell("replayed"), config, prepared, group, out)}
    group.barrier()
    if group.is_first:
        change_answer(rollouts / "step-2")
    group.barrier()
    sampled["changed"] = run_cell(Cell("changed"), config, prepared, group, out)
    group.barrier()
    if group.is_first:
        file = rollouts / "step-1" / "rank-0.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    group.barrier()
    sampled["damaged"] = run_cell(Cell("damaged"), config, prepared, group, out)
    if group.is_first:
        (out / "sampled.json").write_text(json.dumps(sampled))


def change_answer(folder: Path) -> None:
    """Its first token becomes another, and the folder is sealed as if that were right."""
    file = folder / "rank-0.safetensors"
    stored = load_file(file)
    stored["answers"][0] = 3 + (stored["answers"][0] - 2) % (VOCABULARY - 3)
    save_file(stored, file)
    lineage = manifest.read_manifest(folder).lineage
    manifest.seal(folder, "rollout", lineage)


def resumed(loop: PpoLoop, config: TrainConfig, prepared: PreparedData, group: Group, folder: Path) -> PpoLoop:
    """Made anew from a checkpoint of it."""
    for name, saved in loop.engines.items():
        saved.save(str(folder), name)
    state = loop.state
    destroy(loop)
    group.barrier()
    again = build(config, prepared, group, folder)
    for name, saved in again.engines.items():
        saved.load(str(folder), name)
    again.state = state
    return again


def destroy(loop: PpoLoop) -> None:
    for name in ("deepspeed", "critic"):
        loop.engines[name].deepspeed.destroy()


def main() -> None:
    root, out = map(Path, sys.argv[1:])
    artifacts = {name: Artifact(**each) for name, each in json.loads((root / "artifacts.json").read_text()).items()}
    prepared = PreparedData.open(local_path(artifacts["prepared"].uri), None)
    group = Group()
    for cell in CELLS[group.size]:
        config = configure(cell, artifacts).model_copy(update={"folder": (out / cell.name).as_uri()})
        with pytest.MonkeyPatch.context() as patch:
            if cell.dropout:
                patch.setattr(model, "disable_dropout", lambda _: None)
            run_cell(cell, config, prepared, group, out)
    replay(
        configure(REPLAYED, artifacts).model_copy(update={"folder": (out / "replay").as_uri()}), prepared, group, out
    )
    group.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the worker
