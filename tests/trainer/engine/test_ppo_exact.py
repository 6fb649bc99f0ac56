"""PPO's updates: the same over processes, micro-batches and ZeRO stages; the pretraining mix; dropout."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import oracle, stages
from tests.trainer.engine.ppo_cells import (
    BATCH,
    CLIP,
    GAMMA,
    LEARNING_RATE,
    LORA,
    LORA_MATRIX,
    MATRIX,
    MIX_ROWS,
    ROWS,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab_trainer.config import Artifact
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import lora
from trimtab_trainer.engine.reward import add_head, write_offset

Weights = dict[str, torch.Tensor]


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
    shutil.copytree(root / "model", root / "copy")
    artifacts = {
        "prepared": Artifact(uri=folder.as_uri(), digest=prompts.digest),
        "copy": stages.sealed(root / "copy", "model"),
        "model": stages.sealed(root / "model", "model"),
        "reward": stages.sealed(root / "reward", "reward"),
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


def trained(weights: Weights, *more: str) -> Weights:
    """Of a model with an adapter: what may move."""
    return {name: tensor for name, tensor in weights.items() if ".lora_" in name or name in more}


def test_an_adapter_of_a_policy_is_trained_alike_over_processes_micro_batches_and_zero_stages(
    root: Path, by_one: Path, by_two: Path
) -> None:
    start, scoring = (load_file(root / kind / "model.safetensors") for kind in ("model", "reward"))
    for cell in LORA_MATRIX:
        alone = f"lora-alone-{cell.optimizer}"
        for weights, before, more in ((actor, start, ()), (critic, scoring, ("score.weight",))):
            found, wanted = weights(by_two, cell.name), weights(by_one, alone)
            assert distance(trained(found, *more), trained(wanted, *more)) < 2e-6, cell
            frozen = {
                name.replace(".base_layer", ""): found[name] for name in found.keys() - trained(found, *more).keys()
            }
            assert frozen.keys() == before.keys() - {*more}
            assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items()), cell
        for row, other in zip(told(by_two, cell.name)["steps"], told(by_one, alone)["steps"], strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-5), cell
        first, last = told(by_two, cell.name)["steps"]
        assert first["ratio_first"] < 1e-6, "P7; the adapter's own dropout is off, too"
        assert first["kl_sequence"] == 0
        assert abs(last["kl_sequence"]) > 1e-6, "its reference does not move with it"


def added(model: Any, seed: int) -> Weights:
    """A and B at their start."""
    config = stages.stage(Artifact(uri="pvc://models/any", digest="sha256:" + "0" * 64), recipe={"seed": seed})
    lora.add_adapter(model, config, LORA)
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_adapters_first_gradient_follows_from_that_of_all_weights(
    root: Path, by_one: Path, by_two: Path, processes: int
) -> None:
    """dL/dB = s dL/dW A^T, and dL/dA = s B^T dL/dW = 0; the answers are the same, as B begins at 0."""
    out = by_one if processes == 1 else by_two
    models = (
        (actor, AutoModelForCausalLM.from_pretrained(root / "model")),
        (critic, AutoModelForSequenceClassification.from_pretrained(root / "reward")),
    )
    for weights, model in models:
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        adapter = added(model, 42)
        whole, found = weights(out, "plain"), weights(out, "lora-plain")
        moved = {name: (start[name] - whole[name]) / LEARNING_RATE for name in start}
        wanted = {}
        for name, tensor in adapter.items():
            target, _, part = name.partition(".lora_")
            a = adapter[f"{target}.lora_A.default.weight"]
            step = LORA.scaling * moved[f"{target}.weight"] @ a.T if part.startswith("B") else 0
            wanted[name] = tensor - LEARNING_RATE * step
        assert trained(found).keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-4)
        ups = {name: tensor for name, tensor in wanted.items() if ".lora_B." in name}
        assert distance({name: found[name] for name in ups}, ups) < 1e-4
        if weights is critic:
            torch.testing.assert_close(found["score.weight"], whole["score.weight"], atol=1e-6, rtol=1e-5)


def test_the_frozen_weights_are_the_reference_that_a_copy_of_them_would_be(by_two: Path) -> None:
    assert told(by_two, "lora-copied") == told(by_two, "lora-plain-twice")
    for weights in (actor, critic):
        found, wanted = weights(by_two, "lora-copied"), weights(by_two, "lora-plain-twice")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_average_of_an_adapter_is_that_of_its_matrices(root: Path, by_two: Path) -> None:
    start = added(AutoModelForCausalLM.from_pretrained(root / "model"), 42)
    once, twice = (trained(actor(by_two, cell)) for cell in ("lora-plain", "lora-plain-twice"))
    wanted = {name: 0.75**2 * start[name] + 0.75 * 0.25 * once[name] + 0.25 * twice[name] for name in start}
    found = trained(actor(by_two, "lora-averaged"))
    for part in (".lora_A.", ".lora_B."):
        one, other = ({name: each[name] for name in wanted if part in name} for each in (found, wanted))
        assert distance(one, other) < 1e-5
    assert distance(found, twice) > 1e-4


def test_resumed_from_a_checkpoint_without_the_frozen_weights_it_goes_on_bit_for_bit(by_two: Path) -> None:
    assert told(by_two, "lora-resumed") == told(by_two, "lora-averaged")
    for weights in (actor, critic):
        found, wanted = weights(by_two, "lora-resumed"), weights(by_two, "lora-averaged")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    saved = by_two / "lora-resumed.checkpoint"
    for name, more in (("deepspeed", set()), ("critic", {"model.score.weight"})):
        for file in (saved / name).glob("*model_states.pt"):
            held = torch.load(file, weights_only=False)
            assert {each for each in held["module"] if ".lora_" not in each} == more
            assert not held.get("frozen_param_fragments")
    assert all(".lora_" in each for each in load_file(saved / "average.safetensors"))


def test_p13_a_sampler_is_given_the_merged_weights_by_the_names_of_the_model(
    root: Path, by_one: Path, by_two: Path
) -> None:
    names = load_file(root / "model" / "model.safetensors").keys()
    for out, cells in ((by_one, ["alone-sgd", "lora-alone-sgd"]), (by_two, [cell.name for cell in LORA_MATRIX])):
        for cell in cells:
            synced = load_file(out / f"{cell}.synced.safetensors")
            parts = dict(lora.unmerged(actor(out, cell)))
            assert synced.keys() == parts.keys() == names
            assert all(
                torch.equal(synced[name], lora.merge(parts[name], LORA.scaling, transposed=False)) for name in names
            )
