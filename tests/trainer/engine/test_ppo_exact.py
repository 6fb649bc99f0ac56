"""PPO's updates: the same over processes, micro-batches and ZeRO stages; the pretraining mix; dropout."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import oracle, stages
from tests.trainer.engine.ppo_cells import BATCH, CLIP, GAMMA, LEARNING_RATE, MATRIX, MIX_ROWS, ROWS
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine.reward import add_head, write_offset

Weights = dict[str, torch.Tensor]


def sealed(root: Path, kind: manifest.Kind) -> Artifact:
    digest = manifest.seal(root, kind, {})
    return Artifact(uri=root.as_uri(), digest=digest)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with a mix, a model whose configuration has dropout, a reward model."""
    root = tmp_path_factory.mktemp("ppo-exact")
    prompts = stages.write_prepared(root, row_counts=[ROWS], batch=BATCH, mix=MIX_ROWS, stage_type=stages.StageType.PPO)
    torch.manual_seed(11)
    config = AutoConfig.for_model(**stages.TINY_LLAMA, initializer_range=0.1, attention_dropout=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    add_head(root / "model", 5, dtype=torch.float32).save_pretrained(root / "reward")
    write_offset(root / "reward", 0.25)
    folder = root / "volume" / "prepared" / prompts.uri.rpartition("/")[2]
    artifacts = {
        "prepared": Artifact(uri=folder.as_uri(), digest=prompts.digest),
        "model": sealed(root / "model", "model"),
        "reward": sealed(root / "reward", "reward"),
    }
    dumped = {name: each.model_dump() for name, each in artifacts.items()}
    (root / "artifacts.json").write_text(json.dumps(dumped))
    return root


def launch(root: Path, processes: int) -> Path:
    out = root / f"by-{processes}"
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--module", "tests.trainer.engine.ppo_cells", str(root), str(out)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return out


@pytest.fixture(scope="module")
def by_one(root: Path) -> Path:
    return launch(root, 1)


@pytest.fixture(scope="module")
def by_two(root: Path) -> Path:
    return launch(root, 2)


def told(out: Path, cell: str) -> Any:
    return json.loads((out / f"{cell}.json").read_text())


def actor(out: Path, cell: str) -> Weights:
    return load_file(out / f"{cell}.deepspeed.safetensors")


def critic(out: Path, cell: str) -> Weights:
    return load_file(out / f"{cell}.critic.safetensors")


def distance(one: Weights, other: Weights) -> float:
    """Relative, in L2."""
    moved = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    return (moved / sum(float(tensor.double().square().sum()) for tensor in other.values())) ** 0.5


def test_p6_p8_processes_micro_batches_and_zero_stages_change_only_rounding(
    root: Path, by_one: Path, by_two: Path
) -> None:
    start = load_file(root / "model" / "model.safetensors")
    for cell in MATRIX:
        alone = f"alone-{cell.optimizer}"
        assert distance(actor(by_two, cell.name), actor(by_one, alone)) < 2e-6, cell
        assert distance(critic(by_two, cell.name), critic(by_one, alone)) < 2e-6, cell
        for row, other in zip(told(by_two, cell.name)["steps"], told(by_one, alone)["steps"], strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-5), cell
        assert distance(actor(by_two, cell.name), start) > 1e-3, "it learns"


def mix_gradient(root: Path) -> Weights:
    """Of the mean next-token loss of the first update's rows, in plain torch; at temperature 1, as rollouts are not."""
    prompts = json.loads((root / "artifacts.json").read_text())["prepared"]["uri"].removeprefix("file://")
    mix = PreparedData(Path(prompts)).pretraining_mix
    assert mix is not None
    model = AutoModelForCausalLM.from_pretrained(root / "model", attn_implementation="eager").eval()
    rows = [mix.row(0, i) for i in range(mix.info.global_batch_size)]
    torch.cat([oracle.token_losses(model, row) for row in rows]).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient(root: Path, out: Path, cell: str) -> Weights:
    """That one step of plain gradient descent took."""
    start, end = load_file(root / "model" / "model.safetensors"), actor(out, cell)
    return {name: (start[name] - end[name]) / LEARNING_RATE for name in end}


@pytest.mark.parametrize("processes", [1, 2])
def test_p11_a_step_adds_gamma_times_the_language_models_gradient_before_clipping(
    root: Path, by_one: Path, by_two: Path, processes: int
) -> None:
    out = by_one if processes == 1 else by_two
    plain, language = gradient(root, out, "plain"), mix_gradient(root)
    wanted = {name: plain[name] + GAMMA * language[name] for name in plain}
    assert distance(gradient(root, out, "mixed"), wanted) < 1e-5
    assert distance(plain, wanted) > 0.1
    norm = sum(float(tensor.double().square().sum()) for tensor in wanted.values()) ** 0.5
    row = told(out, "mixed-clipped")["steps"][0]
    assert row["norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 2 * CLIP
    clipped = {name: tensor * CLIP / norm for name, tensor in wanted.items()}
    assert distance(gradient(root, out, "mixed-clipped"), clipped) < 1e-4


def test_p11_a_coefficient_of_zero_is_plain_ppo_bit_for_bit(by_two: Path) -> None:
    for weights in (actor, critic):
        with_mix, without = weights(by_two, "zero-coefficient"), weights(by_two, "without")
        assert all(torch.equal(with_mix[name], without[name]) for name in without)
    assert told(by_two, "zero-coefficient")["steps"][-1]["pretraining_loss"] > 1
    assert "pretraining_loss" not in told(by_two, "without")["steps"][-1]


def test_p7_the_first_ratio_is_one_and_dropout_would_show(by_two: Path) -> None:
    """The model's configuration has dropout, which the stage turns off."""
    for cell in MATRIX:
        assert all(row["ratio_first"] < 1e-6 for row in told(by_two, cell.name)["steps"]), cell
    assert told(by_two, "dropout")["steps"][0]["ratio_first"] > 1e-3


def test_the_result_is_the_average_of_the_weights_after_each_update(root: Path, by_one: Path, by_two: Path) -> None:
    start = load_file(root / "model" / "model.safetensors")
    for out in (by_one, by_two):
        once, twice = actor(out, "plain"), actor(out, "plain-twice")
        wanted = {name: 0.75**2 * start[name] + 0.75 * 0.25 * once[name] + 0.25 * twice[name] for name in start}
        assert distance(actor(out, "averaged"), wanted) < 1e-6
        assert distance(actor(out, "averaged"), twice) > 1e-4


@pytest.mark.parametrize("processes", [1, 2])
def test_what_was_sampled_before_a_crash_is_not_sampled_again(by_one: Path, by_two: Path, processes: int) -> None:
    out = by_one if processes == 1 else by_two
    assert json.loads((out / "sampled.json").read_text()) == {"replayed": 0, "changed": 0, "damaged": 2}
    calm, crashed = (actor(out, cell) for cell in ("plain-twice", "replayed"))
    assert all(torch.equal(calm[name], crashed[name]) for name in calm)
    assert told(out, "replayed")["steps"] == told(out, "plain-twice")["steps"]


def test_a_stored_answer_is_what_is_learnt_from(by_two: Path) -> None:
    assert distance(actor(by_two, "changed"), actor(by_two, "plain-twice")) > 1e-6


def test_a_damaged_rollout_and_those_after_it_are_sampled_again(by_two: Path) -> None:
    """The changed one came after it; on a CPU sampling again gives the same bits."""
    calm, damaged = (actor(by_two, cell) for cell in ("plain-twice", "damaged"))
    assert all(torch.equal(calm[name], damaged[name]) for name in calm)
