"""Prompts for `ppo`: one to a row, cut where the model answers, with room for the answer."""

from pathlib import Path
from typing import Any

import pytest
from tests.trainer.prepare.kit import chats, opened, run, sft, stage, write_jsonl

from trimtab_trainer.data.store import VALIDATION
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.errors import BadData

ANSWERS = {"rollout": {"maxNewTokens": 16}}


def ppo(*uris: str, **fields: Any) -> dict[str, Any]:
    return stage("policy", "ppo", *uris, **{"fromStage": "chat", "ppo": ANSWERS, **fields})


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


def test_a_verifier_gets_what_it_compares_with(tmp_path: Path) -> None:
    """Whatever the order of rows, whatever is held out or dropped."""
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    rows = [{"prompt": f"What is {i}?", "right": i if i % 2 else f"{i} of them"} for i in range(30)]
    rows[7]["right"] = None
    asked = write_jsonl(tmp_path / "asked.jsonl", rows)
    told = tmp_path / "told.tsv"
    told.write_text("prompt\tright\n" + "".join(f"What is {i}?\t{i}\n" for i in range(30, 40)))
    root = tmp_path / "root"

    def policy(field: str, **verifier: Any) -> dict[str, Any]:
        settings = {**ANSWERS, "verifier": verifier or {"numericAnswer": {"field": field}}}
        dropping = {"onInvalid": "drop", "maxDropped": 1}
        return ppo(asked.as_uri(), told.as_uri(), validation={"fraction": 0.25}, ppo=settings, **dropping)

    report = run(root, sft(chat.as_uri()), policy("right"))
    prepared = opened(root, report, 1)
    assert report.stages[1].dropped == 1
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    seen = []
    for plan in (0, VALIDATION):
        for index in range(prepared.rows(plan)):
            row = prepared.row(plan, index)
            number = prepared.references[row.record_ids[0]].split()[0]
            assert f"What is {number}?" in tokenizer.decode(row.input_ids)
            seen.append(int(number))
    assert sorted(seen) == [i for i in range(40) if i != 7]
    again = run(root, sft(chat.as_uri()), policy("right"))
    assert again.stages[1] == report.stages[1].model_copy(update={"reused": True})
    other = run(root, sft(chat.as_uri()), policy("", exactMatch={"field": "prompt"}))
    assert opened(root, other, 1).references[0] == "What is 0?"


def test_p11_a_pretraining_mix_gives_each_update_its_rows(tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"And {i}?"} for i in range(10)])
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"{i} is a number. " * 40} for i in range(3)])
    mix = {"coefficient": 2, "rowsPerUpdate": 3}
    policy = ppo(
        prompts.as_uri(),
        pretrainingMix=[{"uri": chat.as_uri()}, {"uri": text.as_uri()}],
        ppo={**ANSWERS, "passes": 2, "minibatches": 4, "pretrainingMix": mix},
        recipe={"globalBatchSize": 8, "epochs": 2},
    )
    root = tmp_path / "root"
    report = run(root, sft(chat.as_uri()), policy)
    prepared = opened(root, report, 1)
    its_mix = prepared.pretraining_mix
    assert its_mix is not None
    # each epoch has a step of 8 prompts, with 4 updates a pass, and one of 2, with 2
    assert its_mix.info.total_steps == 2 * (2 * 4 + 2 * 2)
    assert its_mix.rows(0) == 3 * its_mix.info.total_steps
    rows = [its_mix.row(0, i) for i in range(its_mix.rows(0))]
    assert all(row.loss_mask.any() for row in rows)
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    seen = " ".join(tokenizer.decode(row.input_ids) for row in rows)
    assert "It is 7." in seen
    assert "2 is a number. 2 is" in seen
    passes = [record for row in rows for record in row.record_ids]
    records = len(set(passes))
    assert len(passes) > records, "it begins anew"
    assert sorted(passes[:records]) == sorted(set(passes)), "nothing is seen twice before all is seen once"
    assert opened(root, run(root, sft(chat.as_uri()), policy), 1).folder == prepared.folder, "found again"
    changed = {**policy, "ppo": {**policy["ppo"], "passes": 1}}
    assert opened(root, run(root, sft(chat.as_uri()), changed), 1).pretraining_mix.rows(0) == 36  # type: ignore[union-attr]


def test_a_bad_record_of_the_pretraining_mix_is_named(tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(20))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "good"}, {"text": 5}])
    policy = ppo(chat.as_uri(), pretrainingMix=[{"uri": bad.as_uri()}], ppo={"pretrainingMix": {"coefficient": 1}})
    with pytest.raises(BadData, match=r"line 2 of .*bad\.jsonl: .*text"):
        run(tmp_path / "root", sft(chat.as_uri()), {**policy, "maxLength": 300})
