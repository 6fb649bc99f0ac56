"""What every side trains on: random tokens in texts of log-normal lengths, and a model with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VOCABULARY, END, PADDING = 4096, 1, 2
MAX_LENGTH = 512
"""Of a prompt with its answer."""
ROW = 1024
"""Tokens of a packed row."""
PADDED = 8
"""Texts or pairs of a padded batch: TRL's default; as many tokens, about, as a packed row has."""
EPISODES, ANSWER, PASSES = 32, 53, 4
"""Of a step of PPO: prompts, the most tokens that answer one, and passes; TRL's defaults."""
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Text:
    """A prompt with its answers, best first, as token ids; each answer ends with `END`."""

    prompt: list[int]
    answers: list[list[int]]


def texts(count: int, answers: int, seed: int = 5) -> list[Text]:
    """Prompts of 35 tokens on average, answers of 80: together 115, with a long tail."""
    rng = np.random.default_rng(seed)

    def ids(mean: float, longest: int) -> list[int]:
        sigma = 0.8
        length = round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma))
        return [int(i) for i in rng.integers(3, VOCABULARY, min(max(2, length), longest))]

    return [Text(ids(35, 128), [[*ids(80, 383), END] for _ in range(answers)]) for _ in range(count)]


def prompts() -> list[list[int]]:
    """For PPO."""
    return [text.prompt for text in texts(2000, 1)]
