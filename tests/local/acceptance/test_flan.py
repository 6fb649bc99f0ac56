"""Instruction tuning on real data: the job's counts against an independent count of the FLAN files.

The count reads the raw files, applies the published mixing rule, renders and tokenizes with `transformers` and the
artifact's own tokenizer, and imports nothing of the project. Which records a cap selects is left to the seed: they are
read from the prepared folder's public files, and must be as many distinct records of each file as the rule says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
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
CAPS = {source["uri"].rpartition("/")[2]: source["cap"] for source in STAGE["data"]}
MAX_LENGTH = STAGE["maxLength"]

Record = tuple[str, int]
"""File name and line, counted from 1."""


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("TRIMTAB_FLAN_DATA", "")
    if not folder or not all((Path(folder) / name).is_file() for name in CAPS):
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


@pytest.fixture(scope="module")
def epoch(prepared: Path) -> list[list[Record]]:
    """Records of the rows of the first epoch, in training order."""
    names = json.loads((prepared / "files.json").read_bytes())
    files, lines = (np.load(prepared / f"{what}_of_record.npy") for what in ("file", "line"))
    segments, rows = (np.load(prepared / f"epoch-0000.{what}.npy") for what in ("segments", "rows"))
    return [
        [(names[files[record]].rpartition("/")[2], int(lines[record])) for record in segments[start:stop, 0]]
        for start, stop in pairwise(rows)
    ]


@pytest.fixture(scope="module")
def raw(data: Path) -> dict[Record, tuple[str, str, str]]:
    """Input, target and rationale of every line of every file."""
    found = {}
    for name in CAPS:
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
    flan: Folder, epoch: list[list[Record]], raw: dict[Record, Any]
) -> None:
    sizes = Counter(name for name, _ in raw)
    expected = {name: min(sizes[name], cap) for name, cap in CAPS.items()}
    assert any(sizes[name] > cap for name, cap in CAPS.items()), "a cap that cuts"
    assert any(sizes[name] < cap for name, cap in CAPS.items()), "and one that does not"
    records = [record for row in epoch for record in row]
    assert Counter(name for name, _ in records) == expected
    assert len(set(records)) == len(records), "no record twice in an epoch"
    assert set(records) <= set(raw)
    assert flan.stage("flan", "instruct")["prepared"]["records"] == sum(expected.values())


def test_the_files_are_mixed_in_proportion_all_along_the_epoch(epoch: list[list[Record]]) -> None:
    rates = Counter(name for row in epoch for name, _ in row)
    total = sum(rates.values())
    quarter = [name for row in epoch[: len(epoch) // 4] for name, _ in row]
    for name, count in Counter(quarter).items():
        expected = len(quarter) * rates[name] / total
        assert abs(count - expected) < 5 * expected**0.5, name
    assert set(quarter) == set(CAPS)


def test_the_tokens_are_those_of_an_independent_count(
    flan: Folder, epoch: list[list[Record]], raw: dict[Record, tuple[str, str, str]]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(flan.artifact("flan", "instruct"), local_files_only=True)
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"{rationale}\nThe answer is {target}"},
            ],
            tokenize=False,
        )
        for question, target, rationale in raw.values()
    ]
    ids = tokenizer(texts, add_special_tokens=False, truncation=False)["input_ids"]
    lengths = dict(zip(raw, map(len, ids), strict=True))
    counted = sum(min(lengths[record], MAX_LENGTH) for row in epoch for record in row)
    status = flan.stage("flan", "instruct")["prepared"]
    assert status["tokens"] == counted
    assert status["truncated"] == sum(length > MAX_LENGTH for length in lengths.values()) > 0
    assert status.get("dropped", 0) == 0
    for row in epoch:
        assert sum(min(lengths[record], MAX_LENGTH) for record in row) <= MAX_LENGTH, "a packed row fits"
