"""Log-probabilities of the reference of `dpo`, computed once before the first step and looked up in each one.

They stay the same for the whole stage, so a second epoch would compute them again, and a second copy of the weights
would lie beside the model to the end. `<stage>/reference/` holds them for every answer that a step or a validation
will need, sealed like any artifact: an attempt that finds it whole computes nothing. Its key is what the numbers follow
from: the reference's weights and precision, the tokenizer with its template, and the answers' tokens as truncated; how
answers are packed into rows is no part of it.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab_trainer import manifest
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import VALIDATION, PlanName, PreparedData
from trimtab_trainer.engine.batches import MicroBatch, collate, in_micro_batches, plan_steps, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.errors import CorruptArtifact, InputMissing, Preempted
from trimtab_trainer.settings import ReferenceLogProbs
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.volumes import local_path

REFERENCE_FOLDER = "reference"
LARGE_COPY = 0.1
"""Of an accelerator's memory: a reference that would take more is not kept beside the model in training."""
_FILE = "log_probs.npy"
_NONE = -np.inf
"""Stands where nothing is recorded; no answer is impossible."""
_log = logging.getLogger(__name__)

LogProbs = Callable[[MicroBatch], torch.Tensor]
"""log p(answer | prompt), fp32 [S], of each of the segments of a micro-batch."""
Values = NDArray[np.float32]
"""[N]: of each text of the prepared data, or `_NONE`."""


def pays(config: TrainConfig, prepared: PreparedData, device: torch.device) -> bool:
    """Whether to compute them once: as the stage says, else where a pair is seen twice or the copy is large.

    In one epoch each pair is seen once, so computing them before costs as much as computing them on the way, and shows
    the first loss later; but what is computed before needs no copy of the weights while the model learns.
    """
    if config.preference is None or config.reference is None:
        return False
    setting = config.preference.reference_log_probs
    if setting is not ReferenceLogProbs.AUTO:
        return setting is ReferenceLogProbs.PRECOMPUTED
    if prepared.info.epochs > 1:
        return True
    shared = config.lora is not None and config.reference == config.model
    if device.type != "cuda" or shared:
        return False
    copy = sum(file.stat().st_size for file in local_path(config.reference.uri).glob("*.safetensors"))
    return copy > LARGE_COPY * torch.cuda.get_device_properties(device).total_memory


def content_key(config: TrainConfig, prepared: PreparedData) -> str:
    """Hex sha256 of all that the log-probabilities follow from."""
    files = manifest.read_manifest(prepared.folder).files
    inputs = {
        "version": 1,
        "reference": config.reference.digest if config.reference else None,
        "precision": config.precision,
        "tokenizer": prepared.info.tokenizer_digest,
        "maxLength": prepared.info.max_length,
        "answers": [files[name].sha256 for name in ("offsets.npy", "tokens.bin", "loss.bin")],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


class Recorded:
    """What was recorded, as a `LogProbs`."""

    def __init__(self, values: Values) -> None:
        self._values = values

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        """Look the answers of a micro-batch up."""
        return torch.from_numpy(self._values[list(batch.record_ids)]).to(batch.input_ids.device)


@dataclass(frozen=True)
class _Chunk:
    """Rows [start, stop) of a plan, put through the model as a step or a validation will."""

    plan: PlanName
    start: int
    stop: int


class Recorder:
    """Finds, computes and keeps the log-probabilities of one stage; all processes call it together."""

    def __init__(
        self,
        config: TrainConfig,
        group: Group,
        prepared: PreparedData,
        fence: Fence,
        told_to_stop: Callable[[], bool],
        beat: Callable[[], None],
    ) -> None:
        """`beat`: called after each micro-batch, so that a long pass is no hang."""
        self._config, self._group, self._prepared = config, group, prepared
        self._fence, self._told_to_stop, self._beat = fence, told_to_stop, beat
        self._folder = local_path(config.folder) / REFERENCE_FOLDER
        self._key = content_key(config, prepared)

    @property
    def pays(self) -> bool:
        """See `pays`."""
        return pays(self._config, self._prepared, self._group.device)

    def recorded(self, load: Callable[[], LogProbs]) -> Recorded:
        """From the stage's folder; what is not there is computed with what `load` gives, which is freed after it.

        Raises:
            Preempted: told to stop; what was computed so far is kept.
        """
        values = self._read()
        missing = [chunk for chunk in self._chunks() if self._is_missing(values, chunk)]
        if missing:
            _log.info("computing the reference's log-probabilities once, with %d steps' rows", len(missing))
            self._compute(values, missing, load())
            gc.collect()
            if self._group.device.type == "cuda":
                torch.cuda.empty_cache()
        return Recorded(values)

    def _chunks(self) -> Iterator[_Chunk]:
        """In the order and with the rows of the steps: so the first epoch's margins begin at exactly 0."""
        info = self._prepared.info
        for step in plan_steps(info.epoch_rows, info.global_batch_size, info.total_steps):
            yield _Chunk(step.epoch, step.start, step.stop)
        if info.has_validation:
            yield _Chunk(VALIDATION, 0, self._prepared.rows(VALIDATION))

    def _is_missing(self, values: Values, chunk: _Chunk) -> bool:
        return bool((values[self._prepared.texts(chunk.plan, chunk.start, chunk.stop)] == _NONE).any())

    @torch.no_grad()
    def _compute(self, values: Values, missing: list[_Chunk], log_probs: LogProbs) -> None:
        every = self._config.checkpoint.every_steps
        for done, chunk in enumerate(missing, start=1):
            if self._is_missing(values, chunk):  # not done with an earlier epoch's rows
                found = np.full_like(values, _NONE)
                for batch in self._micro_batches(chunk):
                    found[list(batch.record_ids)] = log_probs(batch).float().cpu().numpy()
                    self._beat()
                np.maximum(values, self._group.largest(found), out=values)
            stop = self._group.sum(float(self._told_to_stop()))[0] > 0
            if stop or done % every == 0 or done == len(missing):
                self._publish(values)
            if stop:
                raise Preempted(
                    f"told to stop: kept the reference's log-probabilities of {done} of {len(missing)} steps' rows",
                    stage=self._config.stage,
                )

    def _micro_batches(self, chunk: _Chunk) -> Iterator[MicroBatch]:
        """This rank's, as many as every rank has, grouped as the loop will group them."""
        size, group = self._config.recipe.micro_batch_size, self._group
        own = rows_of_rank(chunk.start, chunk.stop, group.rank, group.size)
        for part in in_micro_batches(own, chunk.stop - chunk.start, group.size, size):
            rows = [self._prepared.row(chunk.plan, i) for i in part]
            yield collate(rows, self._prepared.info.padding_id).to(group.device)

    def _read(self) -> Values:
        """Of this very key; nothing where the folder is damaged or of another one."""
        values = np.full(self._prepared.text_count, _NONE, dtype=np.float32)
        if self._group.is_first and self._folder.exists():
            try:
                fits = manifest.verify(self._folder).lineage.get("key") == self._key
            except (CorruptArtifact, InputMissing) as error:
                _log.warning("%s; the reference's log-probabilities are computed again", error.message)
                fits = False
            if not fits:
                shutil.rmtree(self._folder)
        self._group.barrier()
        return np.load(self._folder / _FILE) if self._folder.exists() else values

    def _publish(self, values: Values) -> None:
        """Replace the folder in one step; the first process writes."""
        if self._group.is_first:
            draft = self._folder.with_name(f".draft-{REFERENCE_FOLDER}-attempt-{self._config.attempt}")
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            np.save(draft / _FILE, values)
            manifest.seal(draft, "reference", {"key": self._key})
            self._fence.check()
            manifest.publish(draft, self._folder)
        self._group.barrier()


def remove(stage_folder: Path) -> None:
    """When the stage is done; drafts of killed attempts, too."""
    for folder in (stage_folder / REFERENCE_FOLDER, *stage_folder.glob(f".draft-{REFERENCE_FOLDER}-*")):
        shutil.rmtree(folder, ignore_errors=True)
