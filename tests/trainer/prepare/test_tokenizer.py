"""Training a tokenizer."""

from pathlib import Path

import pytest

from trimtab_trainer.data.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer
from trimtab_trainer.errors import BadConfiguration, BadData, InputMissing
from trimtab_trainer.settings import SpecialTokens, TokenizerTraining

TEXTS = ["def print(value): writes the value", "naïve café, 日本語 🙂", "the the the print print"] * 20


def test_the_same_texts_give_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), TokenizerTraining(vocabulary_size=350), tmp_path / name)
    assert tokenizer_digest(tmp_path / "a") == tokenizer_digest(tmp_path / "b")
    train_tokenizer(iter(TEXTS[1:]), TokenizerTraining(vocabulary_size=350), tmp_path / "c")
    assert tokenizer_digest(tmp_path / "a") != tokenizer_digest(tmp_path / "c")


def test_any_text_survives_a_round_trip(tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), TokenizerTraining(vocabulary_size=350), tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer) <= 350
    for text in ("  two  spaces\n\n\ttab .", "Ελληνικά \x00 🙂👩‍👩‍👧", "a ,b . c"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|document|>"


def test_special_tokens_differ(tmp_path: Path) -> None:
    special = SpecialTokens(end_of_turn="<|pad|>")
    with pytest.raises(BadConfiguration, match=r"specialTokens: <\|pad\|> stands for two tokens"):
        train_tokenizer(iter(TEXTS), TokenizerTraining(special_tokens=special), tmp_path / "t")


def test_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no text to train the tokenizer on"):
        train_tokenizer(iter([]), TokenizerTraining(), tmp_path / "t")


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadConfiguration, match="the tokenizer can't be loaded"):
        load_tokenizer(tmp_path)
