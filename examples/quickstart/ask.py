"""Put held-out questions to the base and the fine-tuned model, and say honestly what changed.

A model this small learns the form of an answer, hardly its content: so beside the loss this counts how answers end, how
many differ, and what the loss is when each answer is scored under another question.

    trimtab local run job.yaml --exec "python ask.py sft-heldout.jsonl"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

SHOWN = 3
ASKED = 240
"""Held-out questions that are measured; at least 200 must be there."""
LONGEST = 64
"""Tokens of an answer."""
AT_ONCE = 32
END_OF_TURN = "<|end|>"
LEAST_FALL = 0.5
"""Nats a token by which the loss must fall."""
LEAST_ENDED = 0.9
"""Share of answers that must end with the end of turn."""


@dataclass(frozen=True)
class Pair:
    """A held-out question with its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """A greedy answer; `end` is the token that ended it, None where it ran into the limit.

    `prompt_tokens` is the length of the rendered question: where an answer to it starts.
    """

    text: str
    end: str | None
    prompt_tokens: int


@dataclass(frozen=True)
class Findings:
    """What one model did. Losses are nats a token over all answers' tokens, the end token left out."""

    answers: list[Answer]
    loss: float
    shuffled_loss: float

    @property
    def ends(self) -> Counter[str]:
        """How many answers each token ended."""
        return Counter(answer.end for answer in self.answers if answer.end)

    @property
    def ended(self) -> float:
        """Share of answers that end with the end of turn."""
        return self.ends[END_OF_TURN] / len(self.answers)


class Model:
    """One endpoint, asked at most `AT_ONCE` times at once."""

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self._client = AsyncOpenAI(base_url=url, api_key="none", timeout=300)
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def answer(self, question: str) -> Answer:
        """The greedy answer."""
        async with self._slots:
            reply = await self._client.chat.completions.create(
                model=self.name,
                messages=[{"role": "user", "content": question}],
                max_tokens=LONGEST,
                temperature=0,
                logprobs=True,
            )
        choice = reply.choices[0]
        tokens = choice.logprobs.content if choice.logprobs and choice.logprobs.content else []
        return Answer(
            (choice.message.content or "").strip(),
            tokens[-1].token if choice.finish_reason == "stop" else None,
            reply.usage.prompt_tokens if reply.usage else 0,
        )

    async def loss(self, pair: Pair, start: int) -> tuple[float, int]:
        """Negative log-likelihood of the answer without its end token, in nats, and its number of tokens.

        The answer starts at token `start`.
        """
        async with self._slots:
            reply = await self._client.chat.completions.create(
                model=self.name,
                messages=[
                    {"role": "user", "content": pair.question},
                    {"role": "assistant", "content": pair.answer},
                ],
                max_tokens=1,
                extra_body={"prompt_logprobs": 0, "add_generation_prompt": False},
            )
        entries: list[dict[str, Any]] = reply.model_extra["prompt_logprobs"][start:] if reply.model_extra else []
        tokens = [next(iter(entry.values())) for entry in entries]
        ends = [i for i, token in enumerate(tokens) if token["decoded_token"] == END_OF_TURN]
        text = tokens[: ends[-1]]
        return -sum(token["logprob"] for token in text), len(text)

    async def findings(self, pairs: list[Pair]) -> Findings:
        """Ask and score everything. Shuffled: each answer under the question of the pair half the list away."""
        half = len(pairs) // 2
        shuffled = [
            Pair(other.question, pair.answer) for pair, other in zip(pairs, pairs[half:] + pairs[:half], strict=True)
        ]
        answers = await asyncio.gather(*(self.answer(pair.question) for pair in pairs))
        starts = {pair.question: answer.prompt_tokens for pair, answer in zip(pairs, answers, strict=True)}
        right, wrong = await asyncio.gather(
            asyncio.gather(*(self.loss(pair, starts[pair.question]) for pair in pairs)),
            asyncio.gather(*(self.loss(pair, starts[pair.question]) for pair in shuffled)),
        )
        return Findings(answers, _per_token(right), _per_token(wrong))


def _per_token(losses: list[tuple[float, int]]) -> float:
    return sum(nats for nats, _ in losses) / sum(count for _, count in losses)


def read_pairs(path: Path) -> list[Pair]:
    """Held-out pairs, evenly spaced over the file."""
    records = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [Pair(messages[0]["content"], messages[1]["content"]) for messages in records]
    if len(pairs) < 200:
        raise SystemExit(
            f"{path}: {len(pairs)} held-out questions; at least 200 are needed for a figure worth printing"
        )
    step = max(1, len(pairs) // ASKED)
    return pairs[::step][:ASKED]


def report(console: Console, pairs: list[Pair], base: Findings, tuned: Findings) -> None:
    """The answers side by side, then the figures."""
    answers = Table(title="Three held-out questions", show_lines=True)
    for column in ("question", "true answer", "before fine-tuning", "after"):
        answers.add_column(column, ratio=1)
    for i in range(0, len(pairs), len(pairs) // SHOWN)[:SHOWN]:
        answers.add_row(pairs[i].question, pairs[i].answer, base.answers[i].text, tuned.answers[i].text)
    console.print(answers)

    figures = Table(title=f"{len(pairs)} held-out questions")
    figures.add_column("")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right")
    rows = {
        "answer loss, nats a token, end token left out": lambda f: f"{f.loss:.3f}",
        "the same, each answer under another question": lambda f: f"{f.shuffled_loss:.3f}",
        f"answers that end by themselves with {END_OF_TURN}": lambda f: f"{f.ended:.0%}",
        "answers that end with another token": lambda f: _others(f),
        "different answers": lambda f: str(len({answer.text for answer in f.answers})),
        "words in an answer, median": lambda f: f"{statistics.median(len(a.text.split()) for a in f.answers):.0f}",
    }
    for label, figure in rows.items():
        figures.add_row(label, figure(base), figure(tuned))
    console.print(figures)
    fit = tuned.shuffled_loss - tuned.loss
    console.print(
        f"Fine-tuning took {base.loss - tuned.loss:.2f} nats a token off the loss of the answers. The right question "
        f"is worth {fit:.3f} nats: a model of this size learns the form of an answer, and little of its content."
    )


def _others(findings: Findings) -> str:
    others = {token: count for token, count in findings.ends.items() if token != END_OF_TURN}
    return ", ".join(f"{count / len(findings.answers):.0%} {token}" for token, count in others.items()) or "0%"


async def main() -> int:
    """Ask both models; 1 when fine-tuning did not do what it must."""
    parser = argparse.ArgumentParser(description="Compare the base and the fine-tuned model of the quickstart.")
    parser.add_argument("pairs", type=Path, help="held-out pairs, JSONL")
    parser.add_argument("--svg", type=Path, help="also draw the report into this file")
    arguments = parser.parse_args()
    urls = json.loads(os.environ["TRIMTAB_ENDPOINTS"])
    pairs = read_pairs(arguments.pairs)
    console = Console(record=True, width=120)
    base = await Model("quickstart-base", urls["quickstart-base"]).findings(pairs)
    tuned = await Model("quickstart", urls["quickstart"]).findings(pairs)
    report(console, pairs, base, tuned)
    failures = []
    if base.loss - tuned.loss < LEAST_FALL:
        failures.append(f"the answer loss fell by {base.loss - tuned.loss:.2f} nats, not by {LEAST_FALL}")
    if tuned.ended < LEAST_ENDED:
        failures.append(f"{tuned.ended:.0%} of the answers end with {END_OF_TURN}, not {LEAST_ENDED:.0%}")
    for failure in failures:
        console.print(f"[red]Not good enough:[/red] {failure}")
    if arguments.svg:
        svg = console.export_svg(title="make demo")
        # The picture must not fetch fonts from the network; it names "monospace" as a fallback.
        arguments.svg.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
