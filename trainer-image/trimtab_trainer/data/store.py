"""A prepared folder: the tokens of every record, and for each epoch the rows in their global order.

All of it is plain numpy and JSON, so other programs can read it too:

| file | contents |
| --- | --- |
| `info.json` | `PreparedInfo` |
| `tokenizer/` | the stage's tokenizer, chat template included |
| `model_config.json` | the model's configuration in Hugging Face's keys |
| `sample.txt` | what was recognised, and one rendered record |
| `tokens.bin`, `loss.bin` | token ids (`tokenDtype`, little endian); one byte a token: bears it loss as a target? |
| `offsets.npy` | int64 [N+1]: record r holds the tokens [offsets[r], offsets[r+1]) |
| `labels.npy` | `LABELS` [N]: of rankings, whose answers are records one after the other (`data/records.Label`) |
| `files.json`, `file_of_record.npy`, `line_of_record.npy` | where each record comes from |
| `PLAN.segments.npy` | int64 [S, 3]: (record, first token within the record, tokens) |
| `PLAN.rows.npy` | int64 [R+1]: row i holds the segments [rows[i], rows[i+1]) |
| `PLAN.loss.npy` | int64 [R+1]: loss-bearing tokens of all rows before row i |
| `references.json` | of each record, what a verifier of `ppo` compares the answer with |
| `pretraining-mix/` | the same files for the data whose gradients `ppo` adds, if it does |
| `demonstrations/` | the same files for the answers that `reward` is centred on, if any are given |

PLAN is `epoch-0000`, `epoch-0001`, …, `validation` or `task-NAME`. Segments of a row are isolated from each other
(block-diagonal attention, positions from 0), in `pretrain` as in `sft`; so the first token of a segment is no target.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from trimtab_trainer import manifest
from trimtab_trainer.config import Digest, StageType
from trimtab_trainer.data.records import NO_LABEL, DropCause, Label
from trimtab_trainer.settings import Contract, Loss

Int64 = NDArray[np.int64]

PlanName = int | str
"""An epoch, counted from 0, or the name of held-out rows."""

LABELS = np.dtype([("position", "u1"), ("rank", "u1"), ("margin", "<f4"), ("probability", "<f4")])

VALIDATION = "validation"
PRETRAINING_MIX = "pretraining-mix"
"""Folder of the data whose gradients `ppo` adds: like its parent, with one plan of all updates' rows."""
DEMONSTRATIONS = "demonstrations"
"""Folder of the answers that `reward` is centred on: like its parent, with one plan of all rows."""
_TASK = "task-"
_REFERENCES = "references.json"


def epoch_name(epoch: int) -> str:
    """Name of the plan of one epoch, counted from 0."""
    return f"epoch-{epoch:04d}"


def task_plan(task: str) -> str:
    """Name of the plan of a held-out task."""
    return f"{_TASK}{task}"


def task_of(plan: str) -> str:
    """The held-out task of a plan."""
    return plan.removeprefix(_TASK)


class PreparedInfo(Contract):
    """Contents of `info.json`. Token counts include the template and exclude padding."""

    version: Literal[1] = 1
    type: StageType
    loss: Loss
    max_length: int
    packing: bool
    seed: int
    records: int
    """Records of one epoch, after mixing and drops; a ranking is one."""
    dropped: int
    dropped_by_cause: dict[DropCause, int] = {}
    """Causes that no record was dropped for are absent."""
    truncated: int
    tokens: int
    """Tokens of the first epoch."""
    replayed_loss_tokens: int = 0
    """Of the first epoch's loss-bearing tokens, those that are replay."""
    validation_records: int
    held_out_tasks: dict[str, int] = {}
    """Records of each task that is never trained on."""
    global_batch_size: int
    epochs: int
    """Epochs that are planned: those that `total_steps` reaches, at most the recipe's."""
    epoch_rows: list[int]
    """Rows of each planned epoch; packing makes them differ a little."""
    total_steps: int
    """Optimiser steps of the stage: each epoch's rows in batches, its last one partial; cut at `maxSteps`."""
    vocabulary_size: int
    """Entries of the tokenizer, added tokens included."""
    token_dtype: Literal["uint16", "uint32"]
    tokenizer_digest: Digest
    document_separator_id: int
    end_of_turn_id: int
    padding_id: int

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out rows."""
        return self.validation_records > 0


@dataclass(frozen=True)
class Row:
    """One row of T tokens, T <= maxLength.

    Attributes:
        input_ids: int32 [T].
        loss_mask: bool [T]; token t bears loss as a target, that is, as the label of position t - 1. False for the
            first token of each segment.
        segment_lengths: tokens of each packed record or document, in order; their sum is T.
        record_ids: the record that each segment comes from.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    segment_lengths: list[int]
    record_ids: list[int]
    labels: NDArray[np.void] = field(default_factory=lambda: np.empty(0, dtype=LABELS))
    """`LABELS`, one a segment."""


@dataclass(frozen=True)
class RowPlan:
    """Rows as lists of segments; see the module's table for `segments` [S, 3] and `rows` [R+1]."""

    segments: Int64
    rows: Int64

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.segments[:, 2].sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(np.add.reduceat(self.segments[:, 2], self.rows[:-1]).max())


class TokenWriter:
    """Writes records to `folder` as they come; memory is constant a token (40 bytes a record)."""

    def __init__(self, folder: Path, vocabulary_size: int) -> None:
        self.dtype: Literal["uint16", "uint32"] = "uint16" if vocabulary_size <= 1 << 16 else "uint32"
        self._folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._loss = (folder / "loss.bin").open("wb")
        self._offsets = array("q", [0])
        self._lines = array("q")
        self._files = array("i")
        self._labels = bytearray()
        self._names: list[str] = []

    def add_file(self, name: str) -> int:
        """Register a source file; returns its number for `append`."""
        self._names.append(name)
        return len(self._names) - 1

    def append(
        self, ids: NDArray[np.int32], loss_mask: NDArray[np.bool_], file: int, line: int, label: Label = NO_LABEL
    ) -> int:
        """Add one record of at least one token; returns its id. Its first token is made to bear no loss."""
        loss_mask[0] = False
        self._tokens.write(ids.astype(f"<{np.dtype(self.dtype).str[1:]}").tobytes())
        self._loss.write(loss_mask.tobytes())
        self._offsets.append(self._offsets[-1] + len(ids))
        self._files.append(file)
        self._lines.append(line)
        self._labels += np.array(label, dtype=LABELS).tobytes()
        return len(self._lines) - 1

    def __enter__(self) -> Self:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files; after success also write the arrays beside them."""
        self._tokens.close()
        self._loss.close()
        if kind is None:
            np.save(self._folder / "offsets.npy", np.array(self._offsets, dtype=np.int64))
            np.save(self._folder / "labels.npy", np.frombuffer(bytes(self._labels), dtype=LABELS))
            np.save(self._folder / "line_of_record.npy", np.array(self._lines, dtype=np.int64))
            np.save(self._folder / "file_of_record.npy", np.array(self._files, dtype=np.int32))
            (self._folder / "files.json").write_text(json.dumps(self._names, ensure_ascii=False), encoding="utf-8")


class TokenStore:
    """Read access to the records of a folder that `TokenWriter` wrote."""

    def __init__(self, folder: Path, dtype: Literal["uint16", "uint32"]) -> None:
        self.offsets: Int64 = np.load(folder / "offsets.npy", mmap_mode="r")
        self.tokens: NDArray[Any] = _map(folder / "tokens.bin", np.dtype(dtype).newbyteorder("<"))
        self.labels: NDArray[np.void] = np.load(folder / "labels.npy", mmap_mode="r")
        self.loss: NDArray[np.bool_] = _map(folder / "loss.bin", np.dtype(np.bool_))

    def lengths(self) -> Int64:
        """int64 [N]: tokens of each record."""
        return np.diff(self.offsets)

    def answers(self) -> Int64:
        """int64 [N]: of a ranking's first text, how many answers the ranking has; what is left, of the others."""
        position = np.asarray(self.labels["position"], dtype=np.int64)
        sizes: Int64 = np.diff(np.append(np.flatnonzero(position == 0), len(position)))
        counts: Int64 = sizes[np.cumsum(position == 0) - 1] - position
        return counts

    def loss_counts(self) -> Int64:
        """int64 [N]: loss-bearing tokens of each record."""
        counts = np.empty(len(self.offsets) - 1, dtype=np.int64)
        step = 4096
        for start in range(0, len(counts), step):
            bounds = self.offsets[start : start + step + 1]
            chunk = self.loss[bounds[0] : bounds[-1]]
            counts[start : start + step] = np.add.reduceat(chunk, bounds[:-1] - bounds[0], dtype=np.int64)
        return counts


def write_plan(folder: Path, name: str, plan: RowPlan, store: TokenStore) -> None:
    """Write a plan and the cumulative number of its loss-bearing tokens."""
    record, start, length = plan.segments.T
    per_segment = store.loss_counts()[record]
    for i in np.flatnonzero(length != store.lengths()[record]):
        first = store.offsets[record[i]] + start[i]
        per_segment[i] = np.count_nonzero(store.loss[first + 1 : first + length[i]])
    cumulative = np.concatenate([[0], np.cumsum(per_segment)]).astype(np.int64)
    np.save(folder / f"{name}.segments.npy", plan.segments)
    np.save(folder / f"{name}.rows.npy", plan.rows)
    np.save(folder / f"{name}.loss.npy", cumulative[plan.rows])


def write_references(folder: Path, references: list[str]) -> None:
    """Write what a verifier compares the answer to each record with."""
    (folder / _REFERENCES).write_text(json.dumps(references, ensure_ascii=False), encoding="utf-8")


def write_info(folder: Path, info: PreparedInfo) -> None:
    """Write `info.json`."""
    (folder / "info.json").write_text(info.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")


class PreparedData:
    """A verified prepared folder. Everything large is memory-mapped; safe to open in several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = PreparedInfo.model_validate_json((folder / "info.json").read_bytes())
        self.tokenizer_folder = folder / "tokenizer"
        self._store = TokenStore(folder, self.info.token_dtype)
        self._plans: dict[str, tuple[Int64, Int64, Int64]] = {}

    @classmethod
    def open(cls, folder: Path, digest: str | None) -> Self:
        """Verify every file against the manifest, then open.

        Raises:
            InputMissing: the folder or its manifest is not there.
            CorruptArtifact: a file differs from the manifest, or the manifest from `digest`.
        """
        manifest.verify(folder, digest)
        return cls(folder)

    @cached_property
    def model_config(self) -> dict[str, Any] | None:
        """The model's configuration: completed for random weights, the model's own `config.json` otherwise."""
        path = self.folder / "model_config.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    @cached_property
    def pretraining_mix(self) -> PreparedData | None:
        """The data whose gradients `ppo` adds, if it does."""
        return self._beside(PRETRAINING_MIX)

    @cached_property
    def demonstrations(self) -> PreparedData | None:
        """The answers that `reward` is centred on, if any are given."""
        return self._beside(DEMONSTRATIONS)

    def _beside(self, name: str) -> PreparedData | None:
        folder = self.folder / name
        return PreparedData(folder) if folder.is_dir() else None

    @cached_property
    def references(self) -> list[str]:
        """Of each record, what a verifier compares the answer with."""
        references: list[str] = json.loads((self.folder / _REFERENCES).read_bytes())
        return references

    def with_longest(self, count: int, *, steps: int) -> Self:
        """The same data for so many steps, each of the first epoch's `count` longest rows; again where it is short."""
        made = type(self)(self.folder)
        segments, rows, loss = self._plan(0)
        order = np.argsort(-np.add.reduceat(segments[:, 2], rows[:-1]), kind="stable")
        chosen = np.resize(order[:count], count)
        made._plans[_file_name(0)] = (
            np.concatenate([segments[rows[i] : rows[i + 1]] for i in chosen]),
            np.cumsum([0, *(rows[chosen + 1] - rows[chosen])]),
            np.cumsum([0, *(loss[chosen + 1] - loss[chosen])]),
        )
        update = {"epoch_rows": [count], "global_batch_size": count, "total_steps": steps}
        made.info = self.info.model_copy(update={**update, "validation_records": 0, "held_out_tasks": {}})
        return made

    def rows(self, plan: PlanName) -> int:
        """Number of rows of a plan."""
        return len(self._plan(plan)[1]) - 1

    def row(self, plan: PlanName, index: int) -> Row:
        """Row `index` of a plan, in its global order."""
        segments, rows, _ = self._plan(plan)
        if not 0 <= index < len(rows) - 1:
            raise IndexError(f"row {index} of {len(rows) - 1} in {_file_name(plan)}")
        chosen = segments[rows[index] : rows[index + 1]]
        ids, masks = [], []
        for record, start, length in chosen.tolist():
            first = int(self._store.offsets[record]) + start
            ids.append(self._store.tokens[first : first + length].astype(np.int32))
            mask = np.array(self._store.loss[first : first + length])
            mask[0] = False
            masks.append(mask)
        records = chosen[:, 0].tolist()
        return Row(
            np.concatenate(ids), np.concatenate(masks), chosen[:, 2].tolist(), records, self._store.labels[records]
        )

    def loss_tokens(self, plan: PlanName, start: int, stop: int) -> int:
        """Loss-bearing tokens of the rows [start, stop). Can be 0 for a last batch of a single one-token row."""
        cumulative = self._plan(plan)[2]
        return int(cumulative[stop] - cumulative[start])

    @property
    def text_count(self) -> int:
        """Texts (answers of rankings, for one) that there are, planned or not."""
        return len(self._store.offsets) - 1

    def texts(self, plan: PlanName, start: int, stop: int) -> Int64:
        """Ids of the texts in the rows [start, stop), row by row."""
        segments, rows, _ = self._plan(plan)
        return segments[rows[start] : rows[stop], 0]

    def labels(self, texts: Int64) -> NDArray[np.void]:
        """`LABELS` of each of some texts."""
        labels: NDArray[np.void] = self._store.labels[texts]
        return labels

    def answers(self, plan: PlanName) -> tuple[Int64, Int64]:
        """Of each text of a plan: its place in its ranking, the best is 0, and its loss-bearing tokens; int64 [T]."""
        texts = self.texts(plan, 0, self.rows(plan))
        return self._store.labels["position"][texts].astype(np.int64), self._store.loss_counts()[texts]

    def rankings(self, plan: PlanName, start: int, stop: int) -> int:
        """Rankings (pairs, for one) in the rows [start, stop)."""
        return int(np.count_nonzero(self._store.labels["position"][self.texts(plan, start, stop)] == 0))

    def record_names(self, record_ids: Iterable[int]) -> list[str]:
        """`file:line` of records, for messages; each once, as the answers of a ranking have the same."""
        names: Sequence[str] = json.loads((self.folder / "files.json").read_bytes())
        file, line = (np.load(self.folder / f"{what}_of_record.npy", mmap_mode="r") for what in ("file", "line"))
        return list(dict.fromkeys(f"{names[file[record]]}:{line[record]}" for record in record_ids))

    def _plan(self, plan: PlanName) -> tuple[Int64, Int64, Int64]:
        name = _file_name(plan)
        if name not in self._plans:
            parts = [
                np.load(self.folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("segments", "rows", "loss")
            ]
            self._plans[name] = (parts[0], parts[1], parts[2])
        return self._plans[name]


def _file_name(plan: PlanName) -> str:
    return epoch_name(plan) if isinstance(plan, int) else plan


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The file as an array; an empty file can't be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
