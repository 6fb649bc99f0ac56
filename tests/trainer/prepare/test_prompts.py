"""Prompts for `ppo`: one to a row, cut where the model answers, with room for the answer."""

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.prepare.kit import chats, opened, run, sft, stage, write_jsonl

from trimtab_trainer.data.store import VALIDATION
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.errors import BadConfiguration, BadData


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


def test_a_prompt_without_room_for_its_answer_is_named(tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "short?"}, {"prompt": "very " * 60}])
    message = r"line 2 of .*long\.jsonl: \d+ tokens are more than maxLength = 64 less 16 for the answer; .*maxNewTokens"
    with pytest.raises(BadData, match=message):
        run(tmp_path / "root", sft(chat.as_uri()), ppo(long.as_uri()))


def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(9)]
    )
    root = tmp_path / "root"
    digest = run(root, sft(chat.as_uri())).stages[0].digest
    chosen = {"uri": (root / "prepared" / digest.removeprefix("sha256:")).as_uri(), "digest": digest}
    policy = ppo(chat.as_uri(), fromStage=None, fromPrepared=chosen, rewardStage="score")
    with pytest.raises(BadConfiguration, match=r"tokenizer of rewardFrom \(score\) is another one"):
        run(root, stage("score", "reward", pairs.as_uri(), loss="completion"), policy)
