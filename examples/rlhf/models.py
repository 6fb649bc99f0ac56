"""Ask and score the models of a finished job with transformers, batched, from their artifacts alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()  # these models load in no time

BATCH = 64
END_OF_TURN = "<|end|>"
Tensor = torch.Tensor


@dataclass(frozen=True)
class Turn:
    """A question and an answer as token ids; the end of turn is the answer's last token where it has ended."""

    prompt: list[int]
    answer: list[int]
    text: str = ""
    ended: bool = True


@dataclass(frozen=True)
class Batch:
    """Turns padded on the right: ids and mask [B, T], and which tokens are the answer's [B, T]."""

    ids: Tensor
    mask: Tensor
    answer: Tensor


class Tokens:
    """The job's tokenizer, the same for all its stages."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        self.end: Any = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def turn(self, prompt: str, answer: str) -> Turn:
        """A turn that ends."""
        return Turn(self.prompt(prompt), [*self._ids(answer), self.end], answer)

    def prompt(self, text: str) -> list[int]:
        """A question up to where the answer begins."""
        messages = [{"role": "user", "content": text}]
        return self._ids(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def sampled(self, prompt: list[int], generated: list[int]) -> Turn:
        """A turn of what `generate` returned, padding behind the end of turn included."""
        ended = self.end in generated
        answer = generated[: generated.index(self.end) + 1] if ended else generated
        text = self.tokenizer.decode(answer[:-1] if ended else answer, skip_special_tokens=False)
        return Turn(prompt, answer, text, ended)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def padded(turns: Sequence[Turn], padding: int = 0) -> Batch:
    """One batch of turns."""
    longest = max(len(turn.prompt) + len(turn.answer) for turn in turns)
    ids, mask, answer = [], [], []
    for turn in turns:
        used, rest = len(turn.prompt) + len(turn.answer), [0] * longest
        ids.append([*turn.prompt, *turn.answer, *[padding] * (longest - used)])
        mask.append([1] * used + rest[used:])
        answer.append([0] * len(turn.prompt) + [1] * len(turn.answer) + rest[used:])
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(answer))


def batched(turns: Sequence[Turn], function: Callable[[Batch], Tensor]) -> Tensor:
    """`function` of all turns, [N]; turns of like length go together, one batch to a core.

    Several threads to a batch would wait for each other at each operation: with a small model, most of the time.
    """
    order = sorted(range(len(turns)), key=lambda i: len(turns[i].prompt) + len(turns[i].answer))
    found = torch.empty(len(turns), dtype=torch.float64)
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]

    @torch.inference_mode()
    def run(part: list[int]) -> Tensor:
        return function(padded([turns[i] for i in part])).double()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part, values in zip(parts, pool.map(run, parts), strict=True):
            found[part] = values
    return found


class Policy:
    """A language model that answers."""

    def __init__(self, folder: Path, tokens: Tokens) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model.eval()
        self._tokens = tokens

    @torch.inference_mode()
    def sample(self, prompts: Sequence[str], each: int, longest: int, seed: int) -> list[Turn]:
        """`each` answers to each prompt, one prompt's together: temperature 1, from the whole distribution."""
        torch.manual_seed(seed)
        tokens, turns = self._tokens, []
        for start in range(0, len(prompts), BATCH):
            asked = [tokens.prompt(prompt) for prompt in prompts[start : start + BATCH]]
            inputs = tokens.tokenizer.pad({"input_ids": asked}, return_tensors="pt")
            out = self._model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=longest,
                num_return_sequences=each,
                eos_token_id=tokens.end,
                pad_token_id=tokens.tokenizer.pad_token_id,
            )
            generated = out[:, inputs["input_ids"].shape[1] :].tolist()
            turns += [tokens.sampled(asked[i // each], ids) for i, ids in enumerate(generated)]
        return turns

    def log_probs(self, turns: Sequence[Turn]) -> Tensor:
        """Of each turn log π(answer | prompt) in nats, [N]."""

        def summed(batch: Batch) -> Tensor:
            chosen = self._log_softmax(batch).gather(2, batch.ids[:, 1:, None]).squeeze(2)
            return (chosen * batch.answer[:, 1:]).sum(dim=1)

        return batched(turns, summed)

    def divergence(self, turns: Sequence[Turn], reference: Policy) -> Tensor:
        """KL(π ‖ reference) of a sequence in nats, estimated along each of π's own samples, [N].

        Of each next token the divergence is exact, so the estimate scatters less than the log-ratio of the sample, and
        its expectation is the same (Amini et al. 2025, "Better Estimation of the KL Divergence Between Language
        Models").
        """

        def summed(batch: Batch) -> Tensor:
            own, other = self._log_softmax(batch), reference._log_softmax(batch)
            return ((own.exp() * (own - other)).sum(dim=2) * batch.answer[:, 1:]).sum(dim=1)

        return batched(turns, summed)

    def answer_loss(self, turns: Sequence[Turn]) -> float:
        """Negative log-likelihood of the answers, nats a token, ends of turn included."""
        return float(-self.log_probs(turns).sum() / sum(len(turn.answer) for turn in turns))

    def _log_softmax(self, batch: Batch) -> Tensor:
        """Of the token after each place but the last: [B, T − 1, V]."""
        logits = self._model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return torch.log_softmax(logits[:, :-1].float(), dim=-1)


class RewardModel:
    """A reward artifact: the score of the last token, less the offset."""

    def __init__(self, folder: Path) -> None:
        load = AutoModelForSequenceClassification.from_pretrained
        self._model: Any = load(folder, local_files_only=True, dtype=torch.float32)
        self._model.eval()
        self._offset = float(json.loads((folder / "reward.json").read_bytes())["offset"])

    def rewards(self, turns: Sequence[Turn]) -> Tensor:
        """Reward of each turn, [N]."""

        def last(batch: Batch) -> Tensor:
            states = self._model.base_model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
            ends = batch.mask.sum(dim=1) - 1
            scores: Tensor = self._model.score(states[torch.arange(len(ends)), ends]).squeeze(1)
            return scores

        return batched(turns, last) - self._offset
