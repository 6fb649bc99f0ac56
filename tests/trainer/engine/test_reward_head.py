"""The reward model's head before training, and how it is read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab_trainer.engine.reward import add_head, read_offset, write_offset
from trimtab_trainer.errors import CorruptArtifact

WIDTH = 2048
CONFIG = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("language-model")
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).save_pretrained(path)
    return path


def head(folder: Path, seed: int) -> torch.Tensor:
    return add_head(folder, seed).score.weight.detach()


def test_r4_the_head_has_the_published_spread(folder: Path) -> None:
    weights = head(folder, 7)
    assert weights.shape == (1, WIDTH)
    wanted = (WIDTH + 1) ** -0.5
    # of n values the deviation's own relative error is 1 / sqrt(2 n): five of them
    assert float(weights.std()) == pytest.approx(wanted, rel=5 * (2 * WIDTH) ** -0.5)
    assert abs(float(weights.mean())) < 5 * wanted * WIDTH**-0.5


def test_r4_the_head_depends_on_the_seed_alone_so_ranks_agree(folder: Path) -> None:
    torch.manual_seed(0)
    first = head(folder, 7)
    torch.manual_seed(1)  # another rank's generator stands elsewhere
    torch.rand(3)
    assert torch.equal(head(folder, 7), first)
    assert not torch.equal(head(folder, 8), first)


def test_r4_the_head_is_saved_and_read_back(folder: Path, tmp_path: Path) -> None:
    model = add_head(folder, 7)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.score.weight, model.score.weight)


def test_r6_the_offset_is_read_back_exactly_and_its_loss_is_told(tmp_path: Path) -> None:
    write_offset(tmp_path, 0.1 + 0.2)
    assert read_offset(tmp_path) == 0.1 + 0.2
    (tmp_path / "reward.json").unlink()
    with pytest.raises(CorruptArtifact, match="holds no offset"):
        read_offset(tmp_path)
