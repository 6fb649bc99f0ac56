"""QLoRA with bitsandbytes' CPU kernels: what is rounded, what learns, what is merged, and a killed stage.

Here and not in `tests/trainer`, since the trainer's own environment does not have bitsandbytes.
"""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.trainer.engine import stages
from tests.trainer.engine.test_lora import OneProcess
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.engine import lora
from trimtab_trainer.engine.networks import LanguageModel
from trimtab_trainer.engine.quantized import size, whole
from trimtab_trainer.errors import BadConfiguration, TrainingFailed
from trimtab_trainer.settings import Lora, Preference, Quantization

NF4 = Lora(rank=4, quantization=Quantization.NF4)
SMALL = {**stages.TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128}
BASE = Artifact(uri="pvc://models/base", digest="sha256:" + "0" * 64)
IDS = torch.arange(24)[None] * 5 % 64


def plain() -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**SMALL, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def adapted() -> tuple[PreTrainedModel, TrainConfig]:
    model, config = plain(), stages.stage(BASE, model=BASE, lora=NF4)
    lora.add_adapter(model, config, NF4)
    return model.eval(), config


def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def test_the_frozen_weights_are_rounded_to_four_bits_and_only_the_adapter_learns() -> None:
    (model, _), base = adapted(), plain()
    packed = {name: p for name, p in model.named_parameters() if p.dtype is torch.uint8}
    assert len(packed) == 14, "all linear layers of two blocks"
    for name, parameter in packed.items():
        original = base.get_parameter(name.replace(".base_layer.", "."))
        assert 2 * parameter.nbytes == size(parameter) == original.numel()
        step = (whole(parameter) - original).abs() / original.abs().max()
        assert 0 < float(step.max()) < 0.16, "half of the widest gap between NF4's sixteen values"
    with torch.no_grad():
        moved = (logits(model) - logits(base)).norm() / logits(base).norm()
    assert 0 < float(moved) < 0.5
    before = {name: p.clone() for name, p in packed.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(logits(model)[0, :-1], IDS[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], p) for name, p in packed.items())
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_rows_that_end_within_a_block_are_refused() -> None:
    keys = {**SMALL, "intermediate_size": 96}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    with pytest.raises(BadConfiguration, match=r"layers\.0\.mlp\.down_proj has 96 inputs, no multiple of 64, .*remove"):
        lora.add_adapter(model, stages.stage(BASE, model=BASE, lora=NF4), NF4)


def test_what_is_merged_is_the_rounded_model_that_was_trained() -> None:
    model, config = adapted()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, 0, 0.05)
    tensors = {name: whole(parameter) for name, parameter in model.named_parameters()}
    trained = lora.Trained.of(OneProcess(model), config, NF4, tensors)  # type: ignore[arg-type]
    merged = plain()
    merged.load_state_dict(trained.merged)
    trained.check_merged(Path("here"), merged)
    originals = dict(plain().named_parameters())
    unrounded = {n: originals.get(n.replace(".base_layer.", "."), tensor) for n, tensor in tensors.items()}
    merged.load_state_dict(lora.Trained.of(OneProcess(model), config, NF4, unrounded).merged)  # type: ignore[arg-type]
    with pytest.raises(TrainingFailed, match="merging the adapter changes its answers"):
        trained.check_merged(Path("here"), merged)
    assert LanguageModel(merged).head is not None


def test_dpo_in_four_bits_starts_at_ln_2_and_resumes_bitwise_after_a_kill(tmp_path: Path) -> None:
    first = stages.write_prepared(tmp_path, row_counts=[32], batch=8, model_config=SMALL)
    base, code = stages.run(tmp_path, stages.stage(first, recipe={"global_batch_size": 8}))
    assert code == 0, base.output
    start = Artifact(uri="pvc://models/tiny/base/model", digest=base.report.digest)
    prepared = stages.write_prepared(
        tmp_path, row_counts=[40] * 3, batch=16, stage_type=stages.StageType.DPO, model_config=SMALL
    )

    def stage(name: str) -> TrainConfig:
        return stages.stage(
            prepared,
            stage=name,
            type="dpo",
            folder=f"pvc://models/tiny/{name}",
            model=start,
            reference=start,
            preference=Preference(beta=0.5, reference_log_probs="online"),
            lora=NF4,
            recipe={"global_batch_size": 16, "micro_batch_size": 2, "epochs": 3},
            checkpoint={"every_steps": 2},
            processes_per_node=2,
            zero_stage=2,
            precision="bf16",
        )

    calm, code = stages.run(tmp_path, stage("calm"))
    assert code == 0, calm.output
    assert calm.rows()[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert calm.rows()[0]["rewardsMargin"] == 0
    killed = stages.start(tmp_path, stage("killed"))
    killed.wait_for(lambda: 1 in killed.rank_pids())
    pid = killed.rank_pids()[1]
    killed.wait_for_step(3)
    os.kill(pid, signal.SIGKILL)
    assert killed.finish() == 137
    resumed, code = stages.run(tmp_path, stage("killed").model_copy(update={"attempt": 2}))
    assert code == 0, resumed.output
    assert "resuming from" in resumed.log()
    weights, again = (load_file(each.folder / "model" / "model.safetensors") for each in (calm, resumed))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert [row["loss"] for row in resumed.rows()] == [row["loss"] for row in calm.rows()]
    result = load_file(calm.folder / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert json.loads((calm.folder / "model" / "config.json").read_text()).get("quantization_config") is None
