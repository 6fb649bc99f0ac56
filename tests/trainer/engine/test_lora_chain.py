"""LoRA `sft`, then LoRA `dpo` or `ppo`, as real stages: sharded, merged, and the reference of the second."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.trainer.engine import stages
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.data.store import LABELS
from trimtab_trainer.engine.batches import MicroBatch
from trimtab_trainer.engine.model import load_scorer
from trimtab_trainer.ppo_settings import Critic, Ema, Ppo, Rollout
from trimtab_trainer.settings import Lora, Precision, Preference

DROPOUT = {**stages.TINY_LLAMA, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> stages.Run:
    root = tmp_path_factory.mktemp("lora")
    prepared = stages.write_prepared(root, row_counts=[32], batch=8, model_config=DROPOUT)
    return stages.finished(root, stages.stage(prepared, recipe={"global_batch_size": 8}))


def result_of(run: stages.Run) -> Artifact:
    return Artifact(uri=f"{run.config.folder}/model", digest=run.report.digest)


def adapted(start: stages.Run, kind: str, name: str, epochs: int = 12, **changes: object) -> TrainConfig:
    """A LoRA stage that starts from the result of `start`."""
    stage_type = stages.StageType(kind)
    prepared = stages.write_prepared(
        start.root, row_counts=[40] * epochs, batch=16, validation=4, stage_type=stage_type, model_config=DROPOUT
    )
    settings = {
        "stage": name,
        "type": kind,
        "folder": f"pvc://models/tiny/{name}",
        "model": result_of(start),
        "lora": Lora(rank=4, dropout=0.1),
        "recipe": {"global_batch_size": 16, "micro_batch_size": 2, "epochs": epochs, "learning_rate": 1e-2},
        "checkpoint": {"every_steps": 4},
        "processes_per_node": 2,
    }
    if kind == "dpo":
        settings |= {"reference": result_of(start), "preference": Preference(beta=0.5)}
    return stages.stage(prepared, **{**settings, **changes})


@pytest.fixture(scope="module")
def tuned(base: stages.Run) -> stages.Run:
    return stages.finished(base.root, adapted(base, "sft", "sft", zero_stage=3, precision="bf16"))


def weights_of(run: stages.Run, part: str = "model/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run.folder / part)


def test_the_result_is_a_whole_model_with_the_adapter_beside_it(base: stages.Run, tuned: stages.Run) -> None:
    weights, started = weights_of(tuned), weights_of(base)
    assert weights.keys() == started.keys()
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    moved = {name.split(".")[-2] for name in weights if not torch.equal(weights[name], started[name].bfloat16())}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    adapter = manifest.verify(tuned.folder / "adapter")
    assert adapter.kind == "adapter"
    assert adapter.lineage["base"]["digest"] == base.report.digest
    assert adapter.lineage["identity"]["lora"] == {
        "rank": 4,
        "alpha": None,
        "dropout": 0.1,
        "targets": None,
        "quantization": None,
    }
    card = (tuned.folder / "model" / "README.md").read_text()
    assert '"rank": 4' in card
    assert "| `model.embed_tokens` | 0 |" in card
    name = "model.layers.1.mlp.up_proj.weight"
    before = started[name].bfloat16().float()
    distance = float((weights[name].float() - before).norm() / before.norm())
    row = next(line for line in card.splitlines() if line.startswith("| `mlp.up_proj` |"))
    assert float(row.split("|")[4]) == pytest.approx(distance, rel=0.06), "of layer 1, merged, in two digits"
    assert (tuned.folder / "model" / "weight-change.png").exists()
    assert "changed in the weights" not in (base.folder / "model" / "README.md").read_text(), "it was random at first"


def test_dpo_on_the_sft_model_starts_at_ln_2_and_its_reference_is_that_model(
    base: stages.Run, tuned: stages.Run
) -> None:
    fp32 = adapted(tuned, "dpo", "dpo", zero_stage=3)
    run = stages.finished(base.root, fp32)
    first = run.rows()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "D2"
    assert (first["rewardsMargin"], first["accuracy"]) == (0, 0.5)
    told = {metric.name: float(metric.value) for metric in run.report.metrics}
    assert told["rewards_margin"] > 0
    # held to the base instead, the same stage would not start there: the sft stage has moved the model
    against_base = fp32.model_copy(
        update={
            "stage": "other",
            "folder": "pvc://models/tiny/other",
            "reference": result_of(base),
            "processes_per_node": 1,
        }
    )
    other = stages.finished(base.root, against_base)
    assert other.rows()[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    assert manifest.read_manifest(run.folder / "adapter").lineage["base"]["digest"] == tuned.report.digest

    model = AutoModelForCausalLM.from_pretrained(tuned.folder / "model", dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(model, str(run.folder / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, with_adapter(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def scored(base: stages.Run) -> stages.Run:
    recipe = {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2}
    return stages.finished(base.root, adapted(base, "reward", "scored", zero_stage=3, recipe=recipe))


def test_p7_ppo_on_the_sft_model_starts_at_ratio_1_and_kl_0_and_its_reference_is_that_model(
    base: stages.Run, tuned: stages.Run, scored: stages.Run
) -> None:
    ppo = Ppo(rollout=Rollout(max_new_tokens=6), critic=Critic(learning_rate=1e-3), ema=Ema(decay=0.5))
    changes = {"reward": result_of(scored), "ppo": ppo, "zero_stage": 3}
    run = stages.finished(base.root, adapted(tuned, "ppo", "policy", 1, reference=result_of(tuned), **changes))
    first, second, _ = run.rows()
    assert first["ratioFirst"] < 1e-6
    assert first["klSequence"] == 0
    assert abs(second["klSequence"]) > 1e-6
    # held to the base instead, it would not start there
    alone = {"processes_per_node": 1, "folder": "pvc://models/tiny/far"}
    other = stages.finished(base.root, adapted(tuned, "ppo", "far", 1, reference=result_of(base), **changes, **alone))
    assert other.rows()[0]["ratioFirst"] < 1e-6
    assert abs(other.rows()[0]["klSequence"]) > 1e-2

    adapter = manifest.verify(run.folder / "adapter")
    assert adapter.lineage["base"]["digest"] == tuned.report.digest
    model = AutoModelForCausalLM.from_pretrained(tuned.folder / "model", dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(model, str(run.folder / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, with_adapter(ids).logits, atol=1e-4, rtol=1e-4)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(weights_of(run)[name], weights_of(tuned)[name].float()), "it has learnt"
    assert '"rank": 4' in (run.folder / "model" / "README.md").read_text()


def test_r4_a_reward_model_with_an_adapter_trains_its_new_head_whole_and_is_read_back(
    base: stages.Run, scored: stages.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_VOLUMES", json.dumps({"models": str(base.root / "volume")}))
    run, artifact = scored, result_of(scored)
    weights, started = weights_of(run), weights_of(base)
    width = stages.TINY_LLAMA["hidden_size"]
    drawn = torch.randn((1, width), generator=torch.Generator().manual_seed(42)) / math.sqrt(width + 1)
    moved = (weights["score.weight"] - drawn).norm() / drawn.norm()
    assert 0 < float(moved) < 0.5, "learnt, from the head that its seed gives, on every rank"
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], started["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(weights["model.norm.weight"], started["model.norm.weight"])
    assert manifest.verify(run.folder / "model").kind == "reward"

    backbone = AutoModelForSequenceClassification.from_pretrained(base.folder / "model", num_labels=1)
    with_adapter = PeftModel.from_pretrained(backbone, str(run.folder / "adapter")).eval()
    ids, positions = torch.arange(3, 23)[None], torch.arange(20)[None]
    merged, _ = load_scorer(artifact, Precision.FP32, verify=True)  # as the judge and the critic of ppo are loaded
    hidden = with_adapter.base_model.model.model(input_ids=ids, position_ids=positions)[0]
    scores = with_adapter.base_model.model.score(hidden)[..., 0]
    lengths = ((20,),)
    batch = MicroBatch(ids, positions, ids > 0, (20,), lengths, np.empty(0, LABELS))
    torch.testing.assert_close(merged(batch), scores.float(), atol=1e-4, rtol=1e-4)
