"""Prepare: everything about data and models that can fail, before an accelerator is claimed.

`run` fetches, refuses, recognises, validates, renders, tokenizes, packs, splits, counts and estimates, stage by
stage, and publishes `<root>/prepared/<hex digest>/` for each. The same inputs are found again, not computed again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from trimtab_trainer.config import STARTING_FROM_MODEL, PrepareConfig, PreparedStage, PrepareReport, PrepareStage
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.errors import BadConfiguration, StageError, StorageError, placed
from trimtab_trainer.prepare.models import Base, resolve_base
from trimtab_trainer.prepare.publish import fresh_folder
from trimtab_trainer.prepare.stage import Origin, prepare_stage
from trimtab_trainer.volumes import local_path

__all__ = ["run"]


def run(config: PrepareConfig) -> PrepareReport:
    """Prepare all stages of a job, in their order.

    Two jobs may prepare on one volume at the same time: each works in a folder of its own and publishes by rename.

    Raises:
        StageError: with the stage, where one is to blame; no half-written folder is left.
    """
    root = local_path(config.root)
    # The name is the job's own, so that an interrupted run's leavings are found and removed by its next run.
    identity = f"{config.job.namespace}/{config.job.name}/{config.job.uid}/{config.stages[0].name}"
    scratch = root / "prepared" / f".draft-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    try:
        fresh_folder(scratch)
        base = resolve_base(config.model, config.root, root, scratch) if _has_root(config) else None
        stages = _prepare_all(config, base, root / "prepared", scratch)
        return PrepareReport(model=base.artifact if base else None, stages=stages)
    except OSError as error:
        raise StorageError(
            f"{error.filename or config.root}: {error.strerror or error}; check the volume's space and rights"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _has_root(config: PrepareConfig) -> bool:
    return any(stage.from_stage is None and stage.from_prepared is None for stage in config.stages)


def _prepare_all(config: PrepareConfig, base: Base | None, prepared: Path, scratch: Path) -> list[PreparedStage]:
    longest = max(stage.max_length for stage in config.stages)
    done: dict[str, Path] = {}
    trained: Path | None = None
    reports = []
    for stage in config.stages:
        try:
            with placed(f"stage {stage.name}"):
                origin = _origin(stage, base, done, trained, longest)
                report = prepare_stage(stage, origin, prepared, fresh_folder(scratch / "stage"))
        except StageError as error:
            error.stage = error.stage or stage.name
            raise
        for field, name in (
            ("rewardFrom", stage.reward_stage),
            ("earlyStopping.heldOutRewardFrom", stage.held_out_reward_stage),
        ):
            if name is not None:
                own = prepared / report.digest.removeprefix("sha256:")
                _require_same_tokenizer(stage, field, name, done, own)
        done[stage.name] = prepared / report.digest.removeprefix("sha256:")
        if origin.train is not None:
            trained = done[stage.name] / "tokenizer"
        reports.append(report)
    return reports


def _origin(
    stage: PrepareStage, base: Base | None, done: dict[str, Path], trained: Path | None, longest: int
) -> Origin:
    if stage.from_prepared is not None:
        artifact = stage.from_prepared
        return _inherit(PreparedData.open(local_path(artifact.uri), artifact.digest).folder, longest)
    if stage.from_stage is not None:
        if stage.from_stage not in done:
            raise BadConfiguration(f"from: {stage.from_stage!r} is no earlier stage; name one that comes before")
        return _inherit(done[stage.from_stage], longest)
    if base is None:
        raise BadConfiguration("a stage without from needs spec.model")
    if base.artifact is None and stage.type in STARTING_FROM_MODEL:
        raise BadConfiguration(
            f"a {stage.type} stage starts from a model, and there are random weights only; give from, or model.uri"
        )
    # The tokenizer is trained on the first root stage's data; later roots take the same one.
    train = base.train if trained is None else None
    return Origin(base.tokenizer or trained, train, base.config, base.artifact is not None, longest)


def _require_same_tokenizer(stage: PrepareStage, field: str, name: str, done: dict[str, Path], own: Path) -> None:
    """A reward model reads the tokens that the policy writes."""
    other = done.get(name)
    if other is None:
        raise BadConfiguration(f"{field}: {name!r} is no earlier stage", stage=stage.name)
    if PreparedData(other).info.tokenizer_digest != PreparedData(own).info.tokenizer_digest:
        raise BadConfiguration(
            f"the tokenizer of {field} ({name}) is another one than the stage's: its scores would be "
            "of other texts; start both from one model",
            stage=stage.name,
        )


def _inherit(folder: Path, longest: int) -> Origin:
    model_config = json.loads((folder / "model_config.json").read_bytes())
    return Origin(folder / "tokenizer", None, model_config, True, longest)
