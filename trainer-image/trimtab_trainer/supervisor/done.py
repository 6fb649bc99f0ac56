"""Finding the stage's own verified result, so that a stage that is done is never done again."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from trimtab_trainer import manifest
from trimtab_trainer.config import TrainConfig, TrainReport
from trimtab_trainer.errors import CorruptArtifact, InputMissing
from trimtab_trainer.lineage import Lineage

_log = logging.getLogger(__name__)


def find_result(config: TrainConfig, folder: Path) -> TrainReport | None:
    """The report of a result that this very stage has published, every byte verified; None where there is none.

    A damaged result is set aside as `model.corrupt-attempt-N`. Raises `CorruptArtifact` where `model/` is of other
    work.
    """
    model = folder / "model"
    if not model.exists():
        return None
    try:
        lineage = Lineage.model_validate(manifest.verify(model).lineage)
    except (CorruptArtifact, InputMissing) as error:
        aside = folder / f"model.corrupt-attempt-{config.attempt}"
        with suppress(FileNotFoundError):  # each pod of the attempt finds out; the first one moves it
            model.rename(aside)
        _log.warning("%s; the result is set aside as %s and made again", error.message, aside.name)
        return None
    if not lineage.is_of(config):
        raise CorruptArtifact(
            f"{model}: holds a result of job {lineage.job.name} ({lineage.job.uid}), stage {lineage.stage}, or of "
            "other inputs; artifacts are write-once: move it away or give the job another artifact root",
            stage=config.stage,
        )
    return TrainReport(
        digest=manifest.manifest_digest(model),
        step=lineage.step,
        total_steps=lineage.total_steps or lineage.step,
        best_step=lineage.best_step,
        tokens=lineage.tokens,
        metrics=lineage.metrics,
        already_done=True,
    )
