"""The folder of checkpoints: names, publication, choice of the one to resume from, pruning. Imports no torch.

A checkpoint is a sealed folder `checkpoints/step-N/`. One whose bytes differ from its manifest is renamed to
`step-N.corrupt` and never read again.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from trimtab_trainer import manifest
from trimtab_trainer.config import CheckpointReport, Digest, StageType, TrainConfig
from trimtab_trainer.errors import BadConfiguration, CorruptArtifact, InputMissing
from trimtab_trainer.ppo_settings import Ppo
from trimtab_trainer.settings import Contract, EarlyStopping, Lora, Optimizer, Precision, Preference, Recipe, ZeroStage
from trimtab_trainer.supervisor.fence import Fence

_log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")
_CORRUPT = re.compile(r"step-\d+\.corrupt.*")
STATE_FILE = "trainer.json"


class Identity(Contract):
    """What must be equal for a checkpoint to be resumed from."""

    type: StageType
    prepared: Digest
    model: Digest | None
    reference: Digest | None = None
    recipe: Recipe
    lora: Lora | None = None
    preference: Preference | None = None
    reward: Digest | None = None
    held_out_reward: Digest | None = None
    ppo: Ppo | None = None
    early_stopping: EarlyStopping | None = None
    validation_every_steps: int | None = None
    """With early stopping; otherwise it has no part in the result."""
    precision: Precision
    zero_stage: ZeroStage


class Best(Contract):
    """The best measurement of what is held out so far."""

    step: int
    loss: float
    """The validation loss; of `ppo` the held-out score with its sign turned."""
    reward: float | None = None
    """Of `ppo`: the mean score of the same answers by what the policy learns from."""
    measured_since: int = 0
    """Measurements in a row that ask for an end: none of them was an improvement, and of `ppo` each was gamed."""


class TrainerState(Contract):
    """Contents of `trainer.json`: where training stands. Weights, optimiser and RNG states are in files beside it."""

    identity: Identity
    step: int
    """Optimiser steps done."""
    epoch: int
    row: int
    """Rows done of this epoch's global order."""
    tokens: int
    loop: dict[str, float] = {}
    """What the stage's loop carries to the next step, by name."""
    best: Best | None = None
    """With early stopping, once the validation loss has been measured; its checkpoint is kept."""
    world_size: int
    threads: int
    attempt: int


def identity(config: TrainConfig) -> Identity:
    """The identity of the checkpoints that `config` writes."""
    return Identity(
        type=config.type,
        prepared=config.prepared.digest,
        model=config.model.digest if config.model else None,
        reference=config.reference.digest if config.reference else None,
        preference=config.preference,
        reward=config.reward.digest if config.reward else None,
        held_out_reward=config.held_out_reward.digest if config.held_out_reward else None,
        ppo=config.ppo,
        early_stopping=config.early_stopping,
        validation_every_steps=config.validation_every_steps if config.stops_early else None,
        recipe=config.recipe,
        lora=config.lora,
        precision=config.precision,
        zero_stage=config.zero_stage,
    )


class Checkpoints:
    """The checkpoints of one stage, as one attempt sees them."""

    def __init__(self, stage_folder: Path, fence: Fence) -> None:
        self.folder = stage_folder / "checkpoints"
        self._fence = fence

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or will be."""
        return self.folder / f"step-{step}"

    def draft(self, step: int) -> Path:
        """Where it is written first."""
        return self.folder / f".draft-step-{step}-attempt-{self._fence.attempt}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for p in self.folder.iterdir() if (match := _NAME.fullmatch(p.name)))

    def reports(self) -> list[CheckpointReport]:
        """Step and digest of each checkpoint, ascending; digests are not verified here."""
        return [CheckpointReport(step=step, digest=manifest.manifest_digest(self.path(step))) for step in self.steps()]

    def publish(self, state: TrainerState, keep: int) -> str:
        """Seal the draft of this step and give it its name, unless a newer attempt has come; returns the digest.

        The newest `keep` stay, and the best one.
        """
        draft = self.draft(state.step)
        (draft / STATE_FILE).write_text(state.model_dump_json(by_alias=True, indent=1) + "\n", encoding="utf-8")
        digest = manifest.seal(draft, "checkpoint", lineage={"step": state.step, "attempt": state.attempt})
        self._fence.check()
        manifest.publish(draft, self.path(state.step))
        kept = {*self.steps()[-keep:], state.best.step if state.best else state.step}
        for step in set(self.steps()) - kept:
            shutil.rmtree(self.path(step))
        return digest

    def scratch(self, step: int) -> Path:
        """Where the checkpoint of `step` is converted for another number of processes; never a checkpoint itself."""
        return self.folder / f".draft-universal-step-{step}-attempt-{self._fence.attempt}"

    def remove_drafts(self) -> None:
        """Remove what an interrupted save or conversion left."""
        for draft in self.folder.glob(".draft-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def newest_verified(self, config: TrainConfig) -> TrainerState | None:
        """State of the newest checkpoint whose every byte is as it was written; None where there never was one.

        Corrupt ones are set aside, with a warning; so are those that count on the weights of a corrupt one.

        Raises:
            CorruptArtifact: there were checkpoints, but none is left.
            BadConfiguration: the checkpoint was written with other settings or another number of processes.
        """
        while steps := self.steps():
            folder = self.path(steps[-1])
            if not self._intact(folder):
                continue
            state = TrainerState.model_validate_json((folder / STATE_FILE).read_bytes())
            _check_fits(folder, state, config)
            best = self.path(state.best.step) if state.best else folder
            if best == folder or self._intact(best):
                return state
            aside = self._set_aside(folder)
            _log.warning("%s counts on the weights of %s, which are lost; set aside as %s", folder, best, aside.name)
        if self.folder.is_dir() and any(_CORRUPT.fullmatch(p.name) for p in self.folder.iterdir()):
            raise CorruptArtifact(
                f"{self.folder}: no checkpoint is left that can be resumed from; restore one from a backup, "
                f"or remove {self.folder} to train the stage from its first step",
                stage=config.stage,
            )
        return None

    def _intact(self, folder: Path) -> bool:
        """Whether every byte is as it was written; a folder that is not is set aside, with a warning."""
        try:
            manifest.verify(folder)
        except (CorruptArtifact, InputMissing) as error:
            aside = self._set_aside(folder).name if folder.is_dir() else "nothing"
            _log.warning("%s; set aside as %s, trying the one before", error.message, aside)
            return False
        return True

    def _set_aside(self, folder: Path) -> Path:
        aside = folder.with_name(f"{folder.name}.corrupt")
        number = 1
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{folder.name}.corrupt-{number}")
        return folder.rename(aside)


def _check_fits(folder: Path, state: TrainerState, config: TrainConfig) -> None:
    expected = identity(config)
    differing = [name for name in Identity.model_fields if getattr(state.identity, name) != getattr(expected, name)]
    if differing:
        raise BadConfiguration(
            f"{folder}: written with another {', '.join(differing)}; what defines a stage's result can't change on the "
            f"way: create a new job, or remove {folder.parent} to train from the first step",
            stage=config.stage,
        )
    world_size = config.nodes * config.processes_per_node
    if state.world_size != world_size:
        if config.recipe.optimizer is Optimizer.SGD and config.zero_stage > 0:
            raise BadConfiguration(
                f"{folder}: written by {state.world_size} processes, this attempt has {world_size}; DeepSpeed can't "
                f"convert the sharded state of sgd: set nodes x processesPerNode to {state.world_size}, or remove "
                f"{folder.parent} to train from the first step",
                stage=config.stage,
            )
        _log.warning(
            "%s: written by %d processes, this attempt has %d: it is converted, and the result can differ by rounding",
            folder,
            state.world_size,
            world_size,
        )
    if state.threads != config.threads:
        _log.warning(
            "%s: written with %d threads a process, this attempt has %d: the result can differ by rounding",
            folder,
            state.threads,
            config.threads,
        )
