"""Adapters: what they start as, what is trained, how they are merged and saved, and the model without them."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tests.trainer.engine.stages import TINY_LLAMA, stage
from tests.trainer.engine.test_preference import CHOSEN, REJECTED, forward, pairs
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.engine import lora
from trimtab_trainer.engine.batches import MicroBatch, collate
from trimtab_trainer.engine.build import build_objective
from trimtab_trainer.engine.model import disable_dropout
from trimtab_trainer.engine.networks import LanguageModel
from trimtab_trainer.engine.objectives import Pairwise
from trimtab_trainer.engine.setup import parameter_groups
from trimtab_trainer.errors import BadConfiguration, InputMissing, TrainingFailed
from trimtab_trainer.lineage import Lineage, Outcome
from trimtab_trainer.lora_targets import choose_targets, linear_sizes
from trimtab_trainer.settings import Lora, Preference

BASE = Artifact(uri="pvc://models/base", digest="sha256:" + "0" * 64)
TINY_GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
FAMILIES = {
    "llama": ({**TINY_LLAMA, "tie_word_embeddings": True}, 7),
    "gpt2": (TINY_GPT2, 4),  # Conv1D: weights stored as [in, out]
}
IDS = torch.arange(24)[None] * 5 % 64


def config_of(settings: Lora, **changes: Any) -> TrainConfig:
    return stage(BASE, model=BASE, lora=settings, **changes)


def plain_model(keys: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**keys, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def adapted(keys: dict[str, Any], settings: Lora, *, moved: bool = True) -> tuple[PreTrainedModel, TrainConfig]:
    """A model with an adapter; `moved`: as after some steps, with B not 0."""
    model, config = plain_model(keys), config_of(settings)
    lora.add_adapter(model, config, settings)
    if moved:
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.05, generator=generator)
    return model.eval(), config


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


class OneProcess:
    """What `Trained.of` asks of an engine, on a model alone."""

    def __init__(self, module: PreTrainedModel) -> None:
        self.module, self.device, self.deepspeed = module, torch.device("cpu"), LanguageModel(module)

    def outputs(self, batch: MicroBatch) -> torch.Tensor:
        found: torch.Tensor = self.deepspeed(batch)
        return found


def trained(model: PreTrainedModel, config: TrainConfig) -> lora.Trained:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert config.lora is not None
    return lora.Trained.of(OneProcess(model), config, config.lora, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_adapts_every_linear_layer_of_the_blocks_and_trains_nothing_else(family: str) -> None:
    keys, layers = FAMILIES[family]
    model, _ = adapted(keys, Lora(rank=4), moved=False)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 2 * layers
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    assert torch.equal(logits_of(model), logits_of(plain_model(keys))), "B starts at 0"
    (group,) = parameter_groups(model, 0.1)
    sizes = linear_sizes(plain_model(keys))
    assert sum(p.numel() for p in group["params"]) == 4 * sum(sizes.values())
    again, _ = adapted(keys, Lora(rank=4), moved=False)
    pairs_of_weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs_of_weights), "A follows from the seed"


def test_named_targets_and_those_that_do_not_exist() -> None:
    model, _ = adapted(TINY_LLAMA, Lora(targets=["v_proj", "q_proj"]), moved=False)
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 4
    for wrong in ("c_attn", "embed_tokens", "lm_head"):
        with pytest.raises(BadConfiguration, match=f"no linear layer named {wrong}; they have down_proj, gate_proj"):
            adapted(TINY_LLAMA, Lora(targets=["q_proj", wrong]))
    assert choose_targets(Lora(), ["b", "a"]) == ["a", "b"]


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_no_logit_beyond_rounding(family: str) -> None:
    keys, _ = FAMILIES[family]
    model, config = adapted(keys, Lora(rank=4, alpha=6))
    end = trained(model, config)
    merged = plain_model(keys)
    merged.load_state_dict(end.merged, strict=False)
    assert end.merged.keys() == {name for name, _ in merged.named_parameters()}
    assert not torch.allclose(logits_of(model), logits_of(plain_model(keys)), atol=0.1), "the adapter does something"
    torch.testing.assert_close(logits_of(merged), logits_of(model), atol=1e-4, rtol=1e-4)
    end.check_merged(Path("model"), merged)
    with pytest.raises(TrainingFailed, match="merging the adapter changes its answers"):
        end.check_merged(Path("model"), plain_model(keys))


def test_the_adapter_is_read_by_peft_and_names_its_base(tmp_path: Path) -> None:
    for family, (keys, _) in FAMILIES.items():
        model, config = adapted(keys, Lora(rank=4, alpha=6, dropout=0.1))
        folder = tmp_path / family
        lineage = Lineage.of(config, Outcome(1, None, 1, [], [], None), dtype="float32", total_steps=1, versions={})
        trained(model, config).write(folder, lineage)
        found = manifest.verify(folder)
        assert (found.kind, found.lineage["base"]) == ("adapter", {"uri": BASE.uri, "digest": BASE.digest})
        assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 6
        loaded = PeftModel.from_pretrained(plain_model(keys), str(folder)).eval()
        assert torch.equal(logits_of(loaded), logits_of(model)), family


def test_d5_the_model_with_its_adapter_off_is_its_base_and_no_second_copy_is_held() -> None:
    for keys, _ in FAMILIES.values():
        model, _ = adapted(keys, Lora(rank=4))
        base = plain_model(keys)
        before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
        with lora.adapter_off(model):
            assert torch.equal(logits_of(model), logits_of(base))
        assert not torch.equal(logits_of(model), logits_of(base)), "on again"
        assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before


def held_bytes() -> int:
    """Of all parameters alive, each storage once."""
    gc.collect()
    storages = {p.untyped_storage().data_ptr(): p.nbytes for p in gc.get_objects() if type(p) is torch.nn.Parameter}
    return sum(storages.values())


def test_the_reference_of_an_adapter_holds_no_second_copy_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = adapted(TINY_LLAMA, Lora(rank=4))
    changes = {"type": StageType.DPO, "reference": BASE, "preference": Preference()}
    config = plain.model_copy(update=changes)
    group = SimpleNamespace(device=torch.device("cpu"), is_first_of_pod=True)
    batch = collate([pairs(CHOSEN, REJECTED)], padding_id=1)
    before = held_bytes()
    assert before == sum(p.nbytes for p in model.parameters())
    objective = build_objective(config, group, OneProcess(model))  # type: ignore[arg-type]
    assert float(objective.sums(forward(model, batch), batch).loss) != pytest.approx(math.log(2), abs=1e-4)
    assert held_bytes() == before
    # another reference is loaded, and would be held
    other = Artifact(uri="pvc://models/other", digest=BASE.digest)
    monkeypatch.setenv("TRIMTAB_VOLUMES", '{"models": "/nowhere"}')
    with pytest.raises(InputMissing, match="/nowhere/other"):
        build_objective(config.model_copy(update={"reference": other}), group, OneProcess(model))  # type: ignore[arg-type]


def test_dpo_against_the_adapter_off_has_the_loss_and_gradients_of_dpo_against_a_copy() -> None:
    model, _ = adapted(TINY_LLAMA, Lora(rank=4, dropout=0.3))
    disable_dropout(model)
    model.train()
    base = plain_model(TINY_LLAMA)
    batch = collate([pairs(CHOSEN, REJECTED, [8, 2], CHOSEN)], padding_id=1)

    def off(each: Any) -> torch.Tensor:
        with lora.adapter_off(model):
            return forward(model, each)

    found = []
    for reference in (off, lambda each: forward(base, each)):
        model.zero_grad()
        sums = Pairwise(reference, Preference()).sums(forward(model, batch), batch)
        sums.loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(gradients) == 2 * 14
        found.append((sums.loss.detach(), *gradients))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert float(found[0][0]) != pytest.approx(2 * math.log(2), abs=1e-4)
