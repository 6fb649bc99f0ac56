"""Stages that are killed at one number of processes and go on at another: the same but for rounding.

A few here; `make test-resume` has every ZeRO stage in both directions, and each type of stage.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import stages
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.engine import universal
from trimtab_trainer.engine.checkpoint import seed_all
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.reward import add_head, write_offset
from trimtab_trainer.ppo_settings import Critic, Ema, KlPenalty, Ppo, PretrainingMix, Rollout
from trimtab_trainer.settings import EarlyStopping, Lora, Preference
from trimtab_trainer.supervisor.launch import torchrun_environment

ROWS = [50, 50, 50]
STEPS, EVERY = 21, 3
"""The last batch of each epoch is smaller."""
BATCH = 8
DIGEST = "sha256:" + "0" * 64
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


CI = [Cell("sft", 3, 2, 1), Cell("ppo", 1, 2, 1)]
ALL = [
    *(Cell("sft", zero, *sizes) for zero in range(4) for sizes in ((2, 1), (1, 2), (2, 3))),
    *(Cell("sft", zero, 2, 1, "bf16") for zero in (0, 2, 3)),
    *(Cell("sft-lora", zero, 1, 2, precision) for zero, precision in ((0, "fp32"), (2, "bf16"), (3, "fp32"))),
    *(Cell(kind, 3, 2, 1) for kind in ("pretrain", "dpo", "reward", "early")),
    *(Cell("ppo", zero, *sizes) for zero, sizes in ((0, (2, 1)), (1, (2, 1)), (2, (1, 2)), (3, (2, 1)))),
    Cell("ppo-lora", 3, 2, 1),
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
    return Start(root, stages.sealed(root / "model", "model"), stages.sealed(root / "reward", "reward"))


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
        "ppo-lora": {"reference": start.model, "reward": start.reward, "ppo": ppo, "lora": Lora(rank=4)},
        "early": {
            # the first measurement stays the best, so its checkpoint, of the first attempt, is the result
            "early_stopping": EarlyStopping(patience=STEPS, minimum_improvement=100.0),
            "validation_every_steps": EVERY,
        },
    }.get(kind, {})


def distance(run: stages.Run, other: stages.Run) -> float:
    """Of the results' weights, relative, in L2."""
    weights, others = (load_file(each.folder / "model" / "model.safetensors") for each in (run, other))
    moved = sum(float((weights[name].double() - others[name].double()).square().sum()) for name in others)
    return (moved / sum(float(tensor.double().square().sum()) for tensor in others.values())) ** 0.5


def test_another_number_of_processes_draws_from_new_seeds_that_can_be_repeated() -> None:
    with torch.random.fork_rng():
        seeds = [(seed_all(7, rank, step), torch.initial_seed())[1] for step in (0, 5, 6) for rank in (0, 1)]
        assert len({*seeds}) == len(seeds)
        seed_all(7, 1, 5)
        assert torch.initial_seed() == seeds[3]


class Evil:
    """Says so when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize(("stage", "name"), [(2, "mp_rank_00"), (3, "zero_pp_rank_0_mp_rank_00")])
def test_no_shard_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, name: str) -> None:
    source, mark = tmp_path / "step-1", tmp_path / "mark"
    source.mkdir()
    for kind, prefix in (("model", name), ("optim", "zero_pp_rank_0_mp_rank_00")):
        torch.save({"module": Evil(mark)}, source / f"{prefix}_{kind}_states.pt")
    environment = torchrun_environment({}, stages.stage(Artifact(uri="pvc://x/y", digest=DIGEST)), tmp_path, 1)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", environment["TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
    alone = SimpleNamespace(rank=0, size=1, is_first=True, barrier=lambda: None)
    with pytest.raises(pickle.UnpicklingError):
        universal.convert(source, tmp_path / "out", stage, cast(Group, alone), lambda: None)
    assert not mark.exists()
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    torch.load(source / f"{name}_model_states.pt", weights_only=False)
    assert mark.exists(), "it would have"


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
        return stages.finished(start.root, configure(start, cell, f"{kind}-{precision}-calm", 1))

    return lambda cell: run(cell.kind, cell.precision)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_killed_it_goes_on_with_another_number_of_processes(
    start: Start, calm: Callable[[Cell], stages.Run], cell: Cell, capsys: pytest.CaptureFixture[str]
) -> None:
    other = calm(cell)
    first = stages.start(start.root, configure(start, cell, cell.name, cell.before))
    last_step = killed(first, cell.before)
    run = stages.finished(start.root, configure(start, cell, cell.name, cell.after, attempt=2))
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
    assert run.report.best_step == (EVERY if cell.kind == "early" else None)
    if cell.kind.startswith("ppo"):
        assert run.log().count("replaying the stored rollout") in (last_step - saved, last_step - saved + 1)
