"""A sealed model artifact for the tests: a tiny Llama with random weights, its tokenizer and its chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab_trainer import manifest

SEPARATOR, END_OF_TURN, PADDING = "<|document|>", "<|end|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_artifact(folder: Path, seed: int = 0) -> str:
    """Write a model artifact of about 1 MB to `folder`; returns its digest."""
    folder.mkdir(parents=True)
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(SEPARATOR),
        pad_token_id=tokenizer.convert_tokens_to_ids(PADDING),
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN), pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("A tiny model with random weights.\n", encoding="utf-8")
    return manifest.seal(folder, "model", {"job": "test"})


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[SEPARATOR, END_OF_TURN, PADDING, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([make_artifact.__doc__ or "", TEMPLATE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SEPARATOR, pad_token=PADDING)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
