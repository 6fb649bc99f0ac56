"""The formats that people have, in the containers that they come in."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab_trainer.config import StageType
from trimtab_trainer.data.files import DataFile
from trimtab_trainer.data.formats import Format, open_rows
from trimtab_trainer.data.records import Conversation, Document, InvalidRecord, Label, Message, Ranking, Record
from trimtab_trainer.errors import BadData, InputMissing

QA = Conversation([Message("user", "q"), Message("assistant", "a")])
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


def read(path: Path, stage: StageType = StageType.SFT) -> tuple[str, list[Any]]:
    known, rows = open_rows(DataFile(path, path.name), stage, text_too=False)
    return known.name, [(line, converted(known, row)) for line, row in rows]


def converted(known: Format, row: Any) -> Record | InvalidRecord:
    try:
        return row if isinstance(row, InvalidRecord) else known.convert(row)
    except InvalidRecord as error:
        return error


@pytest.mark.parametrize(
    ("row", "name", "record"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "OpenAI chat", QA),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "ShareGPT", QA),
        ({"prompt": "q", "completion": "a"}, "prompt and completion", QA),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "prompt and completion",
            QA,
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "Alpaca", QA),
        (
            {"instruction": "q", "input": "i", "output": "a"},
            "Alpaca",
            Conversation([Message("user", "q\n\ni"), Message("assistant", "a")]),
        ),
        (
            {"input": "q\nA or B?", "target": "A", "rationale": "because"},
            "FLAN CoT",
            Conversation([Message("user", "q\nA or B?"), Message("assistant", "because\nThe answer is A")]),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}], "name": "ann"},
                    {"role": "assistant", "content": None, "tool_calls": CALL},
                    {"role": "tool", "content": "", "tool_call_id": "1"},
                    {"role": "assistant", "content": "no", "weight": 0},
                    {"role": "assistant", "content": "a", "train": True, "weight": None},
                ],
                "tools": [{"type": "function"}],
            },
            "OpenAI chat",
            Conversation(
                [
                    Message("user", "q", extra={"name": "ann"}),
                    Message("assistant", "", extra={"tool_calls": CALL}),
                    Message("tool", "", extra={"tool_call_id": "1"}),
                    Message("assistant", "no", train=False),
                    Message("assistant", "a"),
                ],
                [{"type": "function"}],
            ),
        ),
    ],
)
def test_each_format_becomes_a_conversation(tmp_path: Path, row: Any, name: str, record: Conversation) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert read(path) == (name, [(1, record)])


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=2))


def _table(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "write", "lines"),
    [
        ("x.jsonl", _lines, [1, 2]),
        ("lines.json", _lines, [1, 2]),
        ("x.json", _array, [1, 2]),
        ("x.csv", _table, [2, 3]),
        ("x.tsv", _table, [2, 3]),
        ("x.parquet", _parquet, [1, 2]),
    ],
)
def test_each_container(
    tmp_path: Path, name: str, write: Callable[[Path, Any], None], lines: list[int], compressed: bool
) -> None:
    path = tmp_path / name
    write(path, [{"prompt": "q", "completion": "a"}, {"prompt": 'q,\t"x"', "completion": "y\nz"}])
    if compressed:
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    second = Conversation([Message("user", 'q,\t"x"'), Message("assistant", "y\nz")])
    assert read(path) == ("prompt and completion", [(lines[0], QA), (lines[1], second)])


def test_flan_without_a_header_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "aqua_train.tsv"
    path.write_text('Say "x\\nOptions:\tA\tr1\none\ttwo\n\nb\tB\tr2\n')
    name, items = read(path)
    assert name == "FLAN CoT"
    assert items[0] == (
        1,
        Conversation([Message("user", 'Say "x\nOptions:'), Message("assistant", "r1\nThe answer is A")]),
    )
    assert isinstance(items[1][1], InvalidRecord)
    assert "2 fields, expected 3" in items[1][1].cause
    assert items[2][0] == 4


def test_text_files_and_text_fields_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read(tmp_path / "a.txt", StageType.PRETRAIN) == ("text", [(1, Document("one\ntwo\n"))])
    _lines(tmp_path / "b.jsonl", [{"text": "x", "url": "u"}])
    assert read(tmp_path / "b.jsonl", StageType.PRETRAIN) == ("text", [(1, Document("x"))])


ASKED = [Message("user", "q")]
ANSWERED = {text: Conversation([*ASKED, Message("assistant", text)]) for text in "abc"}
PAIR = Ranking((ANSWERED["a"], ANSWERED["b"]), (Label(0, 0), Label(1, 1)))


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, contents, strict=False)]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "hh-rlhf"),
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b")}, "hh-rlhf"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt, chosen, rejected"),
        ({"prompt": "q", "messages": [], "chosen": turns("q", "a"), "rejected": turns("q", "b")}, "prompt, chosen"),
        ({"prompt": turns("q"), "chosen": turns("q", "a")[1:], "rejected": turns("q", "b")[1:]}, "prompt, chosen"),
        (
            {
                "input": {"messages": turns("q")},
                "preferred_output": turns("q", "a")[1:],
                "non_preferred_output": turns("q", "b")[1:],
            },
            "OpenAI preferences",
        ),
    ],
)
def test_pairs_from_the_usual_files(tmp_path: Path, row: Any, name: str) -> None:
    _lines(tmp_path / "x.jsonl", [row])
    found, items = read(tmp_path / "x.jsonl", StageType.DPO)
    assert name in found
    assert items == [(1, PAIR)]


def test_a_pair_of_several_turns_differs_in_the_last_one_only(tmp_path: Path) -> None:
    before = "\n\nHuman: q\n\nAssistant: a\n\nHuman: why?\n\nAssistant: "
    _lines(tmp_path / "x.jsonl", [{"chosen": before + "so", "rejected": before + "no\n\nHuman beings"}])
    ((_, pair),) = read(tmp_path / "x.jsonl", StageType.DPO)[1]
    chosen, rejected = pair.answers
    assert chosen.messages[:-1] == rejected.messages[:-1]
    assert [m.content for m in rejected.messages] == ["q", "a", "why?", "no\n\nHuman beings"]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "'rejected' is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": turns("p", "b")}, "answer different prompts"),
        ({"prompt": "q", "chosen": "a", "rejected": turns("q")}, "'rejected' does not end with an assistant's turn"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' is a int, not text"),
        ({"chosen": "\n\nHuman: q\n\nAssistant:", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "turn 1 of 'chosen'"),
        ({"chosen": "q: a", "rejected": "q: b"}, "'chosen' is no conversation"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": "f"}, "'tools' is a str, not a list"),
        ({"input": [], "preferred_output": turns("a"), "non_preferred_output": turns("b")}, "'input' is a list"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path: Path, row: Any, cause: str) -> None:
    _lines(tmp_path / "x.jsonl", [row])
    ((_, found),) = read(tmp_path / "x.jsonl", StageType.DPO)[1]
    assert isinstance(found, InvalidRecord)
    assert cause in found.cause


RANKED = Ranking((ANSWERED["b"], ANSWERED["a"], ANSWERED["c"]), (Label(0, 0), Label(1, 1), Label(2, 1)))


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "prompt, chosen, rejected", PAIR),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "probability": 0.75},
            "prompt, chosen, rejected",
            Ranking(PAIR.answers, (Label(0, 0, 2.0, 0.75), Label(1, 1, 2.0, 0.75))),
        ),
        (
            {"prompt": "q", "chosen": "b", "rejected": "a", "probability": 0.25},
            "prompt, chosen, rejected",
            Ranking(PAIR.answers, (Label(0, 0, 0.0, 0.75), Label(1, 1, 0.0, 0.75))),
        ),
        ({"prompt": "q", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}, "rankings", RANKED),
        (
            {
                "instruction": "q",
                "completions": [
                    {"response": text, "overall_score": score} for text, score in (("a", 3), ("b", 4.5), ("c", 3))
                ],
            },
            "UltraFeedback",
            RANKED,
        ),
    ],
)
def test_a_reward_stage_reads_pairs_and_rankings(tmp_path: Path, row: Any, name: str, expected: Ranking) -> None:
    _lines(tmp_path / "x.jsonl", [row])
    found, items = read(tmp_path / "x.jsonl", StageType.REWARD)
    assert name in found
    assert items == [(1, expected)]


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"completions": ["a"], "ranks": [1]}, "'completions' has 1 answer: there is nothing to compare"),
        ({"completions": ["a", "b"], "ranks": [1, 1]}, "all completions are ties"),
        ({"completions": ["a", "b"], "ranks": [1]}, "'ranks' is not one number for each of the 2 answers"),
        ({"completions": ["a", "b"], "ranks": [1, "x"]}, "'ranks' is not one number"),
        ({"completions": ["a", "b", "a"], "ranks": [1, 2, 3]}, "completion 2 stands twice"),
        ({"completions": [str(i) for i in range(17)], "ranks": list(range(17))}, "17 answers, more than 16"),
        ({"completions": "a", "ranks": [1]}, "'completions' is a str, not a list"),
        ({"completions": [turns("p", "a"), turns("q", "b")], "ranks": [1, 2]}, "answer different prompts"),
        ({"chosen": "a", "rejected": "b", "probability": 1.5}, "'probability' is not a number from 0 to 1"),
        ({"chosen": "a", "rejected": "b", "margin": -1}, "'margin' is not a number"),
    ],
)
def test_what_is_no_ranking_is_named(tmp_path: Path, row: dict[str, Any], cause: str) -> None:
    _lines(tmp_path / "x.jsonl", [{"prompt": "q", **row}])
    ((_, found),) = read(tmp_path / "x.jsonl", StageType.REWARD)[1]
    assert isinstance(found, InvalidRecord)
    assert cause in found.cause


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, "KTO"),
    ],
)
def test_labelled_completions_are_refused_with_what_is_wanted(tmp_path: Path, row: Any, name: str) -> None:
    _lines(tmp_path / "x.jsonl", [row])
    for stage, wanted in (
        (StageType.SFT, "answers: give messages"),
        (StageType.DPO, "give prompt, chosen and rejected"),
    ):
        with pytest.raises(
            BadData, match=rf"x\.jsonl holds .*{name}.*; a stage of type {stage} learns from .*{wanted}"
        ):
            read(tmp_path / "x.jsonl", stage)


def test_the_stage_and_the_format_must_fit(tmp_path: Path) -> None:
    _lines(tmp_path / "text.jsonl", [{"text": "x"}])
    _lines(tmp_path / "chat.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(BadData, match=r"text\.jsonl holds text; a stage of type sft .*give messages.*of type pretrain"):
        read(tmp_path / "text.jsonl")
    with pytest.raises(
        BadData, match=r"chat\.jsonl holds prompt and completion; a stage of type pretrain .*give \.txt"
    ):
        read(tmp_path / "chat.jsonl", StageType.PRETRAIN)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"prompt": "x"}', "'messages' is missing"),
        (b'{"messages": []}', "'messages' is not a list of messages, or an empty one"),
        (b'{"messages": [3]}', r"'messages\[0\]' is a int, not a message"),
        (b'{"messages": [{"role": "wizard", "content": "x"}]}', r"'messages\[0\]' has no known role"),
        (b'{"messages": [{"role": "user", "content": 5}]}', r"'messages\[0\].content' is a int, not text"),
        (b'{"messages": [{"role": "user", "content": " "}]}', r"'messages\[0\].content' is empty"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "x", "train": "no"}]}', r"'messages\[0\].train' is 'no'"),
        (b'{"messages": [{"role": "user", "content": "x", "weight": 2}]}', r"'messages\[0\].weight' is 2"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a part that is not text"),
        (b'{"messages": "x"', "not JSON: .* in column"),
        (b"[1]", "a JSON list, not an object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"messages": "\xff"}', r"not UTF-8 \(byte 0xff in column 15\)"),
    ],
)
def test_a_bad_record_is_a_value_with_cause_and_remedy(tmp_path: Path, line: bytes, cause: str) -> None:
    good = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    (tmp_path / "x.jsonl").write_bytes(good + b"\n" + line + b"\n\n" + good + b"\n")
    _, items = read(tmp_path / "x.jsonl")
    assert [number for number, _ in items] == [1, 2, 4]
    assert items[0][1] == items[2][1] == QA
    with pytest.raises(InvalidRecord, match=cause):
        raise items[1][1]
    assert items[1][1].remedy


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", r"x\.jsonl is empty; write"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), r"x\.jsonl\.gz is empty once decompressed; write"),
        ("x.jsonl", b"\n\n", r"x\.jsonl holds no records; write"),
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "q", "completion": "a"}\n' * 999)[:-30], "cut off or damaged.*copy"),
        ("x.jsonl.gz", b"plain text", "cut off or damaged.*copy"),
        ("x.jsonl", "{}".encode("utf-16"), r"x\.jsonl is UTF-16.*save it as UTF-8"),
        ("x.txt", b"fine\nnot \xe9t\n", r"line 2 of x\.txt: not UTF-8 \(byte 0xe9\); save"),
        ("x.csv", b"prompt,completion\nq,\xe9\n", r"line 2 of x\.csv: not UTF-8.*save"),
        ("x.csv", b"id,question\n1,2\n", r"line 1 of x\.csv: not a header \(id, question\); name the columns"),
        ("x.csv", b'prompt,completion\nq,"open\n', r"of x\.csv: unexpected end of data; quote"),
        ("x.json", b'[{"prompt": "q"', r"line 1 of x\.json: not JSON.*correct"),
        ("x.parquet", b"PAR1 no", r"x\.parquet: not a readable Parquet file.*write it again"),
        ("x.jsonl", b'{"question": "q"}\n', r"line 1 of x\.jsonl: format not recognised \(keys: question\); expected"),
        ("x.docx", b"x", r"x\.docx: not a data file; give \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_cause_and_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=message):
        read(tmp_path / name, StageType.PRETRAIN if name == "x.txt" else StageType.SFT)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"x\.jsonl: No such file.*check the data's uri"):
        read(tmp_path / "x.jsonl")
