"""What architectures do to their logits: known and done chunk by chunk, or seen and left to the architecture."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tests.trainer.engine.stages import TINY_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab_trainer import chunks
from trimtab_trainer.algorithms.causal_lm import entropy
from trimtab_trainer.data.store import Row
from trimtab_trainer.engine import head
from trimtab_trainer.engine.batches import MicroBatch, collate
from trimtab_trainer.engine.networks import LanguageModel

TEMPERATURE = 0.7
SIZES = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
KNOWN = {
    "llama": {},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.125},
    "gpt2": {},
}
UNKNOWN = {
    "hyperclovax": {"logits_scaling": 4.0},  # multiplies by what Granite divides by
    "phi": {},  # a head with a bias
}


def model_of(model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(4)
    config = AutoConfig.for_model(model_type, **SIZES, initializer_range=0.3, pad_token_id=0, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> MicroBatch:
    """Two rows with seven loss-bearing tokens, of which three fit into a chunk."""
    monkeypatch.setattr(chunks, "CPU_BYTES", 3 * 4 * SIZES["vocab_size"])
    masks = [[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1]]
    return collate([Row(np.arange(3, 3 + len(m)), np.array(m, bool), [len(m)], [0]) for m in masks], padding_id=2)


def expected(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """From the logits that the model itself gives."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.double()
    log_probs = (logits / TEMPERATURE).log_softmax(-1)
    where = [(r, t) for r, t in zip(*batch.loss_mask.nonzero(as_tuple=True), strict=True)]
    found = torch.stack([log_probs[r, t - 1, batch.input_ids[r, t]] for r, t in where])
    return found, torch.stack([entropy(logits[r, t - 1, None] / TEMPERATURE)[0] for r, t in where])


@pytest.mark.parametrize("model_type", [*KNOWN, *UNKNOWN])
def test_log_probs_entropies_and_gradients_are_those_of_the_models_own_logits(
    model_type: str, batch: MicroBatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(model_type, **{**KNOWN, **UNKNOWN}[model_type])
    with caplog.at_level(logging.WARNING):
        network = LanguageModel(model, TEMPERATURE)
    assert (network.head is None) == (model_type in UNKNOWN)
    assert ("the logits of whole rows are kept in memory" in caplog.text) == (model_type in UNKNOWN)
    weights = torch.linspace(-1, 2, 7)
    outputs, theirs = network(batch), expected(model, batch)
    torch.testing.assert_close(outputs.double(), torch.stack(theirs).double(), atol=2e-5, rtol=1e-5)
    ours = torch.autograd.grad((outputs[0] * weights).sum(), list(model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad((theirs[0] * weights).sum(), list(model.parameters()), allow_unused=True)
    for name, one, other in zip(dict(model.named_parameters()), ours, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4, msg=name)


def test_a_map_that_only_large_logits_show_is_seen() -> None:
    """A soft cap that no key of the configuration names, ten times the logits of random weights."""
    model = model_of("llama", tie_word_embeddings=True)
    plain = model.forward

    def capped(**arguments: object) -> object:
        output = plain(**arguments)
        output.logits = 50 * torch.tanh(output.logits / 50)
        return output

    assert head.find_head(model) is not None
    model.forward = capped
    assert head.find_head(model) is None


def test_the_parameters_keep_their_names_and_the_model_its_mode() -> None:
    model = model_of("llama").train()
    network = LanguageModel(model)
    assert model.training
    assert [name for name, _ in network.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]
    assert network.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
