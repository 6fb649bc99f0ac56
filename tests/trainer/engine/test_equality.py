"""The batch law: processes, micro-batches and ZeRO stages change nothing but rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import matrix, oracle, stages

from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import lora
from trimtab_trainer.volumes import local_path

STEPS = 5
LEARNING_RATE = matrix.RECIPE["learning_rate"]


def write(tmp_path_factory: pytest.TempPathFactory, stage_type: stages.StageType) -> PreparedData:
    """Epochs of nine rows in batches of four: the third step has one row, so one of two processes has none."""
    root = tmp_path_factory.mktemp("prepared")
    artifact = stages.write_prepared(
        root, row_counts=[9, 9], batch=4, max_steps=STEPS, validation=5, stage_type=stage_type
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_VOLUMES", json.dumps({"models": str(root / "volume")}))
        return PreparedData.open(local_path(artifact.uri), artifact.digest)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return write(tmp_path_factory, stages.StageType.SFT)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return write(tmp_path_factory, stages.StageType.DPO)


@pytest.fixture(scope="module")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return write(tmp_path_factory, stages.StageType.REWARD)


@pytest.fixture(scope="module")
def reference(prepared: PreparedData) -> dict[str, oracle.Oracle]:
    return {name: oracle.train(prepared, matrix.RECIPE, name) for name in ("sgd", "adamw")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves for two."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-processes"])
def results(
    request: pytest.FixtureRequest,
    prepared: PreparedData,
    pairs: PreparedData,
    rankings: PreparedData,
    shared: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """One launch a world size; it finds neither a compiler nor anything else on PATH."""
    out = tmp_path_factory.mktemp("matrix")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={request.param}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            "--module",
            "tests.trainer.engine.matrix",
            str(prepared.folder),
            str(pairs.folder),
            str(rankings.folder),
            str(shared),
            str(out),
        ],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nonexistent", "CC": "/bin/false", "CXX": "/bin/false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return out


def differences(results: Path, cell: str, expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Largest difference of a weight, and the relative L2 norm of all differences."""
    weights = load_file(results / f"{cell}.safetensors")
    assert weights.keys() == expected.keys()
    found = torch.cat([weights[name].float().flatten() for name in expected])
    wanted = torch.cat([expected[name].flatten() for name in expected])
    return float((found - wanted).abs().max()), float((found - wanted).norm() / wanted.norm())


def test_s1_sgd_equals_plain_torch_and_the_mean_of_means_does_not(
    results: Path, reference: dict[str, oracle.Oracle]
) -> None:
    expected = reference["sgd"].weights
    for zero in range(4):
        for micro in (1, 4):
            largest, _ = differences(results, matrix.cell_name(zero, micro, "sgd", "fp32"), expected)
            assert largest < 1e-6, (zero, micro)
    assert differences(results, "naive", expected)[0] > 1e-4


def test_a_head_that_is_the_embedding_has_the_gradient_of_both(results: Path, prepared: PreparedData) -> None:
    expected = oracle.train(matrix.tied(prepared), matrix.RECIPE, "sgd")
    for cell in matrix.tied_cells():
        assert differences(results, f"tied-{matrix.cell_name(*cell)}", expected.weights)[0] < 1e-6, cell


def test_adamw_equals_plain_torch(results: Path, reference: dict[str, oracle.Oracle]) -> None:
    for zero in range(4):
        for micro in (1, 4):
            cell = matrix.cell_name(zero, micro, "adamw", "fp32")
            largest, relative = differences(results, cell, reference["adamw"].weights)
            assert relative < 2e-6, (cell, relative)
            assert largest < 0.01 * LEARNING_RATE * STEPS, (cell, largest)


def test_reward_models_equal_plain_torch(results: Path, rankings: PreparedData) -> None:
    for name in ("sgd", "adamw"):
        model = oracle.scoring_model(rankings, matrix.RECIPE["seed"])
        expected = oracle.train(rankings, matrix.RECIPE, name, oracle.ranking_losses, model)
        for cell in (matrix.cell_name(*c) for c in matrix.reward_cells() if name in c):
            largest, relative = differences(results, f"reward-{cell}", expected.weights)
            assert largest < 1e-6 if name == "sgd" else relative < 2e-6, (cell, largest, relative)
            told = json.loads((results / f"reward-{cell}.json").read_text())
            assert [row["loss"] for row in told["steps"]] == pytest.approx(expected.losses, abs=1e-6)
            assert told["validation"] == pytest.approx(expected.validation, abs=1e-6)


def test_s9_metrics_are_weighted_by_tokens(results: Path, reference: dict[str, oracle.Oracle]) -> None:
    for zero, micro, optimizer, precision in matrix.cells():
        if precision != "fp32":
            continue
        cell = matrix.cell_name(zero, micro, optimizer, precision)
        told = json.loads((results / f"{cell}.json").read_text())
        assert [step["loss"] for step in told["steps"]] == pytest.approx(reference[optimizer].losses, rel=1e-5), cell
        assert [step["norm"] for step in told["steps"]] == pytest.approx(reference[optimizer].norms, rel=1e-4), cell
        assert told["validation"] == pytest.approx(reference[optimizer].validation, rel=1e-5), cell


def test_bf16_follows_fp32_with_weights_in_bf16(results: Path, reference: dict[str, oracle.Oracle]) -> None:
    for zero in range(4):
        cell = matrix.cell_name(zero, 1, "adamw", "bf16")
        assert {t.dtype for t in load_file(results / f"{cell}.safetensors").values()} == {torch.bfloat16}
        _, relative = differences(results, cell, reference["adamw"].weights)
        assert relative < 4e-3, (cell, relative)  # half a bf16 ulp is 2e-3
        told = json.loads((results / f"{cell}.json").read_text())
        assert [step["loss"] for step in told["steps"]] == pytest.approx(reference["adamw"].losses, rel=1e-2), cell


def test_s8_micro_batches_add_up_in_fp32_where_bf16_would_lose_digits(results: Path) -> None:
    half_ulp = 2**-9
    for zero in range(4):
        errors = json.loads((results / f"accumulated-{zero}.json").read_text())
        # ZeRO 1 (and 0, which runs as 1) rounds the sum once, to reduce it
        assert errors["own"] < (half_ulp if zero < 2 else 1e-6), (zero, errors)
        assert errors["bf16"] > 2 * half_ulp, (zero, errors)


def test_d7_pairs_count_the_same_over_processes_and_micro_batches(results: Path, pairs: PreparedData) -> None:
    losses = oracle.dpo(pairs, matrix.REFERENCE_SEED, matrix.BETA)
    expected = {name: oracle.train(pairs, matrix.RECIPE, name, losses) for name in ("sgd", "adamw")}
    for zero, micro, optimizer, precision in matrix.dpo_cells():
        cell = f"dpo-{matrix.cell_name(zero, micro, optimizer, precision)}"
        wanted = expected[optimizer]
        largest, relative = differences(results, cell, wanted.weights)
        assert largest < (1e-6 if optimizer == "sgd" else 0.01 * LEARNING_RATE * STEPS), (cell, largest)
        assert relative < 2e-6, (cell, relative)
        told = json.loads((results / f"{cell}.json").read_text())
        assert [step["loss"] for step in told["steps"]] == pytest.approx(wanted.losses, rel=1e-5), cell
        assert [step["norm"] for step in told["steps"]] == pytest.approx(wanted.norms, rel=1e-4), cell
        assert told["validation"] == pytest.approx(wanted.validation, rel=1e-5), cell
    assert differences(results, "dpo-naive", expected["sgd"].weights)[0] > 1e-4, "a mean over tokens would show"


def adapter_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The oracle's A and B by peft's names."""
    found = {}
    for name, tensor in weights.items():
        module, _, part = name.partition(".parametrizations.weight.0.")
        if part:
            found[f"{module}.{part}.default.weight"] = tensor
    return found


def test_an_adapter_equals_plain_torch_and_leaves_all_else_as_it_was(
    results: Path, prepared: PreparedData, pairs: PreparedData
) -> None:
    recipe = {**matrix.RECIPE, "learning_rate": matrix.LORA_LEARNING_RATE}
    model = oracle.random_model(prepared, recipe["seed"])
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = matrix.adapted(0, 1, "sgd", "fp32")
    lora.add_adapter(model, config, matrix.LORA)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}

    def trained(data: PreparedData, optimizer: str, losses: oracle.Losses | None) -> oracle.Oracle:
        adapted = oracle.adapted_model(data, recipe["seed"], start, matrix.LORA.scaling)
        return oracle.train(data, recipe, optimizer, losses, adapted)

    to_start = oracle.dpo(pairs, recipe["seed"], matrix.BETA)
    cells = [("lora", prepared, None, cell) for cell in matrix.lora_cells()]
    tied = matrix.tied(prepared)
    cells += [("tied-lora", tied, None, cell) for cell in matrix.tied_cells()]
    cells += [("lora-dpo", pairs, to_start, cell) for cell in matrix.lora_dpo_cells()]
    expected = {
        (kind, optimizer): trained(data, optimizer, losses)
        for kind, data, losses, optimizer in {(kind, data, losses, cell[2]) for kind, data, losses, cell in cells}
    }
    for kind, _, _, (zero, micro, optimizer, precision) in cells:
        wanted = expected[kind, optimizer]
        cell = f"{kind}-{matrix.cell_name(zero, micro, optimizer, precision)}"
        weights = load_file(results / f"{cell}.safetensors")
        adapter = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
        plain = {name.replace(".base_layer", ""): tensor for name, tensor in weights.items() if name not in adapter}
        assert all(torch.equal(plain[name], frozen[name]) for name in plain), cell
        found = adapter_names(wanted.weights)
        assert adapter.keys() == found.keys()
        moved = max(float((start[name] - found[name]).abs().max()) for name in found)
        largest = max(float((adapter[name] - found[name]).abs().max()) for name in found)
        assert moved > 1e-3, "it trains"
        assert largest < (1e-6 if optimizer == "sgd" else 0.01 * recipe["learning_rate"] * STEPS), (cell, largest)
        told = json.loads((results / f"{cell}.json").read_text())
        assert [step["loss"] for step in told["steps"]] == pytest.approx(wanted.losses, rel=1e-5), cell
        assert [step["norm"] for step in told["steps"]] == pytest.approx(wanted.norms, rel=1e-3), cell


def test_the_state_that_one_process_saved_is_in_two_the_same_bit_for_bit(results: Path, shared: Path) -> None:
    """And so is what counts the optimiser's steps, and which parameters decay."""
    for cell in matrix.resized_cells():
        name = matrix.cell_name(*cell)
        told = [json.loads(file.read_text()) for file in shared.glob(f"{name}-by-*.json")]
        assert told
        assert all(each == {"decay": [0.1, 0.0], "steps": [3.0, 3.0]} for each in told), name
        one, *others = (load_file(file) for file in sorted(shared.glob(f"{name}-by-*.safetensors")))
        assert all(float(one[key].abs().sum()) > 0 for key in one), name
        for other in others:
            assert all(torch.equal(one[key], other[key]) for key in one), name
        assert not list(shared.glob(f"{name}/scratch/deepspeed/tmp"))
