"""Failures of the real entry point, each with its exit code and a message with cause, place and remedy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.trainer.engine import stages
from tests.trainer.small_volume import small_volume

from trimtab_trainer import manifest
from trimtab_trainer.checkpoints import Checkpoints
from trimtab_trainer.config import REPORT
from trimtab_trainer.supervisor.fence import Fence

RECIPE = {"global_batch_size": 4, "epochs": 2}


def test_a_port_in_use(tmp_path: Path) -> None:
    prepared = stages.write_prepared(tmp_path, row_counts=[4], batch=4)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run, code = stages.run(tmp_path, stages.stage(prepared, progress_port=port))
    assert (code, run.report.reason) == (64, "BadConfiguration")
    assert f"127.0.0.1:{port}: Address already in use" in run.report.message
    assert "free the port" in run.report.message


def test_a_newer_attempt_has_taken_over(tmp_path: Path) -> None:
    config = stages.stage(stages.write_prepared(tmp_path, row_counts=[4], batch=4))
    run = stages.start(tmp_path, config, stages.container)
    run.folder.mkdir(parents=True)
    (run.folder / "attempt").write_text("7\n")
    assert run.finish() == 70
    assert run.report.reason == "Superseded"
    assert (run.folder / "attempt").read_text() == "7\n"
    assert [p.name for p in run.folder.iterdir()] == ["attempt"]


def test_a_file_that_is_no_stage(tmp_path: Path) -> None:
    file, log = tmp_path / "stage.json", tmp_path / "termination.json"
    file.write_text(json.dumps({"kind": "train", "jobb": 1}))
    command = [sys.executable, "-m", "trimtab_trainer", str(file)]
    done = subprocess.run(command, env={**os.environ, "TRIMTAB_TERMINATION_LOG": str(log)}, check=False)
    report = REPORT.validate_json(log.read_bytes())
    assert (done.returncode, report.reason) == (64, "BadConfiguration")
    assert "train.jobb: Extra inputs are not permitted" in report.message
    file.unlink()
    done = subprocess.run(command, env={**os.environ, "TRIMTAB_TERMINATION_LOG": str(log)}, check=False)
    assert done.returncode == 66
    assert f"{file}: No such file or directory" in REPORT.validate_json(log.read_bytes()).message


def test_a_damaged_result_is_never_reported_and_a_strangers_result_never_replaced(tmp_path: Path) -> None:
    tied = {**stages.TINY_LLAMA, "tie_word_embeddings": True}
    prepared = stages.write_prepared(
        tmp_path, row_counts=[4], batch=4, stage_type=stages.StageType.SFT, model_config=tied
    )
    config = stages.stage(prepared, type="sft", recipe={"global_batch_size": 4})
    first, code = stages.run(tmp_path, config)
    assert code == 0, first.output
    generation = json.loads((first.folder / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == stages.END_OF_TURN
    assert generation["pad_token_id"] == stages.PADDING

    other, code = stages.run(tmp_path, config.model_copy(update={"attempt": 2, "stage": "other"}))
    assert code == 66
    assert "artifacts are write-once" in other.report.message

    weights = first.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    again, code = stages.run(tmp_path, config.model_copy(update={"attempt": 3}))
    assert code == 0, again.output
    assert "set aside as" in again.output
    assert again.report.digest == manifest.manifest_digest(again.folder / "model")
    assert not again.report.already_done


def test_a_loss_that_is_not_finite_names_the_records(tmp_path: Path) -> None:
    config = {**stages.TINY_LLAMA, "rms_norm_eps": -1.0}
    prepared = stages.write_prepared(tmp_path, row_counts=[4], batch=4, model_config=config)
    run, code = stages.run(tmp_path, stages.stage(prepared, recipe={"global_batch_size": 4}))
    assert (code, run.report.reason) == (70, "NotFinite")
    assert "step 1: the loss is nan" in run.report.message
    assert "data.jsonl:1" in run.report.message
    assert not (run.folder / "model").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "recurrent_gemma"}, "recurrent_gemma: records packed into one row see each other"),
        ({"model_type": "mamba", "state_size": 8}, "transformers can't build this model with sdpa attention"),
    ],
)
def test_an_architecture_that_would_mix_packed_records(tmp_path: Path, model: dict, message: str) -> None:
    prepared = stages.write_prepared(tmp_path, row_counts=[4], batch=4, model_config={**stages.TINY_LLAMA, **model})
    run, code = stages.run(tmp_path, stages.stage(prepared, recipe={"global_batch_size": 4}))
    assert (code, run.report.reason) == (64, "BadConfiguration"), run.output
    assert message in run.report.message


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    prepared = stages.write_prepared(tmp_path, row_counts=[40], batch=4)
    config = stages.stage(prepared, recipe={"global_batch_size": 4}, checkpoint={"every_steps": 1, "keep": 9})
    folder = tmp_path / "volume" / "tiny" / "base"
    folder.parent.mkdir(parents=True)
    with small_volume(tmp_path / "small", "2m") as volume:
        folder.symlink_to(volume)
        run, code = stages.run(tmp_path, config)
        assert (code, run.report.reason) == (74, "StorageError"), run.output
        assert "could not be saved" in run.report.message
        assert "free space on it or make it larger" in run.report.message
        checkpoints = Checkpoints(folder, Fence(folder, 1))
        assert len(checkpoints.steps()) >= 1
        for step in checkpoints.steps():
            manifest.verify(checkpoints.path(step))
        assert [p.name for p in checkpoints.folder.glob(".*")] == []


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    prepared = stages.write_prepared(tmp_path, row_counts=[400], batch=4)
    config = stages.stage(prepared, recipe={"global_batch_size": 4}, processes_per_node=2)
    run = stages.start(tmp_path, config, stages.container)
    run.wait_for_step(1)
    processes = [psutil.Process(run.process.pid), *psutil.Process(run.process.pid).children(recursive=True)]
    assert len(processes) >= 4
    run.signal(signal.SIGKILL)
    run.process.wait()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
