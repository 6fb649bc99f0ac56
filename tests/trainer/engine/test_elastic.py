"""Stages that are killed at one number of processes and go on at another: the same but for rounding.

A few here; `make test-resume` has every ZeRO stage in both directions, and each type of stage.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import stages
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.engine.reward import add_head, write_offset
from trimtab_trainer.ppo_settings import Critic, Ema, KlPenalty, Ppo, PretrainingMix, Rollout
from trimtab_trainer.settings import EarlyStopping, Lora, Preference

ROWS = [50, 50, 50]
STEPS, EVERY = 21, 3
"""The last batch of each epoch is smaller."""
BATCH = 8
ROUNDING = {"fp32": 2e-6, "bf16": 4e-3}
"""Largest distance of the weights from the undisturbed run's, relative, in L2. bf16 has 8 bits: 2^-8 = 3.9e-3."""


@dataclass(frozen=True)
class Cell:
    """A type of stage, and the numbers of processes before and after the kill."""

    kind: str
    zero: int
    before: int
    after: int
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.kind}-zero{self.zero}-{self.before}to{self.after}-{self.precision}"


CI = [Cell("sft", 3, 2, 1), Cell("sft-lora", 2, 1, 2, "bf16"), Cell("ppo", 1, 2, 1)]
ALL = [
    *(Cell("sft", zero, *sizes) for zero in range(4) for sizes in ((2, 1), (1, 2), (2, 3))),
    *(Cell("sft", zero, *sizes, "bf16") for zero in (0, 2, 3) for sizes in ((2, 1), (1, 2))),
    *(Cell("sft-lora", zero, 2, 1, precision) for zero in range(4) for precision in ("fp32", "bf16")),
    *(Cell(kind, zero, 2, 1) for kind in ("pretrain", "dpo", "reward", "early") for zero in (2, 3)),
    *(Cell("ppo", zero, *sizes) for zero in (0, 2, 3) for sizes in ((2, 1), (1, 2))),
]
CELLS = ALL if os.environ.get("TRIMTAB_ELASTIC") == "all" else CI


@dataclass(frozen=True)
class Start:
    """A model, and a reward model from it."""

    root: Path
    model: Artifact
    reward: Artifact


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    root = tmp_path_factory.mktemp("elastic")
    torch.manual_seed(11)
    config = AutoConfig.for_model(**stages.TINY_LLAMA, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    add_head(root / "model", 5, dtype=torch.float32).save_pretrained(root / "reward")
    write_offset(root / "reward", 0.25)
    return Start(root, sealed(root / "model", "model"), sealed(root / "reward", "reward"))


def sealed(folder: Path, kind: manifest.Kind) -> Artifact:
    return Artifact(uri=folder.as_uri(), digest=manifest.seal(folder, kind, {}))


def finished(ended: tuple[stages.Run, int]) -> stages.Run:
    run, code = ended
    assert code == 0, run.output
    return run


def settings_of(kind: str, start: Start) -> dict[str, Any]:
    """What is particular to each."""
    ppo = Ppo(
        kl=KlPenalty(coefficient=0.05, target=1.0, horizon=10),
        rollout=Rollout(max_new_tokens=6, missing_end_reward=-1.0),
        critic=Critic(learning_rate=1e-3),
        passes=2,
        minibatches=2,
        pretraining_mix=PretrainingMix(coefficient=0.5, rows_per_update=3),
        ema=Ema(decay=0.9),
    )
    return {
        "sft-lora": {"lora": Lora(rank=4)},
        "dpo": {"reference": start.model, "preference": Preference(beta=0.5)},
        "ppo": {"reference": start.model, "reward": start.reward, "ppo": ppo},
        "early": {
            "early_stopping": EarlyStopping(patience=20, minimum_improvement=0.2),
            "validation_every_steps": 1,
        },
    }.get(kind, {})


def distance(run: stages.Run, other: stages.Run) -> float:
    """Of the results' weights, relative, in L2."""
    weights, others = (load_file(each.folder / "model" / "model.safetensors") for each in (run, other))
    moved = sum(float((weights[name].double() - others[name].double()).square().sum()) for name in others)
    return (moved / sum(float(tensor.double().square().sum()) for tensor in others.values())) ** 0.5


def killed(run: stages.Run, processes: int) -> int:
    """Kill a process strictly between two checkpoints; returns the last step that is known of."""
    run.wait_for(lambda: run.rank_pids().keys() == {*range(processes)})
    run.wait_for_step(EVERY + 2)
    os.kill(run.rank_pids()[processes - 1], signal.SIGKILL)
    assert run.finish() == 137, run.output
    return int(run.rows()[-1]["step"])


def configure(start: Start, cell: Cell, name: str, processes: int, attempt: int = 1) -> TrainConfig:
    """Weights decay, norms do not: so it shows if they change places."""
    kind = StageType.SFT if cell.kind == "early" else StageType(cell.kind.split("-")[0])
    prepared = stages.write_prepared(
        start.root,
        row_counts=ROWS,
        batch=BATCH,
        validation=8 if cell.kind == "early" else 0,
        mix=3 * 4 * STEPS if kind is StageType.PPO else 0,
        stage_type=kind,
    )
    return stages.stage(
        prepared,
        **{
            "stage": name,
            "type": kind,
            "folder": f"pvc://models/tiny/{name}",
            "model": start.model if kind is not StageType.PRETRAIN else None,
            "recipe": {
                "global_batch_size": BATCH,
                "micro_batch_size": 2,
                "learning_rate": 3e-3,
                "weight_decay": 0.1,
            },
            "checkpoint": {"every_steps": EVERY, "keep": 2},
            "zero_stage": cell.zero,
            "precision": cell.precision,
            "processes_per_node": processes,
            "attempt": attempt,
            **settings_of(cell.kind, start),
        },
    )


@pytest.fixture(scope="module")
def calm(start: Start) -> Callable[[Cell], stages.Run]:
    """The undisturbed run of one process without shards, once for each type and precision."""

    @cache
    def run(kind: str, precision: str) -> stages.Run:
        cell = Cell(kind, 0, 1, 1, precision)
        return finished(stages.run(start.root, configure(start, cell, f"{kind}-{precision}-calm", 1)))

    return lambda cell: run(cell.kind, cell.precision)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_killed_it_goes_on_with_another_number_of_processes(
    start: Start, calm: Callable[[Cell], stages.Run], cell: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    other = calm(cell)
    first = stages.start(start.root, configure(start, cell, cell.name, cell.before))
    last_step = killed(first, cell.before)
    run = finished(stages.run(start.root, configure(start, cell, cell.name, cell.after, attempt=2)))
    assert f"written by {cell.before} processes, this attempt has {cell.after}" in run.output
    saved = next(row["step"] for row in run.rows() if row["attempt"] == 2) - 1
    assert 0 < saved < last_step
    moved = distance(run, other)
    with capsys.disabled():
        print(f"\n{cell.name}: killed at step {last_step}, resumed from {saved}: weights differ by {moved:.2g}")
    assert moved < ROUNDING[cell.precision]
    assert [row["step"] for row in run.rows()] == [row["step"] for row in other.rows()], "no step twice, none left out"
    near = {"rel": 1e-4, "abs": 1e-5} if cell.precision == "fp32" else {"rel": 0.05}
    assert [row["loss"] for row in run.rows()] == pytest.approx([row["loss"] for row in other.rows()], **near)
    if cell.kind == "ppo":
        assert run.log().count("replaying the stored rollout") in (last_step - saved, last_step - saved + 1)
