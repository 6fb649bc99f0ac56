"""What `ppo` has sampled, on disk before the first update learns from it, and replayed by the next attempt.

`<stage>/rollouts/step-N/` holds the answers of step N with all that the four models said of them: one file a process,
sealed together like any artifact, so it is there whole or not at all. An attempt that goes on after a checkpoint makes
its steps with these, and samples only where there are none: so it learns from the same answers, whether or not sampling
again would give the same bits. The number of processes may be another one: rows are dealt anew.

A step that is sampled anew leaves no later one, since what sampled those is no longer what is in training.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from trimtab_trainer import manifest
from trimtab_trainer.checkpoints import Checkpoints, identity
from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PreparedData, Row
from trimtab_trainer.engine.batches import Step, rows_of_rank
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.experience import Experience
from trimtab_trainer.engine.rollout import episode
from trimtab_trainer.errors import CorruptArtifact, InputMissing
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.volumes import local_path

_FOLDER = "rollouts"
_NAME = re.compile(r"step-(\d+)")
_OF_ACTIONS = ("log_probs", "weights", "reference", "values", "entropy")
"""Of an `Experience`, what has a value for each action; advantages and returns follow from these and the score."""
_log = logging.getLogger(__name__)

Told = dict[str, float]
"""See `Judge.told`."""
Sampled = tuple[list[Experience], Told]
"""This rank's part of a step, and what is told of the whole."""


class RolloutStore:
    """The stored rollouts of one stage; all methods are collective."""

    def __init__(self, config: TrainConfig, group: Group, prepared: PreparedData, fence: Fence) -> None:
        self._group, self._prepared, self._fence = group, prepared, fence
        self._stage_folder = local_path(config.folder)
        self._folder = self._stage_folder / _FOLDER
        self._key = hashlib.sha256(identity(config).model_dump_json().encode()).hexdigest()

    def experience(self, step: Step, sample: Callable[[], Sampled]) -> Sampled:
        """What an earlier attempt has sampled for this step; else what `sample` gives, once it is on disk."""
        parts = self._group.broadcast(self._find(step) if self._group.is_first else 0)
        if parts:
            return self._read(step, parts)
        sampled = sample()
        self._write(step, *sampled)
        return sampled

    def _path(self, step: Step) -> Path:
        return self._folder / f"step-{step.index + 1}"

    def _find(self, step: Step) -> int:
        """Number of files of a rollout of this very stage, every byte verified; 0 where there is none."""
        folder = self._path(step)
        if not folder.exists():
            return 0
        try:
            found = manifest.verify(folder)
        except (CorruptArtifact, InputMissing) as error:
            _log.warning("%s; step %d is sampled again", error.message, step.index + 1)
            return 0
        if found.lineage["key"] != self._key:
            _log.warning("%s: sampled with other settings; step %d is sampled again", folder, step.index + 1)
            return 0
        _log.info("step %d: replaying the stored rollout", step.index + 1)
        return len(found.files)

    def _read(self, step: Step, parts: int) -> Sampled:
        folder = self._path(step)
        own = rows_of_rank(step.start, step.stop, self._group.rank, self._group.size)
        found: dict[int, Experience] = {}
        for part in {(row - step.start) % parts for row in own}:
            rows = rows_of_rank(step.start, step.stop, part, parts)
            prompts = [self._prepared.row(step.epoch, row) for row in rows]
            stored = load_file(folder / _file(part), str(self._group.device))
            found |= zip(rows, _unpacked(stored, prompts, self._prepared.info.end_of_turn_id), strict=True)
        return [found[row] for row in own], manifest.read_manifest(folder).lineage["told"]

    def _write(self, step: Step, experience: Sequence[Experience], told: Told) -> None:
        """Publish this step's rollout, and remove those that it or a checkpoint makes useless."""
        draft = self._folder / f".draft-step-{step.index + 1}-attempt-{self._fence.attempt}"
        if self._group.is_first:
            for old in self._folder.glob(".draft-*"):
                shutil.rmtree(old, ignore_errors=True)
            draft.mkdir(parents=True)
        self._group.barrier()
        (draft / _file(self._group.rank)).write_bytes(save(_packed(experience)))
        self._group.barrier()
        if self._group.is_first:
            manifest.seal(draft, "rollout", {"key": self._key, "told": told})
            self._fence.check()
            self._prune(step)
            manifest.publish(draft, self._path(step))
        self._group.barrier()

    def _prune(self, step: Step) -> None:
        """Before this step: what the newest checkpoint has. After it: what another policy has sampled."""
        saved = max(Checkpoints(self._stage_folder, self._fence).steps(), default=0)
        for folder in self._folder.iterdir():
            match = _NAME.fullmatch(folder.name)
            if match and not saved < int(match[1]) <= step.index:
                shutil.rmtree(folder)


def _file(part: int) -> str:
    return f"rank-{part}.safetensors"


def _packed(experience: Sequence[Experience]) -> dict[str, torch.Tensor]:
    """The N answers of A actions in all: `actions` int64 [N], `answers` int32 [A], `score` fp32 [N], the rest [A]."""
    rows = [each.episode.row for each in experience]
    answers = [torch.from_numpy(row.input_ids[row.loss_mask]) for row in rows]
    return {
        "actions": torch.tensor([len(answer) for answer in answers], dtype=torch.int64),
        "answers": torch.cat([torch.zeros(0, dtype=torch.int32), *answers]),
        "score": torch.tensor([float(each.score) for each in experience]),
        **{
            name: torch.cat([torch.zeros(0), *(getattr(each, name).cpu() for each in experience)])
            for name in _OF_ACTIONS
        },
    }


def _unpacked(stored: dict[str, torch.Tensor], prompts: Sequence[Row], end_id: int) -> list[Experience]:
    """The reverse, with the prompts that were answered."""
    actions: list[int] = stored["actions"].tolist()
    answers, *parts = (stored[name].split(actions) for name in ("answers", *_OF_ACTIONS))
    episodes = [episode(prompt, answer.cpu().numpy(), end_id) for prompt, answer in zip(prompts, answers, strict=True)]
    columns = dict(zip(_OF_ACTIONS, parts, strict=True)) | {"score": stored["score"].unbind()}
    return [
        Experience(each, **{name: column[i] for name, column in columns.items()}) for i, each in enumerate(episodes)
    ]


def remove(stage_folder: Path) -> None:
    """When the stage is done."""
    shutil.rmtree(stage_folder / _FOLDER, ignore_errors=True)
