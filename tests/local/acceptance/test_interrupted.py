"""`trimtab local run` killed, interrupted and taken up again ends where an undisturbed run ends; nothing runs twice."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.local.acceptance.folder import Folder, endpoint, eventually, job, steps, trimtab

STEPS = 600
RECIPE = {"globalBatchSize": 3, "microBatchSize": 1, "learningRate": 1e-3, "epochs": 60}


def manifest() -> dict[str, Any]:
    """A short first stage, and a second one that is long enough to be met in the middle."""
    data = [{"uri": "pvc://text/text.jsonl"}]
    first = {
        "name": "first",
        "pretrain": {"data": data, "maxLength": 64},
        "train": {**RECIPE, "maxSteps": 5},
    }
    second = {
        "name": "second",
        "from": "first",
        "pretrain": {"data": data, "maxLength": 64},
        "train": {**RECIPE, "maxSteps": STEPS},
        "checkpoint": {"everySteps": 17, "keep": 2},
    }
    return job("chain", "text", [first, second])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return "\n".join(json.dumps({"text": f"Record {n}: {n * 7} is seven times {n}. " * (n % 5 + 1)}) for n in range(80))


def fresh(root: Path, texts: str) -> tuple[Folder, Path]:
    folder = Folder(root / "work")
    (folder.claim("text") / "text.jsonl").write_text(texts, encoding="utf-8")
    return folder, folder.write(manifest())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, texts: str) -> Folder:
    folder, file = fresh(tmp_path_factory.mktemp("undisturbed"), texts)
    run = folder.run(file)
    assert run.returncode == 0, run.stderr
    return folder


def metrics(folder: Folder, stage: str) -> Path:
    """Where the stage of the one job writes its steps; it need not be there yet."""
    found = list(folder.claim("text").glob(f"models/chain-*/{stage}"))
    return (found[0] if found else folder.root) / "metrics.jsonl"


def until_step(folder: Folder, run: Any, attempt: int) -> None:
    """Wait until the attempt of the second stage has made some steps, more than a checkpoint's and not all."""

    def reached() -> bool:
        assert run.poll() is None, run.stderr.read()
        return sum(row["attempt"] == attempt for row in steps(metrics(folder, "second"))) >= 20

    eventually(reached)


def fingerprints(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and sha256 of every file below."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Folder, stage: str) -> dict[str, str]:
    """sha256 of each file of a result that training made, by name."""
    files = json.loads((folder.artifact("chain", stage) / "manifest.json").read_bytes())["files"]
    return {name: digest for name, digest in files.items() if not name.endswith((".md", ".svg", ".png"))}


def test_killed_and_interrupted_it_ends_where_an_undisturbed_run_ends(
    tmp_path: Path, texts: str, undisturbed: Folder
) -> None:
    folder, file = fresh(tmp_path, texts)
    first = folder.start(file)
    eventually((folder.root / "operator.log").exists)
    other = folder.run(file)
    assert other.returncode == 1
    assert f"in use by process {first.pid} since " in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1

    until_step(folder, first, 1)
    before = fingerprints(metrics(folder, "first").parent)
    first.send_signal(signal.SIGKILL)
    first.wait()
    eventually(lambda: not folder.processes(), 20)
    assert len(steps(metrics(folder, "second"))) < STEPS, "no orphan has gone on to the end"

    second = folder.start(file)
    until_step(folder, second, 2)
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 130, said
    assert not folder.processes()
    saved = {row["step"] for row in steps(metrics(folder, "second"))}
    third = folder.run(file)
    assert third.returncode == 0, third.stderr
    assert not folder.processes()

    assert fingerprints(metrics(folder, "first").parent) == before, "the finished stage is left alone"
    assert folder.stage("chain", "first")["attempt"] == 1
    assert folder.stage("chain", "second")["attempt"] == 3
    assert "failures" not in folder.stage("chain", "second"), "a killed run and an interruption are no failures"
    rows = steps(metrics(folder, "second"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once"
    assert [row["attempt"] for row in rows] == sorted(row["attempt"] for row in rows)
    assert {row["attempt"] for row in rows} == {1, 2, 3}
    assert saved == {row["step"] for row in rows if row["attempt"] < 3}, "Ctrl-C saves: no step is made again"

    for stage in ("first", "second"):
        assert weights(folder, stage) == weights(undisturbed, stage), "bitwise the same"
    ours, theirs = (
        [(row["step"], row["loss"]) for row in steps(metrics(each, "second"))] for each in (folder, undisturbed)
    )
    assert ours == theirs


def test_what_is_complete_is_not_done_again(undisturbed: Folder) -> None:
    file = undisturbed.root.with_name("chain.yaml")
    before, pods = fingerprints(undisturbed.claim("text")), set(undisturbed.get("pods"))
    run = undisturbed.run(file)
    assert run.returncode == 0
    assert "already complete, nothing to do" in run.stderr
    assert fingerprints(undisturbed.claim("text")) == before
    assert set(undisturbed.get("pods")) == pods, "no pod was made"


def test_an_artifact_with_one_byte_changed_is_never_served(undisturbed: Folder) -> None:
    model = undisturbed.artifact("chain", "second") / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    file = undisturbed.write(endpoint("broken", "job://chain/second"))
    try:
        run = undisturbed.run(file, "--json")
        serve = trimtab("local", "serve", "--workdir", undisturbed.root)
    finally:
        model.write_bytes(whole)
    said = "model.safetensors: its bytes differ from manifest.json; restore the file"
    assert (run.returncode, serve.returncode) == (1, 1), run.stderr + serve.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    (error,) = [line["message"] for line in lines if line["type"] == "error"]
    assert said in error
    (error,) = [line for line in serve.stderr.splitlines() if line.startswith("error: ")]
    assert said in error
    shown = [line["status"]["conditions"] for line in lines if line["type"] == "endpoint" and "status" in line]
    degraded = [each for conditions in shown for each in conditions if each["type"] == "Degraded"]
    assert any(each["status"] == "True" and said in each["message"] for each in degraded)
    ready = [each["status"] for conditions in shown for each in conditions if each["type"] == "Ready"]
    assert "True" not in ready, "it never answered"
