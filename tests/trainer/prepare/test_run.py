"""Whole runs of prepare: what is refused and how it is said, chains, reuse, crashes, neighbours."""

import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.trainer.prepare.kit import TINY, chats, config, leftovers, opened, run, sft, stage, write_jsonl
from tests.trainer.small_volume import small_volume

from trimtab_trainer import prepare
from trimtab_trainer.config import Artifact, dump_report
from trimtab_trainer.data.store import VALIDATION
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.errors import BadConfiguration, BadData, InputMissing, StageError, StorageError
from trimtab_trainer.prepare import stage as stage_module


def expect(error: type[StageError], message: str, root: Path, *stages: dict[str, Any], **options: Any) -> None:
    """The run fails with this error and message, blames the stage, and leaves nothing behind."""
    with pytest.raises(error, match=message) as caught:
        run(root, *stages, **options)
    assert caught.value.stage == stages[0]["name"]
    assert leftovers(root) == []


def test_a_bad_record_is_named_by_line(tmp_path: Path) -> None:
    rows: list[Any] = chats(1000)
    rows[16] = {"message": "x"}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    expect(
        BadData,
        r"^stage chat: line 17 of file:\S+/data\.jsonl: 'messages' is missing; add 'messages' or remove the record$",
        tmp_path / "root",
        sft(data.as_uri()),
    )


def test_five_bad_records_of_a_thousand(tmp_path: Path) -> None:
    rows: list[Any] = chats(1000)
    for i in (2, 100, 500, 501, 999):
        rows[i] = {"messages": []}
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    expect(
        BadData,
        r"more than maxDropped = 4 records.*\. line 3 of file:\S+/data\.jsonl: .*line 101 .*line 1000 of",
        tmp_path / "root",
        sft(data.as_uri(), onInvalid="drop", maxDropped=4),
    )
    report = run(tmp_path / "root", sft(data.as_uri(), onInvalid="drop", maxDropped=5))
    assert (report.stages[0].records, report.stages[0].dropped) == (995, 5)
    assert opened(tmp_path / "root", report).info.dropped_by_cause == {"invalid": 5}


def test_too_long_records(tmp_path: Path) -> None:
    rows = chats(20)
    rows[7]["messages"][1]["content"] = "very " * 100
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    root = tmp_path / "root"
    message = (
        r"line 8 of file:\S+/data\.jsonl: \d+ tokens are more than maxLength = 64; raise maxLength, shorten it, or"
    )
    expect(BadData, message, root, sft(data.as_uri()))
    truncated = run(root, sft(data.as_uri(), onTooLong="truncate")).stages[0]
    assert (truncated.records, truncated.truncated, truncated.dropped) == (20, 1, 0)
    dropping = run(root, sft(data.as_uri(), onTooLong="drop", maxDropped=1))
    assert opened(root, dropping).info.dropped_by_cause == {"too long": 1}
    dropped = dropping.stages[0]
    assert (dropped.records, dropped.truncated, dropped.dropped) == (19, 0, 1)
    assert dropped.tokens == truncated.tokens - 64
    with pytest.raises(BadData, match="more than maxDropped = 0"):
        run(root, sft(data.as_uri(), onTooLong="drop"))


def test_a_data_set_without_labels(tmp_path: Path) -> None:
    questions = [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(3)]
    data = write_jsonl(tmp_path / "data.jsonl", questions)
    root = tmp_path / "root"
    expect(
        BadData,
        r"line 1 of file:\S+/data\.jsonl: no turn bears loss \(assistant\); add an assistant turn",
        root,
        sft(data.as_uri()),
    )
    lenient = sft(data.as_uri(), onInvalid="drop", maxDropped=9)
    expect(BadData, r"data\.jsonl leaves no record with a label \(3 dropped, first line 1 .*\); check", root, lenient)


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        ("file:///nowhere/data.jsonl", InputMissing, "no such file or folder.*check the uri"),
        ("pvc://claim/data.jsonl", InputMissing, "'claim' is not mounted in this pod"),
        ("file:///a/../etc/passwd", BadConfiguration, "'..' is not allowed"),
        ("oci://registry/data", BadConfiguration, r"oci:// is not supported yet; use hf://"),
        ("ftp://host/data", BadConfiguration, "unknown scheme; use hf://"),
        ("hf://org/name", BadConfiguration, "pin it to a commit of 40 hex digits"),
        ("https://user:secret@host/x.jsonl", BadConfiguration, "expected https://HOST/PATH/FILE"),
    ],
)
def test_bad_uris(tmp_path: Path, uri: str, error: type[StageError], message: str) -> None:
    expect(error, message, tmp_path / "root", sft(uri))


def test_a_link_out_of_a_data_folder_is_refused(tmp_path: Path) -> None:
    secret = write_jsonl(tmp_path / "secret.jsonl", chats(2))
    write_jsonl(tmp_path / "data" / "a.jsonl", chats(2))
    (tmp_path / "data" / "b.jsonl").symlink_to(secret)
    expect(InputMissing, r"b\.jsonl is a link that leads out of", tmp_path / "root", sft((tmp_path / "data").as_uri()))


def test_a_folder_gives_its_data_files_only(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.jsonl", ".hidden.jsonl"):
        write_jsonl(tmp_path / "data" / name, chats(2))
    for name in ("LICENSE", "README.md", "readme.txt", "dataset_info.json"):
        (tmp_path / "data" / name).write_text("about")
    prepared = opened(tmp_path / "root", run(tmp_path / "root", sft((tmp_path / "data").as_uri())))
    assert prepared.record_names(range(4)) == ["a/c.jsonl:1", "a/c.jsonl:2", "b.jsonl:1", "b.jsonl:2"]
    sample = (prepared.folder / "sample.txt").read_text()
    assert "a/c.jsonl: OpenAI chat, 2 records" in sample
    assert "<|user|>What is 0?<|end|><|assistant|>It is 0.<|end|>" in sample
    assert sample.endswith("bears loss\nIt is 0.<|end|>\n")


def test_a_chain_shares_one_tokenizer(tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"It is known that {i} is a number."} for i in range(50)])
    data = write_jsonl(tmp_path / "chat.jsonl", chats(30))
    root = tmp_path / "root"
    base = stage("base", "pretrain", text.as_uri())
    report = run(root, base, sft(data.as_uri(), fromStage="base", recipe={"epochs": 3, "globalBatchSize": 4}))
    first, second = opened(root, report, 0), opened(root, report, 1)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (first.tokenizer_folder / name).read_bytes() == (second.tokenizer_folder / name).read_bytes()
    assert first.info.tokenizer_digest == second.info.tokenizer_digest
    assert first.model_config == second.model_config
    assert first.model_config is not None
    assert first.model_config["vocab_size"] == first.info.vocabulary_size
    assert first.model_config["eos_token_id"] == first.info.document_separator_id
    rows = [second.rows(epoch) for epoch in range(3)]
    assert report.stages[1].steps == second.info.total_steps == sum(-(-count // 4) for count in rows)
    assert len(dump_report(report).encode()) < 700

    later = sft(data.as_uri(), fromPrepared={"uri": first.folder.as_uri(), "digest": report.stages[0].digest})
    assert run(root, later).stages[0].tokens == report.stages[1].tokens
    wrong = Artifact(uri=first.folder.as_uri(), digest="sha256:" + "0" * 64)
    with pytest.raises(InputMissing, match="digest is"):
        run(root, sft(data.as_uri(), fromPrepared=wrong))
    with pytest.raises(BadConfiguration, match="'later' is no earlier stage"):
        run(root, sft(data.as_uri(), fromStage="later"))


def test_max_steps_cuts_the_plan(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    recipe = {"epochs": 50, "globalBatchSize": 4, "maxSteps": 7}
    report = run(tmp_path / "root", sft(data.as_uri(), packing=False, recipe=recipe))
    info = opened(tmp_path / "root", report).info
    assert (info.total_steps, info.epochs, info.epoch_rows) == (7, 3, [10, 10, 10])


def test_a_mixture_counts_as_an_independent_count_does(tmp_path: Path) -> None:
    import numpy as np
    from tokenizers import Tokenizer

    sizes = {"a": 10, "b": 40, "c": 90}
    for name, size in sizes.items():
        rows = [{"prompt": f"{name}{i} " * (i % 7 + 1), "completion": f"{i}"} for i in range(size)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    mixed = sft(maxLength=128, packing=False)
    mixed["data"] = [{"uri": (tmp_path / f"{name}.jsonl").as_uri(), "cap": 30} for name in sizes]
    report = run(tmp_path / "root", mixed)
    folder = tmp_path / "root" / "prepared" / report.stages[0].digest[7:]
    taken = np.load(folder / "epoch-0000.segments.npy")[:, 0]
    files = np.load(folder / "file_of_record.npy")[taken]
    lines = np.load(folder / "line_of_record.npy")[taken]
    assert np.bincount(files).tolist() == [10, 30, 30]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in sizes}
    count = 0
    for file, line in zip(files, lines, strict=True):
        row = json.loads(texts["abc"[file]][line - 1])
        count += len(tokenizer.encode(f"<|user|>{row['prompt']}<|end|><|assistant|>{row['completion']}<|end|>").ids)
    assert (report.stages[0].records, report.stages[0].tokens) == (70, count)


def test_what_did_not_change_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    root = tmp_path / "root"
    first = run(root, sft(data.as_uri()))
    before = {name: (root / name).stat().st_mtime_ns for name in leftovers(root)}

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "tokenize", fail)
        again = run(root, sft(data.as_uri(), recipe={"microBatchSize": 4, "learningRate": 0.1}), uid="another job")
    assert again.stages[0].reused
    assert again.stages[0].digest == first.stages[0].digest
    assert again.stages[0].memory_bytes > first.stages[0].memory_bytes
    assert {name: (root / name).stat().st_mtime_ns for name in leftovers(root)} == before
    other = run(root, sft(data.as_uri(), recipe={"seed": 1})).stages[0]
    assert not other.reused
    assert other.digest != first.stages[0].digest


def test_a_damaged_folder_is_made_again(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    root = tmp_path / "root"
    first = run(root, sft(data.as_uri()))
    tokens = root / "prepared" / first.stages[0].digest[7:] / "tokens.bin"
    tokens.write_bytes(b"\0" * tokens.stat().st_size)
    again = run(root, sft(data.as_uri()))
    assert (again.stages[0].reused, again.stages[0].digest) == (False, first.stages[0].digest)
    opened(root, again)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    root = tmp_path / "root"
    with monkeypatch.context() as patch:  # killed: nothing cleans up
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(stage_module, "plan_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(root, sft(data.as_uri()))
    assert any("tokens.bin" in name for name in leftovers(root))
    report = run(root, sft(data.as_uri()))
    assert {path.name for path in (root / "prepared").iterdir()} == {report.stages[0].digest[7:], "by-input"}


def test_two_jobs_prepare_the_same_data_at_once(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(50))
    root = tmp_path / "root"
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        reports = list(pool.map(prepare.run, [config(root, sft(data.as_uri()), uid=uid) for uid in ("a", "b")]))
    assert reports[0].stages[0].digest == reports[1].stages[0].digest
    opened(root, reports[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"config": {**TINY, "hiden_size": 3}, "tokenizerTrain": {}}, "hiden_size: no such key for llama; check"),
        ({"config": {"model_type": "lama"}, "tokenizerTrain": {}}, "unknown model_type 'lama'"),
        ({"config": {**TINY, "vocab_size": 20}, "tokenizerTrain": {}}, "vocab_size is 20; raise vocab_size"),
        ({"config": {**TINY, "num_attention_heads": 5}, "tokenizerTrain": {}}, "correct"),
        ({"config": {**TINY, "max_position_embeddings": 32}, "tokenizerTrain": {}}, "lower maxLength"),
    ],
)
def test_bad_model_configurations(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    expect(BadConfiguration, message, tmp_path / "root", sft(data.as_uri()), model=model)


def test_an_adapter_changes_the_estimate_and_not_the_data(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    root = tmp_path / "root"
    whole = run(root, sft(data.as_uri())).stages[0]
    adapter = run(root, sft(data.as_uri(), lora={"rank": 2})).stages[0]
    assert (adapter.digest, adapter.reused) == (whole.digest, True)
    assert adapter.memory_bytes < whole.memory_bytes
    wrong = sft(data.as_uri(), lora={"targets": ["c_attn"]})
    message = "lora.targets: the model's blocks have no linear layer named c_attn; they have down_proj, "
    with pytest.raises(BadConfiguration, match=message):
        run(root, wrong)
    expect(BadConfiguration, f"stage chat: {message}", tmp_path / "fresh", wrong)


def test_a_fraction_that_holds_out_nothing(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    message = r"validation\.fraction 0\.01 of 10 records holds out nothing; change it"
    expect(BadData, message, tmp_path / "root", sft(data.as_uri(), validation={"fraction": 0.01}))


def test_held_out_data_of_their_own(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(10))
    own = write_jsonl(tmp_path / "held.jsonl", chats(4))
    report = run(tmp_path / "root", sft(data.as_uri(), validation={"data": [{"uri": own.as_uri()}]}))
    prepared = opened(tmp_path / "root", report)
    held = [record for i in range(prepared.rows(VALIDATION)) for record in prepared.row(VALIDATION, i).record_ids]
    assert sorted(prepared.record_names(held)) == [f"held.jsonl:{i}" for i in range(1, 5)]


def test_a_full_volume_is_a_storage_error(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(3000))
    with small_volume(tmp_path / "root", "64k") as root:
        with pytest.raises(StorageError, match=r"No space left on device.*check the volume's space"):
            run(root, sft(data.as_uri()))
        assert leftovers(root) == []


def pair(i: int, **changes: str) -> dict[str, str]:
    return {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"I do not know {i}, sorry.", **changes}


@pytest.mark.parametrize("packing", [False, True])
def test_pairs_become_rows_of_chosen_and_rejected(tmp_path: Path, packing: bool) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [pair(i) for i in range(30)])
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(30))
    held = {"fraction": 0.2}
    dpo = stage("prefer", "dpo", data.as_uri(), fromStage="chat", loss="completion", packing=packing, validation=held)
    root = tmp_path / "root"
    report = run(root, sft(chat.as_uri()), dpo)
    prepared = opened(root, report, 1)
    assert (prepared.info.records, prepared.info.validation_records) == (24, 6)
    assert prepared.rankings(0, 0, prepared.rows(0)) == 24
    assert prepared.rankings(VALIDATION, 0, prepared.rows(VALIDATION)) == 6
    assert (prepared.rows(0) == 24) is not packing
    tokenizer = load_tokenizer(prepared.tokenizer_folder)
    for index in range(prepared.rows(0)):
        row = prepared.row(0, index)
        texts = [
            tokenizer.decode(ids[mask])
            for ids, mask in zip(
                *(np.split(part, np.cumsum(row.segment_lengths)[:-1]) for part in (row.input_ids, row.loss_mask)),
                strict=True,
            )
        ]
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            number = chosen.removeprefix("It is ").removesuffix(".<|end|>")
            assert number.isdecimal()
            assert rejected == f"I do not know {number}, sorry.<|end|>"
