"""Demonstrations of a reward stage: each up to the end of its last answer, in a folder of their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.trainer.prepare.kit import chats, opened, run, sft, stage, write_jsonl

from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.errors import BadData

PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "Who knows?"} for i in range(12)]


def score(folder: Path, *demonstrations: str, **fields: Any) -> list[dict[str, Any]]:
    """An `sft` stage, and a reward stage with these demonstrations."""
    chat, pairs = write_jsonl(folder / "chat.jsonl", chats(20)), write_jsonl(folder / "pairs.jsonl", PAIRS)
    shown = [{"uri": uri} for uri in demonstrations]
    reward = stage("score", "reward", pairs.as_uri(), fromStage="chat", loss="completion", demonstrations=shown)
    return [sft(chat.as_uri()), {**reward, **fields}]


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": each} for i, each in enumerate(contents)]}


def test_r6_demonstrations_end_with_their_last_answer(tmp_path: Path) -> None:
    talks = [turns("And 1?", "One."), turns("And 2?", "Two.", "And 3?", "Three."), turns("And 4?", "Four.", "Thanks!")]
    bare = [{"prompt": f"And {i}?", "completion": f"It is {i}."} for i in range(5, 9)]
    uris = [write_jsonl(tmp_path / name, rows).as_uri() for name, rows in (("a.jsonl", talks), ("b.jsonl", bare))]
    root, without = tmp_path / "root", opened(tmp_path / "root", run(tmp_path / "root", *score(tmp_path)), 1)
    assert without.demonstrations is None
    report = run(root, *score(tmp_path, *uris))
    prepared = opened(root, report, 1)
    shown = prepared.demonstrations
    assert shown is not None
    assert (shown.info.records, prepared.info.records) == (7, without.info.records)
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    texts = []
    for index in range(shown.rows(0)):
        row = shown.row(0, index)
        texts += [tokenizer.decode(ids) for ids in np.split(row.input_ids, np.cumsum(row.segment_lengths)[:-1])]
    assert shown.rows(0) < 7, "packed"
    assert all(text.endswith(".<|end|>") for text in texts)
    assert {text.split("<|assistant|>")[-1] for text in texts} == {
        *(f"{word}.<|end|>" for word in ("One", "Three", "Four")),
        *(f"It is {i}.<|end|>" for i in range(5, 9)),
    }
    assert "=== demonstrations" in (prepared.folder / "sample.txt").read_text(encoding="utf-8")
    assert opened(root, run(root, *score(tmp_path, *uris)), 1).folder == prepared.folder, "found again"
    assert opened(root, run(root, *score(tmp_path, uris[0])), 1).folder != prepared.folder


BAD = {
    "a pair": (PAIRS[0], "b.jsonl holds preferences"),
    "no answer": (turns("And 1?"), "line 2 of .*b.jsonl: no turn bears loss"),
    "an empty answer": (
        {"messages": [{"role": "user", "content": "And?"}, {"role": "assistant"}]},
        "line 2 of .*b.jsonl",
    ),
    "longer than the context": (
        turns("And 1?", "very " * 100),
        r"line 2 of .*b.jsonl: \d+ tokens are more than maxLength",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_demonstration_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    record, message = BAD[case]
    rows = [record] if case == "a pair" else [turns("And 1?", "One."), record]
    uri = write_jsonl(tmp_path / "b.jsonl", rows).as_uri()
    with pytest.raises(BadData, match=f"demonstrations: .*{message}"):
        run(tmp_path / "root", *score(tmp_path, uri))


def test_dropped_demonstrations_are_counted_and_bounded_with_the_rest(tmp_path: Path) -> None:
    rows = [turns("And 1?", "One."), turns("And 2?"), turns("And 3?", "very " * 100)]
    uri = write_jsonl(tmp_path / "b.jsonl", rows).as_uri()
    fields = {"onInvalid": "drop", "onTooLong": "drop"}
    root = tmp_path / "root"
    report = run(root, *score(tmp_path, uri, **fields, maxDropped=2))
    assert report.stages[1].dropped == 2
    shown = opened(root, report, 1).demonstrations
    assert shown is not None
    assert shown.info.records == 1
    assert json.loads((shown.folder / "info.json").read_text())["droppedByCause"] == {"invalid": 1, "too long": 1}
    with pytest.raises(BadData, match="maxDropped"):
        run(tmp_path / "other", *score(tmp_path, uri, **fields, maxDropped=1))
