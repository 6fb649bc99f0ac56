"""The prepare Job's JSON: one for all stages, before any accelerator is claimed."""

from __future__ import annotations

from trimtab_operator.api import data as api
from trimtab_operator.api.base import SecretReference
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.ppo import Ppo
from trimtab_operator.api.stage import Dpo, Pretrain, Reward, Sft, Task
from trimtab_operator.api.status import ArtifactStatus
from trimtab_operator.core.podtemplate import SECRETS_PATH
from trimtab_operator.finetunejob.merge import Effective, accelerators, process_memory
from trimtab_trainer.config import (
    BaseModelSource,
    DataSource,
    JobIdentity,
    PrepareConfig,
    PrepareStage,
    Validation,
)
from trimtab_trainer.settings import Loss, SpecialTokens, TokenizerTraining


def prepare_config(
    identity: JobIdentity, job: FineTuneJob, stages: tuple[Effective, ...], model: ArtifactStatus | None
) -> PrepareConfig:
    """The configuration of the prepare pod. `model`: what a `job://` model was resolved to."""
    return PrepareConfig(
        job=identity,
        root=job.spec.artifacts.uri,
        model=_model(job.spec.model, model),
        stages=[_stage(stage) for stage in stages],
    )


def _model(source: api.BaseModelSource, resolved: ArtifactStatus | None) -> BaseModelSource:
    tokenizer = source.tokenizer
    return BaseModelSource(
        uri=resolved.uri if resolved else source.uri,
        digest=resolved.digest if resolved else None,
        revision=source.revision,
        secret_path=_secret_path(source.secret_ref),
        config=source.config,
        tokenizer_uri=tokenizer.uri if tokenizer else None,
        tokenizer_train=_training(tokenizer.train) if tokenizer and tokenizer.train else None,
    )


def _training(training: api.TokenizerTraining) -> TokenizerTraining:
    given = training.model_dump(exclude_none=True, exclude={"special_tokens"})
    tokens = training.special_tokens.model_dump(exclude_none=True) if training.special_tokens else {}
    return TokenizerTraining(**given, special_tokens=SpecialTokens(**tokens))


def _stage(stage: Effective) -> PrepareStage:
    task = stage.task
    given = task.model_dump(
        exclude_none=True, include={"max_length", "packing", "on_invalid", "on_too_long", "max_dropped"}
    )
    mix = task.pretraining_mix if isinstance(task, Ppo) else None
    shown = task.demonstrations if isinstance(task, Reward) else None
    return PrepareStage(
        name=stage.name,
        reward_stage=task.reward_from if isinstance(task, Ppo) else None,
        held_out_reward_stage=task.held_out_reward_from if isinstance(task, Ppo) else None,
        ppo=stage.ppo,
        pretraining_mix=[_source(source) for source in mix.data] if mix else [],
        demonstrations=[_source(source) for source in shown or []],
        type=stage.type,
        from_stage=stage.stage.from_,
        data=[_source(source) for source in task.data],
        validation=_validation(task.validation) if task.validation else None,
        loss=_loss(task),
        recipe=stage.recipe,
        lora=stage.lora,
        precision=stage.precision,
        zero_stage=stage.zero_stage,
        autotune=stage.autotune,
        world_size=stage.nodes * stage.processes,
        accelerator=accelerators(stage.stage) > 0,
        process_memory_bytes=process_memory(stage),
        **given,
    )


def _loss(task: Task) -> Loss:
    """Which tokens bear loss; of a pair, the answers that differ."""
    match task:
        case Sft(loss=loss):
            return loss or Loss.ASSISTANT
        case Dpo() | Reward():
            return Loss.COMPLETION
        case Pretrain() | Ppo():
            return Loss.ALL


def _validation(validation: api.Validation) -> Validation:
    return Validation(
        data=[_source(source) for source in validation.data or []],
        fraction=validation.fraction,
        every_steps=validation.every_steps,
    )


def _source(source: api.DataSource) -> DataSource:
    fields = {"uri", "revision", "weight", "cap", "templates", "few_shot", "held_out_task"}
    given = source.model_dump(exclude_none=True, include=fields)
    fraction = source.fraction if isinstance(source, api.MixtureSource) else None
    return DataSource(**given, replay_fraction=fraction, secret_path=_secret_path(source.secret_ref))


def _secret_path(ref: SecretReference | None) -> str | None:
    return f"{SECRETS_PATH}/{ref.name}" if ref else None
