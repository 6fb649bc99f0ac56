"""`python -m bench.trainer.ppo_ours WORKLOAD STEPS`: Trimtab's side of the benchmark of PPO, in turns."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench.trainer import data
from bench.trainer.ours import alone, info_of, model_of
from bench.trainer.turns import Turns
from tests.trainer.engine.stages import stage
from transformers import AutoModelForCausalLM

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, StageType
from trimtab_trainer.data.pack import record_rows
from trimtab_trainer.data.store import PreparedData, TokenStore, TokenWriter, epoch_name, write_info, write_plan
from trimtab_trainer.engine.batches import plan_steps
from trimtab_trainer.engine.build import build_loop
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.reward import add_head, write_offset
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.ppo_settings import Critic, KlPenalty, Ppo, Rollout
from trimtab_trainer.supervisor.fence import Fence


def prepare(folder: Path) -> PreparedData:
    """Prompts, one a row."""
    with TokenWriter(folder, data.VOCABULARY) as writer:
        file = writer.add_file("random")
        for line, prompt in enumerate(data.prompts(), start=1):
            writer.append(np.array(prompt, dtype=np.int32), np.zeros(len(prompt), dtype=bool), file, line)
    store = TokenStore(folder, writer.dtype)
    lengths = store.lengths()
    write_plan(
        folder, epoch_name(0), record_rows(np.arange(len(lengths)), lengths, data.MAX_LENGTH, packing=False), store
    )
    write_info(folder, info_of(StageType.PPO, len(lengths), writer.dtype, int(store.offsets[-1])))
    return PreparedData(folder)


def models_in(folder: Path) -> dict[str, Artifact]:
    """A policy and a reward model with random weights."""
    model_of(AutoModelForCausalLM).save_pretrained(folder / "model")
    add_head(folder / "model", 5, dtype=torch.float32).save_pretrained(folder / "reward")
    write_offset(folder / "reward", 0.0)
    kinds: tuple[manifest.Kind, ...] = ("model", "reward")
    return {
        kind: Artifact(uri=(folder / kind).as_uri(), digest=manifest.seal(folder / kind, kind, {})) for kind in kinds
    }


def main() -> None:
    """Train until told to stop."""
    turns = Turns(int(sys.argv[2]))
    group = alone()
    with tempfile.TemporaryDirectory() as folder:
        prepared, models = prepare(Path(folder)), models_in(Path(folder))
        config = stage(
            Artifact(uri=Path(folder).as_uri(), digest=models["model"].digest),
            type=StageType.PPO,
            model=models["model"],
            reference=models["model"],
            reward=models["reward"],
            ppo=Ppo(
                kl=KlPenalty(coefficient=0.05),
                rollout=Rollout(max_new_tokens=data.ANSWER),
                critic=Critic(learning_rate=data.LEARNING_RATE),
                passes=data.PASSES,
            ),
            recipe={
                "learning_rate": data.LEARNING_RATE,
                "global_batch_size": data.EPISODES,
                "micro_batch_size": data.PADDED,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
        )
        engine = Engine(load_model(config, prepared, verify=False), config)
        loop = build_loop(config, group, prepared, engine, Fence(Path(folder), 1), lambda: False, lambda: None)
        turns.wait()
        while True:
            for step in plan_steps(prepared.info.epoch_rows, data.EPISODES, 1_000_000):
                turns.step_done(loop.step(step).tokens, step.stop - step.start)


if __name__ == "__main__":
    main()
