"""`trimtab local run` as a user runs it: a small real job, killed, interrupted and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.local.get import Absent, get_text

PATIENCE_SECONDS = 240
STEPS = 300
TRIMTAB = [sys.executable, "-m", "trimtab"]


def manifest(name: str = "tiny", **train: Any) -> dict[str, Any]:
    """A pre-training of seconds."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    stage = {
        "name": "base",
        "pretrain": {"data": [{"uri": "pvc://tiny/text.jsonl"}], "maxLength": 64},
        "train": {"epochs": 40, "maxSteps": STEPS, "globalBatchSize": 4, "learningRate": 1e-3, **train},
        "checkpoint": {"everySteps": 40, "keep": 2},
        "precision": "fp32",
    }
    spec = {
        "model": {"config": config, "tokenizer": {"train": {"vocabularySize": 512}}},
        "artifacts": {"uri": "pvc://tiny/models"},
        "stages": [stage],
    }
    return {"apiVersion": "trimtab.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}


def trimtab(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TRIMTAB, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, **more
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the data in its claim, and the manifest beside it."""
    data = tmp_path / "work" / "volumes" / "default" / "tiny"
    data.mkdir(parents=True)
    lines = [json.dumps({"text": f"Record {n} says that {n * 7} is seven times {n}. " * 4}) for n in range(200)]
    (data / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(manifest()))
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    words = [*TRIMTAB, "local", "run", str(folder / "tiny.yaml"), "--workdir", str(folder / "work")]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def status(folder: Path) -> dict[str, Any]:
    try:
        found = get_text(folder / "work", "ftj", "tiny", "default", "json")
    except Absent:
        return {}
    return dict(json.loads(found).get("status", {}))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The stage's steps so far; a line that is being written is left out."""
    for metrics in (folder / "work").glob("volumes/default/tiny/models/tiny-*/base/metrics.jsonl"):
        lines = metrics.read_text().split("\n")[:-1]
        return [row for row in map(json.loads, lines) if "loss" in row]
    return []


def until_steps(folder: Path, run: subprocess.Popen[str], attempt: int) -> None:
    """Wait until the attempt has made 50 steps, and so a checkpoint that keeps most of them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum(row["attempt"] == attempt for row in rows(folder)) < 50:
        assert run.poll() is None, "the run ended too early for this test"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that work in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if entry.name.isdigit() and str(folder / "work").encode() in words and int(entry.name) != os.getpid():
            found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


def run_with(folder: Path, document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    (folder / "other.yaml").write_text(yaml.safe_dump(document))
    return trimtab("local", "run", folder / "other.yaml", "--workdir", folder / "work")


def test_killed_interrupted_and_taken_up_again_with_fewer_processes(folder: Path) -> None:
    fewer, more = manifest(), manifest()
    more["spec"]["stages"][0]["processesPerNode"] = 2
    (folder / "tiny.yaml").write_text(yaml.safe_dump(more))
    first = start(folder)
    until_steps(folder, first, 1)
    other = trimtab("local", "run", folder / "tiny.yaml", "--workdir", folder / "work")
    assert other.returncode == 1
    assert f"in use by process {first.pid} since " in other.stderr
    first.send_signal(signal.SIGKILL)
    first.wait()

    second = start(folder)  # its lock is free when the last process of the first is gone
    until_steps(folder, second, 2)
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 130, said
    assert processes_of(folder) == []

    refused = run_with(folder, fewer)
    assert refused.returncode == 64
    assert "processesPerNode can change only while the job is suspended" in refused.stderr
    fewer["spec"]["suspend"] = True
    assert run_with(folder, fewer).returncode == 0
    assert status(folder)["phase"] == "Suspended"
    fewer["spec"]["suspend"] = False
    (folder / "tiny.yaml").write_text(yaml.safe_dump(fewer))

    third = start(folder)
    _, said = third.communicate(timeout=PATIENCE_SECONDS)
    assert third.returncode == 0, said
    assert processes_of(folder) == []
    found = status(folder)
    assert found["phase"] == "Succeeded"
    assert found["prepare"]["attempt"] == 1, "prepared once"
    (stage,) = found["stages"]
    assert stage["attempt"] == 3
    assert "failures" not in stage, "a lost machine and an interruption are free"

    steps = [row["step"] for row in rows(folder)]
    assert steps == list(range(1, STEPS + 1)), "every step once"
    assert {row["attempt"] for row in rows(folder)} == {1, 2, 3}

    again = trimtab("local", "run", folder / "tiny.yaml", "--workdir", folder / "work")
    assert again.returncode == 0
    assert "already complete, nothing to do" in again.stderr
    changed = folder / "changed.yaml"
    changed.write_text(yaml.safe_dump(manifest(learningRate=1e-2)))
    refused = trimtab("local", "run", changed, "--workdir", folder / "work")
    assert refused.returncode == 64
    assert "spec.stages[0]: Invalid value: train can't be changed; create a new job" in refused.stderr
    logs = trimtab("local", "logs", next(iter(_jobs(folder, "base"))), "--workdir", folder / "work")
    assert logs.returncode == 0
    assert logs.stdout


def _jobs(folder: Path, stage: str) -> list[str]:
    found = trimtab("local", "get", "jobs", "-o", "json", "--workdir", folder / "work")
    assert found.returncode == 0
    jobs = json.loads(found.stdout)["items"]
    return [job["metadata"]["name"] for job in jobs if f"-{stage}-" in job["metadata"]["name"]]


def test_a_data_error_is_told_once_and_mended_by_the_next_run(folder: Path) -> None:
    data = folder / "work" / "volumes" / "default" / "tiny" / "text.jsonl"
    good = data.read_text()
    data.write_text(good + '\n{"text": 17}\n')
    (folder / "tiny.yaml").write_text(yaml.safe_dump(manifest(maxSteps=2)))
    run = trimtab("local", "run", folder / "tiny.yaml", "--workdir", folder / "work")
    assert run.returncode == 1
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert "text.jsonl" in line
    assert "201" in line
    assert not list((folder / "work").glob("volumes/default/tiny/models/*/base")), "nothing of the stage was started"

    data.write_text(good)
    probe = f'{sys.executable} -c \'import os; print(os.environ["TRIMTAB_WORKDIR"], os.environ["TRIMTAB_ENDPOINTS"])\''
    run = trimtab("local", "run", folder / "tiny.yaml", "--workdir", folder / "work", "--exec", probe)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{folder / 'work'} {{}}\n"

    failing = f"{sys.executable} -c 'exit(3)'"
    run = trimtab("local", "run", folder / "tiny.yaml", "--workdir", folder / "work", "--exec", failing, "--json")
    assert run.returncode == 1
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert "already complete, nothing to train" in [line.get("message") for line in lines]
    assert "ended with exit code 3" in lines[-1]["message"]


ENDPOINT = {
    "apiVersion": "trimtab.dev/v1alpha1",
    "kind": "ModelEndpoint",
    "metadata": {"name": "e"},
    "spec": {"servedModelName": "m", "model": {"uri": "job://nobody/stage"}},
}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["local", "run", "bad.yaml"], 64, "bad.yaml:1:"),
        (["validate", "bad.yaml"], 64, "not YAML"),
        (["local", "run", "lost.yaml"], 64, "there is no FineTuneJob 'nobody'; add its file"),
        (["local", "run", "absent.yaml"], 64, "No such file"),
        (["local", "run"], 2, "Missing argument"),
        (["local", "run", "good.yaml", "--exec", "'"], 2, "quote it"),
        (["local", "run", "good.yaml", "--nope"], 2, "--nope"),
        (["local", "serve"], 1, "first run: trimtab local run"),
        (["local", "get", "ftj"], 1, "first run: trimtab local run"),
        (["local", "get", "widgets"], 1, "no kind 'widgets'"),
    ],
)
def test_what_is_refused_before_anything_starts(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(ENDPOINT))
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(manifest()))
    run = trimtab(*words, cwd=tmp_path, env={**os.environ, "TERM": "dumb", "COLUMNS": "200"})
    assert run.returncode == code
    assert said in run.stderr
    assert not list(tmp_path.glob(".trimtab/volumes/*")), "nothing was made"


def test_version_and_validate(tmp_path: Path) -> None:
    assert trimtab("version").stdout.strip() == "0.1.0"
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(manifest()))
    run = trimtab("validate", "good.yaml", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "good.yaml:1: FineTuneJob tiny: valid\n")
