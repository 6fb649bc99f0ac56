"""Instruction tuning on real data: the job's counts against an independent count of the FLAN files.

The count reads the raw files, applies the published mixing rule, words, renders and tokenizes with `transformers` and
the artifact's own tokenizer, and imports nothing of the project. Which records a cap selects, in which wording and
after which examples, is left to the seed: they are read from the prepared folder's public files, and must be as many
distinct records of each file as the rule says, each in one of the four wordings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tests.local.acceptance.folder import PATIENCE_SECONDS, Folder
from transformers import AutoTokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "flan"
STAGE = yaml.safe_load((EXAMPLE / "job.yaml").read_text(encoding="utf-8"))["spec"]["stages"][0]["sft"]
SOURCES = {source["uri"].rpartition("/")[2]: source for source in STAGE["data"]}
TEXT, TASK, FEW_SHOT = "text.jsonl", "qasc_train.tsv", "strategyqa_train.tsv"
CAPS = {name: source["cap"] for name, source in SOURCES.items() if name not in (TEXT, TASK)}
MAX_LENGTH = STAGE["maxLength"]

Record = tuple[str, int]
"""File name and line, counted from 1."""


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("TRIMTAB_FLAN_DATA", "")
    if not folder or not all((Path(folder) / name).is_file() for name in (*CAPS, TASK)):
        pytest.skip(f"TRIMTAB_FLAN_DATA={folder!r} is no folder with {', '.join(CAPS)}: the FLAN job was NOT run")
    return Path(folder)


@pytest.fixture(scope="module")
def flan(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The example, run to its end."""
    folder = Folder(tmp_path_factory.mktemp("flan") / "work")
    command = [sys.executable, str(EXAMPLE / "run.py"), str(folder.root)]
    environment = {**os.environ, "TRIMTAB_FLAN_DATA": str(data)}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def prepared(flan: Folder) -> Path:
    digest = flan.stage("flan", "instruct")["prepared"]["digest"]
    return flan.claim("flan") / "models" / "prepared" / digest.removeprefix("sha256:")


@dataclass(frozen=True)
class Segment:
    """A record as a row holds it: its tokens, and which of them bear loss."""

    record: Record
    ids: list[int]
    loss: list[bool]


def read_plan(prepared: Path, plan: str) -> list[list[Segment]]:
    """The rows of a plan, in training order."""
    names = json.loads((prepared / "files.json").read_bytes())
    files, lines = (np.load(prepared / f"{what}_of_record.npy") for what in ("file", "line"))
    segments, rows = (np.load(prepared / f"{plan}.{what}.npy") for what in ("segments", "rows"))
    offsets = np.load(prepared / "offsets.npy")
    tokens, loss = np.fromfile(prepared / "tokens.bin", "<u2"), np.fromfile(prepared / "loss.bin", "?")
    assert (segments[:, 1] == 0).all(), "whole records"

    def segment(record: int, length: int) -> Segment:
        part = slice(offsets[record], offsets[record] + length)
        place = names[files[record]].rpartition("/")[2], int(lines[record])
        return Segment(place, tokens[part].tolist(), loss[part].tolist())

    return [
        [segment(record, length) for record, _, length in segments[start:stop].tolist()]
        for start, stop in pairwise(rows)
    ]


@pytest.fixture(scope="module")
def epoch(prepared: Path) -> list[list[Segment]]:
    return read_plan(prepared, "epoch-0000")


def wordings(question: str, target: str, rationale: str) -> list[tuple[str, str]]:
    """The example's four templates by hand."""
    return [
        (question, f"{rationale}\nThe answer is {target}"),
        (f"{question}\nThink first.", f"{rationale} So the answer is {target}."),
        (f"{question}\nAnswer at once.", target),
        (f"Ask something to which the answer is: {target}, as {rationale}", question),
    ]


@pytest.fixture(scope="module")
def raw(data: Path) -> dict[Record, tuple[str, str, str]]:
    """Input, target and rationale of every line of every file."""
    found = {}
    for name in (*CAPS, TASK):
        for number, line in enumerate((data / name).read_bytes().decode().split("\n"), 1):
            if line:
                question, target, rationale = line.rstrip("\r").replace("\\n", "\n").split("\t")
                found[name, number] = (question, target, rationale)
    return found


def test_the_job_is_complete(flan: Folder) -> None:
    status = flan.get("ftj")["flan"]["status"]
    assert [each["status"] for each in status["conditions"] if each["type"] == "Complete"] == ["True"]
    assert (flan.artifact("flan", "instruct") / "model.safetensors").is_file()


def test_an_epoch_takes_of_each_file_its_records_up_to_the_cap(
    flan: Folder, epoch: list[list[Segment]], raw: dict[Record, Any]
) -> None:
    sizes = Counter(name for name, _ in raw)
    expected = {name: min(sizes[name], cap) for name, cap in CAPS.items()}
    assert any(sizes[name] > cap for name, cap in CAPS.items()), "a cap that cuts"
    assert any(sizes[name] < cap for name, cap in CAPS.items()), "and one that does not"
    everything = [segment.record for row in epoch for segment in row]
    records = [record for record in everything if record[0] != TEXT]
    assert Counter(name for name, _ in records) == expected
    assert len(set(records)) == len(records), "no record twice in an epoch"
    assert set(records) <= set(raw)
    assert flan.stage("flan", "instruct")["prepared"]["records"] == len(everything) > len(records)


def test_the_files_are_mixed_in_proportion_all_along_the_epoch(epoch: list[list[Segment]]) -> None:
    rates = Counter(segment.record[0] for row in epoch for segment in row)
    total = sum(rates.values())
    quarter = [segment.record[0] for row in epoch[: len(epoch) // 4] for segment in row]
    for name, count in Counter(quarter).items():
        expected = len(quarter) * rates[name] / total
        assert abs(count - expected) < 5 * expected**0.5, name
    assert set(quarter) == {*CAPS, TEXT}


def test_running_text_is_the_fraction_of_the_loss_bearing_tokens(epoch: list[list[Segment]]) -> None:
    counts = [(segment.record[0] == TEXT, sum(segment.loss)) for row in epoch for segment in row]
    replayed = [count for is_text, count in counts if is_text]
    target = SOURCES[TEXT]["fraction"] * sum(count for _, count in counts)
    assert abs(sum(replayed) - target) <= max(replayed)
    assert all(sum(s.loss) == len(s.ids) - 1 for row in epoch for s in row if s.record[0] == TEXT)


def test_the_tokens_are_those_of_an_independent_count(
    flan: Folder, epoch: list[list[Segment]], raw: dict[Record, tuple[str, str, str]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(flan.artifact("flan", "instruct"), local_files_only=True)

    def rendered(question: str, answer: str) -> str:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False))

    texts = [[rendered(*each) for each in wordings(*fields)] for fields in raw.values()]
    ids = tokenizer([text for each in texts for text in each], add_special_tokens=False, truncation=False)["input_ids"]
    candidates = {record: ids[4 * i : 4 * i + 4] for i, record in enumerate(raw)}
    worded = {record: set(texts[i]) for i, record in enumerate(raw)}
    of_few_shot = {text: record for record in raw if record[0] == FEW_SHOT for text in worded[record]}
    used: Counter[int] = Counter()
    shots: Counter[int] = Counter()
    for segment in (segment for row in epoch for segment in row if segment.record[0] != TEXT):
        record, own = segment.record, candidates[segment.record]
        found = [i for i in range(4) if own[i][:MAX_LENGTH] == segment.ids]
        if not found:  # examples stand before it
            *examples, last = [f"<|user|>{turn}" for turn in tokenizer.decode(segment.ids).split("<|user|>")[1:]]
            assert last in worded[record], "its own question and answer come last, whole"
            givers = [of_few_shot[example] for example in examples]
            assert record not in givers, "never the record itself"
            assert len(set(givers)) == len(givers) <= SOURCES[FEW_SHOT]["fewShot"]["maximum"]
            answer = last.rpartition("<|assistant|>")[2]
            assert tokenizer.decode(np.array(segment.ids)[segment.loss]) == answer, "only the last answer bears loss"
            assert tokenizer("".join([*examples, last]), add_special_tokens=False)["input_ids"] == segment.ids
        used.update(found[:1])
        shots[0 if found else len(examples)] += record[0] == FEW_SHOT
    total = sum(used.values())
    assert all(abs(used[i] - total / 4) < 5 * (total / 4) ** 0.5 for i in range(4)), "each wording as often"
    assert set(shots) == {0, 1, 2, 3}
    assert abs(shots[0] - sum(shots.values()) / 2) < 5 * (sum(shots.values()) / 4) ** 0.5, "half of it is zero-shot"
    status = flan.stage("flan", "instruct")["prepared"]
    assert status["tokens"] == sum(len(segment.ids) for row in epoch for segment in row)
    assert status["truncated"] > 0
    assert status.get("dropped", 0) == 0
    assert all(sum(len(segment.ids) for segment in row) <= MAX_LENGTH for row in epoch), "a packed row fits"


def test_the_held_out_task_is_measured_and_never_trained_on(
    flan: Folder, prepared: Path, epoch: list[list[Segment]]
) -> None:
    measured = [segment.record for row in read_plan(prepared, "task-qasc") for segment in row]
    assert len(set(measured)) == len(measured) == SOURCES[TASK]["cap"]
    assert {name for name, _ in measured} == {TASK}
    assert TASK not in {segment.record[0] for row in epoch for segment in row}
    folder = flan.artifact("flan", "instruct")
    rows = [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["heldOutLoss/qasc"]) for row in rows if "heldOutLoss/qasc" in row]
    assert [step for step, _ in losses] == [0, 20]
    assert losses[1][1] < losses[0][1], "what the model learnt carries over to a task it has not seen"
    assert f"| qasc | 64 | {losses[0][1]:.4f} | {losses[1][1]:.4f} |" in (folder / "README.md").read_text()
