"""The prepared folder as its reader sees it."""

from pathlib import Path

import numpy as np
import pytest
from tests.trainer.prepare.kit import chats, opened, run, sft, stage, write_jsonl

from trimtab_trainer.data.store import VALIDATION
from trimtab_trainer.errors import CorruptArtifact, InputMissing


def test_rows_and_their_counts(tmp_path: Path) -> None:
    texts = [{"text": "".join(chr(97 + (i * 7 + j) % 26) for j in range(i * 11 % 90 + 1))} for i in range(40)]
    data = write_jsonl(tmp_path / "text.jsonl", texts)
    report = run(
        tmp_path / "root",
        stage("base", "pretrain", data.as_uri(), maxLength=32, validation={"fraction": 0.1}, recipe={"epochs": 2}),
    )
    prepared = opened(tmp_path / "root", report)
    info = prepared.info
    assert (info.records, info.validation_records, info.epochs) == (36, 4, 2)
    for epoch in (0, 1):
        rows = [prepared.row(epoch, i) for i in range(prepared.rows(epoch))]
        assert sum(len(row.input_ids) for row in rows) == info.tokens
        assert [len(row.input_ids) for row in rows[:-1]] == [32] * (len(rows) - 1)
        labels = [int(row.loss_mask.sum()) for row in rows]
        for start, stop in ((0, len(rows)), (0, 1), (1, 4), (len(rows) - 1, len(rows))):
            assert prepared.loss_tokens(epoch, start, stop) == sum(labels[start:stop])
        for row in rows:
            firsts = np.cumsum([0, *row.segment_lengths[:-1]])
            assert not row.loss_mask[firsts].any()
            assert row.loss_mask.sum() == len(row.input_ids) - len(firsts)
            assert sum(row.segment_lengths) == len(row.input_ids)
            assert len(row.record_ids) == len(row.segment_lengths)
    held = [prepared.row(VALIDATION, i) for i in range(prepared.rows(VALIDATION))]
    trained = {record for i in range(prepared.rows(0)) for record in prepared.row(0, i).record_ids}
    assert {record for row in held for record in row.record_ids} == set(range(40)) - trained
    assert prepared.loss_tokens(VALIDATION, 0, len(held)) == sum(int(row.loss_mask.sum()) for row in held)
    with pytest.raises(IndexError):
        prepared.row(0, prepared.rows(0))


def test_every_document_ends_with_the_separator(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": f"document {i}"} for i in range(9)])
    report = run(tmp_path / "root", stage("base", "pretrain", data.as_uri(), maxLength=8))
    prepared = opened(tmp_path / "root", report)
    separator = prepared.info.document_separator_id
    ids = np.concatenate([prepared.row(0, i).input_ids for i in range(prepared.rows(0))])
    assert np.count_nonzero(ids == separator) == 9
    assert len({separator, prepared.info.end_of_turn_id, prepared.info.padding_id}) == 3


def test_records_are_named_by_file_and_line(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", chats(3))
    second = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}])
    prepared = opened(tmp_path / "root", run(tmp_path / "root", sft(first.as_uri(), second.as_uri())))
    assert prepared.record_names(range(4)) == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1"]


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(3))
    report = run(tmp_path / "root", sft(data.as_uri()))
    prepared = opened(tmp_path / "root", report)
    tokens = prepared.folder / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[3] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"tokens\.bin.*bytes differ"):
        opened(tmp_path / "root", report)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    from trimtab_trainer.data.store import PreparedData

    with pytest.raises(InputMissing, match="no manifest"):
        PreparedData.open(tmp_path / "nothing", "sha256:" + "0" * 64)
