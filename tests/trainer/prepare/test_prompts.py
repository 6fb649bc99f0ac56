"""Prompts for `ppo`: one to a row, cut where the model answers, with room for the answer."""

from pathlib import Path
from typing import Any

from tests.trainer.prepare.kit import chats, opened, run, sft, stage, write_jsonl

from trimtab_trainer.data.store import VALIDATION
from trimtab_trainer.data.tokenizer import load_tokenizer


def ppo(*uris: str, **fields: Any) -> dict[str, Any]:
    return stage("policy", "ppo", *uris, **{"fromStage": "chat", "maxNewTokens": 16, **fields})


def test_each_row_is_one_prompt_up_to_where_the_model_answers(tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": f"And {i}?"} for i in range(20)])
    root = tmp_path / "root"
    report = run(root, sft(chat.as_uri()), ppo(chat.as_uri(), bare.as_uri(), validation={"fraction": 0.25}))
    prepared = opened(root, report, 1)
    assert (prepared.rows(0), prepared.rows(VALIDATION)) == (30, 10)
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    for plan in (0, VALIDATION):
        for index in range(prepared.rows(plan)):
            row = prepared.row(plan, index)
            text = tokenizer.decode(row.input_ids)
            assert len(row.segment_lengths) == 1
            assert text.endswith("?<|end|><|assistant|>")
            assert "It is" not in text
