"""Prepare one stage: the prepared folder, published under its digest, or found again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import structlog

from trimtab_trainer import manifest
from trimtab_trainer.algorithms.verifier import build_check
from trimtab_trainer.config import DataSource, PreparedStage, PrepareStage, StageType
from trimtab_trainer.data.encode import EncoderSettings
from trimtab_trainer.data.records import InvalidRecord, texts_of
from trimtab_trainer.data.store import PreparedInfo, TokenStore, write_info
from trimtab_trainer.data.tasks import TaskTemplates
from trimtab_trainer.data.tokenizer import (
    copy_tokenizer,
    find_control_tokens,
    load_tokenizer,
    tokenizer_digest,
    train_tokenizer,
)
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.lora_targets import choose_targets, require_bitsandbytes
from trimtab_trainer.ppo_settings import Ppo
from trimtab_trainer.prepare.demonstrations import prepare_demonstrations
from trimtab_trainer.prepare.estimate import memory_need, seconds
from trimtab_trainer.prepare.mix import prepare_mix
from trimtab_trainer.prepare.models import check_fit, complete_config
from trimtab_trainer.prepare.publish import fresh_folder, is_intact, publish_addressed, write_atomically
from trimtab_trainer.prepare.reading import Recognised, read_all
from trimtab_trainer.prepare.rejects import Rejects
from trimtab_trainer.prepare.remedies import frugal, require_fit, require_probe
from trimtab_trainer.prepare.rows import plan_rows
from trimtab_trainer.prepare.shape import ModelShape, model_shape
from trimtab_trainer.prepare.sources import DataSet, fetch_all
from trimtab_trainer.prepare.tokens import Tokenized, tokenize
from trimtab_trainer.rollout_limits import check_rollout
from trimtab_trainer.settings import Contract, TokenizerTraining

log = structlog.get_logger()

PREPARE_VERSION = 8
"""Raised when the same inputs give another folder, so that older results are not reused."""
_LIBRARIES = ("numpy", "tokenizers", "transformers")
_SAMPLE_TOKENS = 400
_RECIPE_KEYS = {"epochs", "max_steps", "global_batch_size", "seed"}
_STAGE_KEYS = {"type", "loss", "max_length", "packing", "on_invalid", "on_too_long", "max_dropped"}
_SOURCE_KEYS = {"weight", "cap", "replay_fraction", "templates", "few_shot", "held_out_task"}


@dataclass(frozen=True)
class Origin:
    """Where a stage's tokenizer and model configuration come from.

    Attributes:
        tokenizer: folder with its files; None to train it on the stage's data.
        train: how to train it; None when there is a folder.
        config: the model's configuration in Hugging Face's keys.
        complete: whether `config` is whole; otherwise it is completed for random weights.
        longest: longest row of any stage, in tokens.
    """

    tokenizer: Path | None
    train: TokenizerTraining | None
    config: dict[str, Any]
    complete: bool
    longest: int


@dataclass(frozen=True)
class _Fetched:
    """A stage's data sets."""

    own: Sequence[DataSet]
    """Those of `sources_of`."""
    mix: Sequence[DataSet]
    demonstrations: Sequence[DataSet]

    @classmethod
    def of(cls, stage: PrepareStage, scratch: Path) -> Self:
        """Fetch them into `scratch`."""
        return cls(
            fetch_all(sources_of(stage), scratch / "data"),
            fetch_all(stage.pretraining_mix, scratch / "mix"),
            fetch_all(stage.demonstrations, scratch / "demonstrations"),
        )

    @property
    def identity(self) -> list[Any]:
        """What all of them are."""
        return [data.identity() for data in (*self.own, *self.mix, *self.demonstrations)]


class _Remembered(Contract):
    """What `by-input/<key>.json` holds, for the next run with the same inputs."""

    stage: PreparedStage
    shape: ModelShape
    all_tokens: int
    """Tokens of all steps, over all epochs."""
    mix_tokens: int = 0
    """Of them, those of a pretraining mix, which are beside."""
    longest_row: int
    """Tokens; of `ppo` with the longest answer, or of its pretraining mix."""


def prepare_stage(stage: PrepareStage, origin: Origin, prepared: Path, scratch: Path) -> PreparedStage:
    """Make the stage's prepared folder below `prepared`, or find it; `scratch` is an empty folder on the same volume.

    Raises:
        StageError: with cause, place and remedy; nothing is left behind but in `scratch`.
    """
    _check_mixture(stage)
    if stage.lora is not None and stage.lora.quantization is not None:
        _check_quantization(stage)
    if stage.ppo:
        check_rollout(stage.ppo.rollout, stage.name, accelerator=stage.accelerator)
    if stage.verifier:
        build_check(stage.verifier)
    data = _Fetched.of(stage, scratch)
    note = prepared / "by-input" / f"{_input_key(stage, origin, data)}.json"
    if note.is_file():
        remembered = _Remembered.model_validate_json(note.read_bytes())
        digest = remembered.stage.digest
        if is_intact(prepared / digest.removeprefix("sha256:"), digest):
            log.info("prepared data found again: nothing is computed", stage=stage.name, digest=digest)
            return _report(stage, origin, remembered, prepared, reused=True)
        log.warning("prepared data are gone or damaged: made again", stage=stage.name, digest=digest)
    made = _make(stage, origin, data, prepared, fresh_folder(scratch / "draft"))
    write_atomically(note, made.model_dump_json(by_alias=True))
    return _report(stage, origin, made, prepared, reused=False)


def sources_of(stage: PrepareStage) -> list[DataSource]:
    """The data sets of a stage, those of its validation last."""
    return [*stage.data, *(stage.validation.data if stage.validation else [])]


def _check_mixture(stage: PrepareStage) -> None:
    """Whether there is something to train on besides replay; templates are compiled before anything is fetched."""
    if not any(source.in_mixture for source in stage.data):
        raise BadConfiguration("data holds replay and held-out tasks only; add a data set to train on")
    if (total := math.fsum(source.replay_fraction or 0 for source in stage.data)) >= 1:
        raise BadConfiguration(f"the replay fractions of data sum to {total:g}; lower them to less than 1 in all")
    for i, source in enumerate(stage.data):
        TaskTemplates(source.templates, f"data[{i}]")


def _check_quantization(stage: PrepareStage) -> None:
    """Whether the weights below an adapter can be held in 4 bits: this is the image that will train."""
    require_bitsandbytes()
    if stage.type is StageType.PPO:
        raise BadConfiguration("lora.quantization: a ppo stage holds its weights in its own precision; remove it")
    if stage.zero_stage == 3:
        raise BadConfiguration("lora.quantization: zeroStage 3 would shard what is packed; set zeroStage to 2")


def _make(stage: PrepareStage, origin: Origin, data: _Fetched, prepared: Path, draft: Path) -> _Remembered:
    sets = data.own
    if origin.tokenizer is not None:
        copy_tokenizer(origin.tokenizer, draft / "tokenizer")
    elif origin.train is not None:
        train_tokenizer(_texts(stage, sets[: len(stage.data)]), origin.train, draft / "tokenizer")
    name = f"stage {stage.name}"
    tokenizer = load_tokenizer(draft / "tokenizer")
    control = find_control_tokens(tokenizer, name)
    vocabulary = len(tokenizer)
    config = origin.config
    if not origin.complete:
        config = complete_config(config, vocabulary, control.document_separator, control.padding, origin.longest)
    check_fit(config, vocabulary, stage.max_length)
    shape = model_shape(config)
    if stage.lora is not None:
        choose_targets(stage.lora, shape.adaptable)  # a wrong name is told before minutes of tokenizing
    longest = None if stage.type is StageType.PRETRAIN else stage.max_length
    prompts = stage.type is StageType.PPO
    encoder = EncoderSettings(name, draft / "tokenizer", stage.loss, control.document_separator, longest, prompts)
    tokenized, store = tokenize(stage, sets, encoder, vocabulary, draft)
    planned = plan_rows(stage, store, tokenized, draft)
    info = PreparedInfo(
        type=stage.type,
        loss=stage.loss,
        max_length=stage.max_length,
        packing=stage.packing,
        seed=stage.recipe.seed,
        records=planned.records,
        dropped=sum(tokenized.dropped.values()),
        dropped_by_cause=tokenized.dropped,
        truncated=tokenized.truncated,
        tokens=planned.tokens,
        replayed_loss_tokens=planned.replayed_loss_tokens,
        validation_records=planned.validation_records,
        held_out_tasks=planned.held_out_tasks,
        global_batch_size=stage.recipe.global_batch_size,
        epochs=len(planned.epoch_rows),
        epoch_rows=planned.epoch_rows,
        total_steps=planned.total_steps,
        vocabulary_size=vocabulary,
        token_dtype="uint16" if store.tokens.dtype.itemsize == 2 else "uint32",
        tokenizer_digest=tokenizer_digest(draft / "tokenizer"),
        document_separator_id=control.document_separator,
        end_of_turn_id=control.end_of_turn,
        padding_id=control.padding,
    )
    sample = _sample(sets, tokenized, store, tokenizer, shows_loss=not prompts)
    mix_tokens, longest_row = 0, planned.longest_row
    if data.mix:
        mix = prepare_mix(stage, data.mix, encoder, info, draft)
        sample += "\n=== pretraining mix\n" + _sample(data.mix, mix.tokenized, mix.store, tokenizer, shows_loss=True)
        info = mix.counted_with(info)
        mix_tokens, longest_row = mix.info.tokens, max(longest_row, mix.longest_row)
    if data.demonstrations:
        made = prepare_demonstrations(stage, data.demonstrations, encoder, info, draft)
        shown = _sample(data.demonstrations, made.tokenized, made.store, tokenizer, shows_loss=False)
        sample += "\n=== demonstrations\n" + shown
        info = made.counted_with(info)
    write_info(draft, info)
    (draft / "model_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (draft / "sample.txt").write_text(sample, encoding="utf-8")
    log.info("data recognised", stage=stage.name)
    print(sample, flush=True)  # many lines, to be read as they are
    digest = manifest.seal(draft, "prepared", {"tokenizer": info.tokenizer_digest, "data": data.identity})
    publish_addressed(draft, prepared, digest)
    found = PreparedStage(
        digest=digest,
        records=info.records,
        dropped=info.dropped,
        truncated=info.truncated,
        tokens=info.tokens,
        steps=info.total_steps,
        memory_bytes=0,
        seconds=0,
    )
    return _Remembered(
        stage=found,
        shape=shape,
        all_tokens=planned.all_tokens,
        mix_tokens=mix_tokens,
        longest_row=longest_row,
    )


def _report(stage: PrepareStage, origin: Origin, made: _Remembered, prepared: Path, *, reused: bool) -> PreparedStage:
    """The found counts with the estimate for the stage's present hardware settings, which are no part of the folder.

    Raises:
        BadConfiguration: it does not fit.
    """
    folder = prepared / made.stage.digest.removeprefix("sha256:")
    config = json.loads((folder / "model_config.json").read_bytes())
    need = memory_need(made.shape, config, made.longest_row)
    if stage.autotune:
        require_probe(stage, need)
        stage = frugal(stage)
    memory, time = need(stage), seconds(stage, made.shape, made.all_tokens, made.mix_tokens)
    require_fit(stage, memory, need, from_weights=origin.complete)
    speed = round(made.all_tokens / time)
    found = {"memory_bytes": memory, "seconds": math.ceil(time), "tokens_per_second": speed}
    return made.stage.model_copy(update={**found, "reused": reused})


def _texts(stage: PrepareStage, sets: Sequence[DataSet]) -> Iterator[str]:
    """All text of the training data; finds bad records before the tokenizer's training has cost minutes."""
    rejects = Rejects(stage.on_invalid, stage.max_dropped)
    for place, record in read_all(sets, stage, Recognised()):
        if stage.data[place.source].held_out_task is not None:
            continue
        if isinstance(record, InvalidRecord):
            rejects.invalid(place, record)
        else:
            yield from texts_of(record)


def _input_key(stage: PrepareStage, origin: Origin, data: _Fetched) -> str:
    """Hex sha256 of all that the prepared folder follows from."""
    inputs = {
        "version": [PREPARE_VERSION, *(version(library) for library in _LIBRARIES)],
        "stage": stage.model_dump(mode="json", include=_STAGE_KEYS),
        "recipe": stage.recipe.model_dump(mode="json", include=_RECIPE_KEYS),
        "fraction": stage.validation.fraction if stage.validation else None,
        "mixture": [source.model_dump(mode="json", include=_SOURCE_KEYS) for source in sources_of(stage)],
        "data": [each.identity() for each in data.own],
        "answer": stage.max_new_tokens,
        "verifier": stage.verifier.model_dump(mode="json") if stage.verifier else None,
        "pretraining_mix": _mix_key(stage, data.mix) if data.mix else None,
        "demonstrations": [each.identity() for each in data.demonstrations],
        "tokenizer": tokenizer_digest(origin.tokenizer) if origin.tokenizer else None,
        "train": origin.train.model_dump(mode="json") if origin.train else None,
        "config": [origin.config, None if origin.complete else origin.longest],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _mix_key(stage: PrepareStage, mixed: Sequence[DataSet]) -> list[Any]:
    ppo = stage.ppo or Ppo()
    sources = [data.source.model_dump(mode="json", include=_SOURCE_KEYS) for data in mixed]
    rows = ppo.pretraining_rows(stage.recipe.global_batch_size)
    return [sources, [data.identity() for data in mixed], rows, ppo.minibatches, ppo.passes]


def _sample(
    sets: Sequence[DataSet], tokenized: Tokenized, store: TokenStore, tokenizer: Any, *, shows_loss: bool
) -> str:
    """What was recognised in each file, and each data set's first record as the model sees it, with what bears loss."""
    files = [file for data in sets for file in data.files]
    found = tokenized.recognised
    lines = [f"{file.name}: {found.formats[i]}, {found.records[i]} records" for i, file in enumerate(files)]
    for data, records in zip(sets, tokenized.by_set, strict=True):
        start, stop = store.offsets[records[0]], store.offsets[records[0] + 1]
        stop = min(int(stop), int(start) + _SAMPLE_TOKENS)
        ids, mask = store.tokens[start:stop].tolist(), store.loss[start:stop]
        learnt = tokenizer.decode([token for token, bears in zip(ids, mask, strict=True) if bears])
        where = f" of {data.source.uri.partition('?')[0]}" if len(sets) > 1 else ""
        lines += ["", f"--- first record{where}", tokenizer.decode(ids)]
        if shows_loss:
            lines += ["", "--- of it, this bears loss", learnt]
    return "\n".join([*lines, ""])
