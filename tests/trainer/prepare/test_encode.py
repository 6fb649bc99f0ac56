"""Worker processes give what one process gives, in the same order, and do not outlive their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.trainer.prepare.kit import chats, leftovers, run, sft, stage, write_jsonl

from trimtab_trainer.data import encode
from trimtab_trainer.errors import BadConfiguration, BadData


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BYTES_A_WORKER", 1)
    monkeypatch.setattr(encode, "BATCH_RECORDS", 7)
    monkeypatch.setattr(encode, "available_cores", lambda: 2)


def test_workers_change_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    data = write_jsonl(tmp_path / "chat.jsonl", chats(100)).as_uri()
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"{i} " * i} for i in range(1, 60)]).as_uri()
    stages = [stage("base", "pretrain", text), sft(data, fromStage="base")]
    alone = run(tmp_path / "alone", *stages)
    request.getfixturevalue("workers")
    assert run(tmp_path / "together", *stages) == alone


@pytest.mark.usefixtures("workers")
def test_what_a_worker_finds_reaches_the_message(tmp_path: Path) -> None:
    rows = chats(50)
    rows[33]["messages"][0]["content"] = "x<|end|>"
    data = write_jsonl(tmp_path / "chat.jsonl", rows).as_uri()
    with pytest.raises(BadData, match=r"line 34 of \S+/chat\.jsonl: message 0 holds the control token .*; remove it"):
        run(tmp_path / "root", sft(data))
    rows[33]["messages"].insert(0, {"role": "developer", "content": "y"})
    rows[33]["messages"][1]["content"] = "x"
    write_jsonl(tmp_path / "chat.jsonl", rows)
    with pytest.raises(BadConfiguration, match=r"line 34 of \S+/chat\.jsonl: .*unknown role developer"):
        run(tmp_path / "root", sft(data))
    assert leftovers(tmp_path / "root") == []


def test_workers_die_with_a_killed_parent(tmp_path: Path) -> None:
    script = """
import itertools, pathlib, sys
from trimtab_trainer.data import encode
from trimtab_trainer.data.records import Document
from trimtab_trainer.data.tokenizer import train_tokenizer
from trimtab_trainer.settings import Loss, TokenizerTraining

if __name__ == "__main__":
    encode.available_cores = lambda: 2
    folder = pathlib.Path(sys.argv[1])
    train_tokenizer(iter(["some text"]), TokenizerTraining(vocabulary_size=300), folder)
    endless = ((encode.Place(0, 0, "x", i), Document("text")) for i in itertools.count())
    for _ in encode.encode_all(encode.EncoderSettings("x", folder, Loss.ALL, 0), endless, 1 << 30):
        print("working", flush=True)
"""
    (tmp_path / "parent.py").write_text(script)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "tokenizer")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"working\n"
        started = psutil.Process(parent.pid).children(recursive=True)
        workers = [child for child in started if child.ppid() != parent.pid]
        assert len(workers) == 2
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 30
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
