"""Instruction tuning: replay, templates, few-shot examples and held-out tasks, from the data to the prepared folder."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.trainer.prepare.kit import chats, opened, run, sft, write_jsonl
from tests.trainer.prepare.test_run import expect

from trimtab_trainer.data import encode
from trimtab_trainer.data.store import PlanName, PreparedData, task_plan
from trimtab_trainer.data.tasks import TaskTemplates
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.errors import BadConfiguration, BadData
from trimtab_trainer.prepare import reading
from trimtab_trainer.settings import Template

QUESTION = {"prompt": "{{ claim }}\nTrue?", "completion": "{{ label }}"}
INVERTED = {"prompt": "Write a claim that is {{ label }}.", "completion": "{{ claim }}"}
CHOICES = {"prompt": "{{ claim }}\n\n{{ choices | options }}", "completion": "{{ label }}"}


def claims(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"claim": f"Claim {i}.", "label": "yes" if i % 3 else "no", "choices": ["yes", "no"]}
        for i in range(first, first + count)
    ]


def job(*sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return sft(**{"maxLength": 128, "packing": False, **fields}) | {"data": list(sources)}


def texts(prepared: PreparedData, plan: PlanName) -> list[tuple[str, str]]:
    """Of each segment of a plan the text, and what of it bears loss."""
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    found = []
    for index in range(prepared.rows(plan)):
        row = prepared.row(plan, index)
        bounds = np.cumsum(row.segment_lengths)[:-1]
        for ids, mask in zip(np.split(row.input_ids, bounds), np.split(row.loss_mask, bounds), strict=True):
            found.append((str(tokenizer.decode(ids)), str(tokenizer.decode(ids[mask]))))
    return found


def test_templates_word_a_record_and_options_are_written_as_flan_does() -> None:
    row = {"claim": "Snow is hot.", "label": "no", "choices": ["yes", "no"]}
    templates = TaskTemplates([Template(**each) for each in (QUESTION, INVERTED, CHOICES)], "data[0]")
    assert templates.fields == {"claim", "label", "choices"}
    worded = [tuple(m.content for m in templates.render(i, row).messages) for i in range(3)]
    assert worded == [
        ("Snow is hot.\nTrue?", "no"),
        ("Write a claim that is no.", "Snow is hot."),
        ("Snow is hot.\n\nOPTIONS:\n- yes\n- no", "no"),
    ]
    letters = '{{ claim }}{% for each in choices %}\n({{ "ABCDEFGH"[loop.index0] }}) {{ each }}{% endfor %}'
    lettered = TaskTemplates([Template(prompt=letters, completion="{{ label }}")], "data[0]").render(0, row)
    assert lettered.messages[0].content == "Snow is hot.\n(A) yes\n(B) no"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"prompt": "{{ claim", "completion": "x"}, r"data\[0\]\.templates\[0\]\.prompt: line 1: .*; correct it"),
        ({"prompt": "{{ claim | upperr }}", "completion": "x"}, r"prompt: line 1: No filter named 'upperr'"),
        ({"prompt": "Say it.", "completion": "yes"}, r"templates\[0\] names no field .* write one as \{\{ field \}\}"),
    ],
)
def test_a_template_that_is_not_valid_is_refused_before_anything_is_fetched(
    tmp_path: Path, template: dict[str, str], message: str
) -> None:
    expect(BadConfiguration, message, tmp_path, job({"uri": "file:///nowhere.jsonl", "templates": [template]}))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "{{ question }}",
            r"line 1 of \S+: data\[0\]\.templates\[0\]\.prompt: 'question' is undefined; the record has",
        ),
        ("{{ claim | options }}", r"prompt: the filter options was given no list of choices; give it a field"),
        ("{{ choices.append('x') }}", r"prompt: SecurityError: .*unsafe"),
        ("{{ claim[99:] }}", r"prompt gives an empty text; fill the field or remove the record"),
        ("{{ claim / 2 }}", r"prompt: TypeError: "),
    ],
)
def test_a_record_that_a_template_cannot_word_is_named(tmp_path: Path, prompt: str, message: str) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(9)).as_uri()
    template = {"prompt": prompt, "completion": "{{ label }}"}
    expect(BadData, message, tmp_path / "root", job({"uri": data, "templates": [template]}))


def test_each_pass_words_every_record_by_another_template(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(30)).as_uri()
    source = {"uri": data, "templates": [QUESTION, INVERTED, CHOICES]}
    root = tmp_path / "root"
    prepared = opened(root, run(root, job(source, recipe={"epochs": 4})))
    epochs = [[text for text, _ in texts(prepared, epoch)] for epoch in range(4)]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert len(set(epochs[0] + epochs[1] + epochs[2])) == 90, "three passes: every record in every wording"
    assert set(epochs[3]) == set(epochs[0]), "then they come round again"
    kinds = Counter("OPTIONS" in text for text in epochs[0])
    assert 0 < kinds[True] < 30, "templates are drawn, not taken in turn by the whole data set"
    assert ("<|user|>Write a claim that is no.<|end|><|assistant|>Claim 0.<|end|>", "Claim 0.<|end|>") in [
        each for epoch in range(3) for each in texts(prepared, epoch)
    ]


def test_templates_name_the_columns_of_a_table(tmp_path: Path) -> None:
    table = tmp_path / "claims.csv"
    table.write_text("claim,label\nSnow is hot.,no\n")
    root = tmp_path / "root"
    prepared = opened(root, run(root, job({"uri": table.as_uri(), "templates": [QUESTION]})))
    assert texts(prepared, 0) == [("<|user|>Snow is hot.\nTrue?<|end|><|assistant|>no<|end|>", "no<|end|>")]


def test_a_changed_template_does_not_find_the_old_folder(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(5)).as_uri()
    root = tmp_path / "root"
    variants: list[dict[str, Any]] = [
        {"templates": [QUESTION]},
        {"templates": [QUESTION | {"completion": "{{ label }}!"}]},
        {"templates": [QUESTION], "fewShot": {"count": 1}},
        {"templates": [QUESTION], "fewShot": {"count": 2}},
    ]
    reports = [run(root, job({"uri": data, **fields})).stages[0] for fields in variants]
    assert not any(report.reused for report in reports)
    assert len({report.digest for report in reports}) == len(variants)
    assert run(root, job({"uri": data, **variants[0]})).stages[0].reused


@pytest.mark.parametrize("loss", ["assistant", "completion", "all"])
def test_examples_come_before_the_question_and_bear_no_loss(tmp_path: Path, loss: str) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(40)).as_uri()
    source = {"uri": data, "templates": [QUESTION], "fewShot": {"count": 3, "proportion": 0.5}}
    root = tmp_path / "root"
    prepared = opened(root, run(root, job(source, loss=loss, recipe={"seed": 4})))
    shots = Counter()
    for text, learnt in texts(prepared, 0):
        turns = text.split("<|user|>")[1:]
        shots[len(turns) - 1] += 1
        questions = [turn.partition("\n")[0] for turn in turns]
        assert len(set(questions)) == len(questions), "neither the record itself nor an example twice"
        label = turns[-1].removesuffix("<|end|>").rpartition("<|assistant|>")[2]
        own = turns[-1] if len(turns) > 1 else text
        assert learnt == (own.removeprefix("<|user|>") if loss == "all" else f"{label}<|end|>") or (
            loss == "all" and learnt.endswith(turns[-1])
        )
    assert set(shots) == {0, 3}, "zero-shot and few-shot"
    assert 10 <= shots[3] <= 30


def test_a_record_is_no_example_of_itself_nor_of_one_that_asks_the_same(tmp_path: Path) -> None:
    rows = [*claims(4), *claims(4)]  # each of them twice
    data = write_jsonl(tmp_path / "claims.jsonl", rows).as_uri()
    source = {"uri": data, "templates": [QUESTION], "fewShot": {"count": 64, "proportion": 1.0}}
    root = tmp_path / "root"
    prepared = opened(root, run(root, job(source, maxLength=512)))
    asked = [[turn.partition("\n")[0] for turn in text.split("<|user|>")[1:]] for text, _ in texts(prepared, 0)]
    assert len(asked) == 8
    assert all(len(questions) == len(set(questions)) for questions in asked)
    examples = {question for questions in asked for question in questions[:-1]}
    assert any(questions[-1] in examples for questions in asked), "some of them are examples of others"


def test_fewer_examples_where_the_row_is_too_short(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(40)).as_uri()
    source = {"uri": data, "templates": [QUESTION], "fewShot": {"maximum": 64, "proportion": 1.0}}
    root = tmp_path / "root"
    prepared = opened(root, run(root, job(source)))
    found = texts(prepared, 0)
    assert len(found) == 40
    assert all(learnt in ("yes<|end|>", "no<|end|>") for _, learnt in found), "the answer is never cut off"
    assert max(text.count("<|user|>") for text, _ in found) > 3
    assert max(len(prepared.row(0, i).input_ids) for i in range(40)) <= 128


def test_held_out_records_are_examples_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(40)).as_uri()
    source = {"uri": data, "templates": [QUESTION], "fewShot": {"count": 4, "proportion": 1.0}}
    root = tmp_path / "root"
    prepared = opened(root, run(root, job(source, maxLength=256, validation={"fraction": 0.4})))
    held = {text.rpartition("<|user|>")[2].partition("\n")[0] for text, _ in texts(prepared, "validation")}
    assert len(held) == 16
    shown = [text.split("<|user|>") for plan in (0, "validation") for text, _ in texts(prepared, plan)]
    assert not held & {turn.partition("\n")[0] for turns in shown for turn in turns[1:-1]}
    monkeypatch.setattr(reading, "POOL_SIZE", 40)
    message = r"validation\.fraction 0\.6 of \S+ would hold out few-shot examples; lower it"
    expect(BadData, message, tmp_path / "other", job(source, validation={"fraction": 0.6}))


def test_a_data_set_without_single_turns_has_no_examples_to_give(tmp_path: Path) -> None:
    talks = [{"messages": [*chat["messages"], *chat["messages"]]} for chat in chats(9)]
    data = write_jsonl(tmp_path / "talks.jsonl", talks).as_uri()
    expect(
        BadData, "fewShot finds fewer than two records", tmp_path / "root", job({"uri": data, "fewShot": {"count": 1}})
    )


def test_replay_of_running_text_is_an_exact_part_of_the_loss_tokens(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(300)).as_uri()
    text = write_jsonl(
        tmp_path / "text.jsonl", [{"text": f"It is known that {i} is a number. " * 40} for i in range(20)]
    )
    sources = [
        {"uri": data, "templates": [QUESTION]},
        {"uri": text.as_uri(), "replayFraction": 0.2},
    ]
    root = tmp_path / "root"
    prepared = opened(root, run(root, job(*sources, packing=True, recipe={"epochs": 3})))
    for epoch in range(3):
        replayed = rest = longest = 0
        for index in range(prepared.rows(epoch)):
            row = prepared.row(epoch, index)
            bounds = np.cumsum(row.segment_lengths)[:-1]
            for record, mask in zip(row.record_ids, np.split(row.loss_mask, bounds), strict=True):
                if prepared.record_names([record])[0].startswith("text.jsonl"):
                    assert mask[1:].all(), "every token of running text bears loss"
                    replayed, longest = replayed + int(mask.sum()), max(longest, int(mask.sum()))
                else:
                    rest += int(mask.sum())
        assert replayed + rest == prepared.loss_tokens(epoch, 0, prepared.rows(epoch))
        assert abs(replayed - 0.25 * rest) <= longest / 2
    assert prepared.info.replayed_loss_tokens > 0
    # Every token of a text is replayed before any comes again: the pieces are the whole text.
    store = np.fromfile(prepared.folder / "tokens.bin", dtype="<u2")
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    assert tokenizer.decode(store).count("It is known that 7 is a number.") == 40


def test_a_held_out_task_is_planned_apart_and_never_trained_on(tmp_path: Path) -> None:
    trained = write_jsonl(tmp_path / "claims.jsonl", claims(30)).as_uri()
    first, second = (
        write_jsonl(tmp_path / f"{name}.jsonl", claims(20, 1000 * i)).as_uri() for i, name in enumerate("ab", 1)
    )
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Old things."}]).as_uri()
    sources: list[dict[str, Any]] = [
        {"uri": trained, "templates": [QUESTION]},
        {"uri": first, "templates": [QUESTION, INVERTED], "heldOutTask": "claims", "cap": 5},
        {"uri": second, "templates": [QUESTION], "heldOutTask": "claims"},
        {"uri": text, "heldOutTask": "old"},
    ]
    root = tmp_path / "root"
    report = run(root, job(*sources))
    prepared = opened(root, report)
    assert prepared.info.held_out_tasks == {"claims": 25, "old": 1}
    assert report.stages[0].records == len(texts(prepared, 0)) == 30
    assert texts(prepared, task_plan("old")) == [("Old things.<|document|>", "ld things.<|document|>")]
    measured = [text for text, _ in texts(prepared, task_plan("claims"))]
    assert len(measured) == 25
    assert not {text for text, _ in texts(prepared, 0)} & set(measured)
    vocabulary = json.loads((prepared.tokenizer_folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert not any("Old" in word for word in vocabulary), "the tokenizer has not seen it either"


def test_the_stream_is_the_same_at_any_number_of_processes_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(60)).as_uri()
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "Old things. " * 99}] * 3).as_uri()
    sources = [
        {"uri": data, "templates": [QUESTION, INVERTED], "fewShot": {"maximum": 4}},
        {"uri": text, "replayFraction": 0.3},
    ]
    epochs = {"epochs": 3, "seed": 7}
    alone = run(tmp_path / "alone", job(*sources, recipe=epochs))
    reseeded = run(tmp_path / "alone", job(*sources, recipe=epochs | {"seed": 8}))
    assert reseeded.stages[0].digest != alone.stages[0].digest
    monkeypatch.setattr(encode, "BYTES_A_WORKER", 1)
    monkeypatch.setattr(encode, "BATCH_RECORDS", 7)
    monkeypatch.setattr(encode, "available_cores", lambda: 2)
    together = run(tmp_path / "together", job(*sources, recipe=epochs, worldSize=8))
    assert together.stages[0].digest == alone.stages[0].digest


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "claims.jsonl", claims(9)).as_uri()
    only = {"uri": data, "templates": [QUESTION], "replayFraction": 0.5}
    expect(BadConfiguration, "replay and held-out tasks only; add", tmp_path / "root", job(only))
    mixed = {"uri": data, "templates": [QUESTION]}
    expect(BadConfiguration, "fractions of data sum to 1; lower", tmp_path / "root", job(mixed, only, only))
