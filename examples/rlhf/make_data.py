"""Make the data of the example, from the quickstart's running text and its questions with short answers.

| file | records |
| --- | --- |
| `pretrain.jsonl`, `pretrain-heldout.jsonl` | running text |
| `demonstrations.jsonl`, `-heldout` | a question and its answer, in one of the styles that people write |
| `pairs.jsonl`, `-heldout` | the same answer in two styles, and which of them people preferred |
| `prompts.jsonl`, `-heldout` | questions alone |

Questions and answers of the held-out files occur in no other file.

    python examples/rlhf/make_data.py FOLDER
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gold import draw_style, preference

QUICKSTART = Path(__file__).parents[1] / "quickstart" / "make_data.py"
LONGEST_ANSWER = 70
"""Characters: with a hedge and an ending it still fits what `ppo` samples, nearly always."""
STYLES_A_QUESTION = 2
"""Demonstrations of each question."""
HELD_OUT_PAIRS_A_QUESTION = 3
SHARED = ("pretrain.jsonl", "pretrain-heldout.jsonl")

Record = dict[str, str]


def demonstrations(questions: list[tuple[str, str]], generator: random.Random) -> Iterator[Record]:
    """Each question, answered in styles drawn at random."""
    for question, answer in questions:
        for _ in range(STYLES_A_QUESTION):
            yield {"prompt": question, "completion": draw_style(generator).of(answer)}


def pairs(questions: list[tuple[str, str]], each: int, generator: random.Random) -> Iterator[Record]:
    """Of each question `each` pairs of different styles, labelled with the noise of people."""
    for question, answer in questions:
        for _ in range(each):
            first = second = draw_style(generator)
            while first == second:
                second = draw_style(generator)
            couple = [style.of(answer) for style in (first, second)]
            if generator.random() >= preference(*couple):
                couple.reverse()
            yield {"prompt": question, "chosen": couple[0], "rejected": couple[1]}


def read_questions(file: Path) -> list[tuple[str, str]]:
    """Questions with short answers of one of the quickstart's files."""
    conversations = (json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines())
    found = [(turns[0]["content"], turns[1]["content"]) for turns in conversations]
    return [(question, answer) for question, answer in found if len(answer) <= LONGEST_ANSWER]


def make(folder: Path, seed: int = 1, most: int | None = None) -> dict[str, int]:
    """Write the files; returns the number of records in each. `most`: take so many questions and no more."""
    source = folder / "quickstart"
    command = [sys.executable, str(QUICKSTART), str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    generator = random.Random(seed)  # noqa: S311
    counts = {}
    for name in SHARED:
        (source / name).replace(folder / name)
        counts[name] = len((folder / name).read_text(encoding="utf-8").splitlines())
    for ending, each in (("", 1), ("-heldout", HELD_OUT_PAIRS_A_QUESTION)):
        questions = list(islice(read_questions(source / f"sft{ending}.jsonl"), most))
        generator.shuffle(questions)
        kinds = {
            "demonstrations": demonstrations(questions, generator),
            "pairs": pairs(questions, each, generator),
            "prompts": ({"prompt": question} for question, _ in questions),
        }
        for name, records in kinds.items():
            lines = [json.dumps(record) + "\n" for record in records]
            (folder / f"{name}{ending}.jsonl").write_text("".join(lines), encoding="utf-8")
            counts[f"{name}{ending}.jsonl"] = len(lines)
    return counts


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    for file, count in make(Path(sys.argv[1])).items():
        print(f"{file}: {count} records")
