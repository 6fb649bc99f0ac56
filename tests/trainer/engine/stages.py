"""A small prepared data set, a tiny model, and runs of the real entry point on them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tests.trainer.engine import forks
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab_trainer import manifest
from trimtab_trainer.config import REPORT, Artifact, JobIdentity, StageType, TrainConfig, dump
from trimtab_trainer.data.records import NO_LABEL, Label
from trimtab_trainer.data.store import (
    DEMONSTRATIONS,
    PRETRAINING_MIX,
    VALIDATION,
    PreparedInfo,
    RowPlan,
    TokenStore,
    TokenWriter,
    epoch_name,
    task_plan,
    write_info,
    write_plan,
    write_references,
)
from trimtab_trainer.settings import Checkpoint, Loss, Recipe
from trimtab_trainer.supervisor.run_folder import RunFolder

VOCABULARY = 64
SEPARATOR, END_OF_TURN, PADDING = 0, 1, 2
TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
JOB = JobIdentity(namespace="default", name="tiny", uid="11111111-2222-3333-4444-555555555555")


def write_prepared(
    root: Path,
    *,
    row_counts: list[int],
    batch: int,
    max_steps: int | None = None,
    validation: int = 0,
    task: int = 0,
    mix: int = 0,
    demonstrations: int = 0,
    stage_type: StageType = StageType.PRETRAIN,
    model_config: dict[str, Any] | None = None,
    seed: int = 0,
    lengths: tuple[int, int] = (2, 8),
) -> Artifact:
    """Ragged rows of one to three segments, or of one or two pairs or rankings; `row_counts` has those of each epoch.

    `validation` rows are held out, and `task` rows more as the task that is called `other-task`.
    `mix`: rows of a pretraining mix, three to an update.
    A prompt's reference is the word that follows by the rule of the rows.
    `demonstrations`: rows of them.
    `lengths`: the fewest and the most tokens of a segment.
    """
    draft = root / "volume" / "prepared" / "draft"
    _write_rows(draft, row_counts, batch, max_steps, validation, task, stage_type, seed, lengths)
    if mix:
        _write_rows(draft / PRETRAINING_MIX, [mix], 3, None, 0, 0, StageType.SFT, seed + 1, lengths)
    if demonstrations:
        _write_rows(draft / DEMONSTRATIONS, [demonstrations], 8, None, 0, 0, StageType.SFT, seed + 2, lengths)
    _write_tokenizer(draft / "tokenizer")
    (draft / "model_config.json").write_text(json.dumps(model_config or TINY_LLAMA))
    digest = manifest.seal(draft, "prepared", {})
    name = digest.removeprefix("sha256:")
    manifest.publish(draft, draft.with_name(name))
    return Artifact(uri=f"pvc://models/prepared/{name}", digest=digest)


def _write_rows(
    draft: Path,
    row_counts: list[int],
    batch: int,
    max_steps: int | None,
    validation: int,
    task: int,
    stage_type: StageType,
    seed: int,
    lengths: tuple[int, int],
) -> None:
    draft.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    total = max(row_counts) + validation + task
    references = []
    with TokenWriter(draft, VOCABULARY) as writer:
        file = writer.add_file("data.jsonl")
        segments_of_row = []
        for row in range(total):
            segments = []
            for label in _labels(stage_type, rng):
                length = int(rng.integers(lengths[0], lengths[1] + 1))
                start = int(rng.integers(3, VOCABULARY))
                # a learnable rule: each token is the one before plus 3
                ids = (3 + (start + 3 * np.arange(length)) % (VOCABULARY - 3)).astype(np.int32)
                references.append(f"w{3 + (ids[-1] - 3 + 3) % (VOCABULARY - 3)}")
                mask = rng.random(length) < (1.0 if stage_type is StageType.PRETRAIN else 0.6)
                mask[-1] = True
                segments.append((writer.append(ids, mask, file, 10 * row + len(segments) + 1, label), 0, length))
            segments_of_row.append(segments)
    if stage_type is StageType.PPO:
        write_references(draft, references)
    store = TokenStore(draft, writer.dtype)
    for epoch, count in enumerate(row_counts):
        order = np.random.default_rng([seed, epoch]).permutation(max(row_counts))[:count]
        write_plan(draft, epoch_name(epoch), _plan([segments_of_row[i] for i in order]), store)
    if validation:
        held_out = segments_of_row[max(row_counts) : max(row_counts) + validation]
        write_plan(draft, VALIDATION, _plan(held_out), store)
    if task:
        write_plan(draft, task_plan("other-task"), _plan(segments_of_row[-task:]), store)
    steps = sum(-(-count // batch) for count in row_counts)
    info = PreparedInfo(
        type=stage_type,
        loss=Loss.ALL,
        max_length=4 * lengths[1],
        packing=True,
        seed=seed,
        records=total,
        dropped=0,
        truncated=0,
        tokens=int(store.offsets[-1]),
        validation_records=validation,
        held_out_tasks={"other-task": task} if task else {},
        global_batch_size=batch,
        epochs=len(row_counts),
        epoch_rows=row_counts,
        total_steps=min(steps, max_steps or steps),
        vocabulary_size=VOCABULARY,
        token_dtype=writer.dtype,
        tokenizer_digest="sha256:" + "0" * 64,
        document_separator_id=SEPARATOR,
        end_of_turn_id=END_OF_TURN,
        padding_id=PADDING,
    )
    write_info(draft, info)


def _labels(stage_type: StageType, rng: np.random.Generator) -> list[Label]:
    """Of the segments of one row."""
    if stage_type is StageType.DPO:
        return [Label(i % 2, i % 2) for i in range(2 * int(rng.integers(1, 3)))]
    if stage_type is StageType.PPO:
        return [NO_LABEL]
    if stage_type is not StageType.REWARD:
        return [NO_LABEL] * int(rng.integers(1, 4))
    labels = []
    for _ in range(int(rng.integers(1, 3))):
        answers = int(rng.integers(2, 5))
        margin, probability = (0.5, 0.75) if answers == 2 and rng.random() < 0.5 else (0.0, 1.0)
        tie = int(answers > 2 and rng.random() < 0.5)  # of the two best answers
        labels += [Label(i, max(0, i - tie), margin, probability) for i in range(answers)]
    return labels


def _plan(rows: list[list[tuple[int, int, int]]]) -> RowPlan:
    bounds = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    return RowPlan(np.array([segment for row in rows for segment in row], dtype=np.int64), bounds)


def _write_tokenizer(folder: Path) -> None:
    words = ["<|document|>", "<|end|>", "<|pad|>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|document|>", pad_token="<|pad|>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    fast.save_pretrained(folder)


def stage(prepared: Artifact, **changes: Any) -> TrainConfig:
    """A stage of one process; `recipe` and `checkpoint` are given as dictionaries."""
    recipe = Recipe(**{"learning_rate": 1e-2, "epsilon": 1e-6, **changes.pop("recipe", {})})
    checkpoint = Checkpoint(**changes.pop("checkpoint", {}))
    values = {
        "job": JOB,
        "stage": "base",
        "type": StageType.PRETRAIN,
        "attempt": 1,
        "folder": "pvc://models/tiny/base",
        "prepared": prepared,
        "recipe": recipe,
        "checkpoint": checkpoint,
        "precision": "fp32",
        "progress_port": 0,
    }
    return TrainConfig(**{**values, **changes})


Launch = Callable[[TrainConfig, Path, dict[str, str]], "subprocess.Popen[str] | forks.Forked"]
"""Starts the first process of a container."""


@dataclass
class Run:
    """A stage under way, or ended, as a container."""

    root: Path
    config: TrainConfig
    process: subprocess.Popen[str] | forks.Forked
    output: str = ""
    report: Any = None
    """The termination message, once it has ended."""

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.root / "volume" / self.config.folder.removeprefix("pvc://models/")

    def finish(self, timeout: float = 240) -> int:
        """Wait for the end; returns the exit code."""
        self.output, _ = self.process.communicate(timeout=timeout)
        self.report = REPORT.validate_json((self.root / "termination.json").read_bytes())
        return self.process.returncode

    def rows(self) -> list[dict[str, Any]]:
        """Of `metrics.jsonl`: the rows of optimiser steps."""
        return [row for row in self.all_rows() if "loss" in row]

    def all_rows(self) -> list[dict[str, Any]]:
        """All complete rows of `metrics.jsonl`."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def log(self, rank: int = 0) -> str:
        """Log of one training process."""
        return (self.folder / "logs" / f"attempt-{self.config.attempt}" / f"rank-{rank}.log").read_text()

    def rank_pids(self) -> dict[int, int]:
        """Process ids of the training processes, by rank."""
        folders = sorted((self.root / "tmp").glob("trimtab-*"), key=lambda each: each.stat().st_mtime)
        return RunFolder(folders[-1]).pids() if folders else {}

    def wait_for(self, condition: Callable[[], object], timeout: float = 180) -> None:
        """Poll until `condition` holds; fails with the output if the stage ends first."""
        until = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise AssertionError(f"ended or timed out before the condition held:\n{self.process.communicate()[0]}")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Wait until `step` stands in the metrics."""
        self.wait_for(lambda: any(row["step"] >= step and row["attempt"] == self.config.attempt for row in self.rows()))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the container's first process."""
        self.process.send_signal(number)


def start(root: Path, config: TrainConfig, launch: Launch = forks.start) -> Run:
    """Start the stage."""
    (root / "volume").mkdir(parents=True, exist_ok=True)
    (root / "tmp").mkdir(exist_ok=True)
    (root / "termination.json").unlink(missing_ok=True)
    file = root / "stage.json"
    file.write_text(dump(config))
    environment = {
        **os.environ,
        "TRIMTAB_VOLUMES": json.dumps({"models": str(root / "volume")}),
        "TRIMTAB_TERMINATION_LOG": str(root / "termination.json"),
        "TMPDIR": str(root / "tmp"),
        "PYTHONUNBUFFERED": "1",
    }
    return Run(root, config, launch(config, file, environment))


def container(config: TrainConfig, file: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Everything anew, as a container does: `python -m trimtab_trainer FILE`."""
    return subprocess.Popen(
        [sys.executable, "-m", "trimtab_trainer", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def same_weights(one: Run, other: Run, file: str = "model/model.safetensors") -> bool:
    """Bit for bit."""
    weights, others = (load_file(each.folder / file) for each in (one, other))
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def run(root: Path, config: TrainConfig, launch: Launch = forks.start) -> tuple[Run, int]:
    """Start the stage and wait for its end."""
    started = start(root, config, launch)
    return started, started.finish()


def finished(root: Path, config: TrainConfig) -> Run:
    """Run a stage that has to end well."""
    ended, code = run(root, config)
    assert code == 0, ended.output
    return ended


def sealed(folder: Path, kind: manifest.Kind) -> Artifact:
    """A folder of weights as an artifact."""
    return Artifact(uri=folder.as_uri(), digest=manifest.seal(folder, kind, {}))
