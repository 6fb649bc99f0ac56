"""Fill a token store with the records of a stage, and say which of them each data set contributed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimtab_trainer.config import COMPARING, PrepareStage, StageType
from trimtab_trainer.data.encode import Encoded, EncoderSettings, Place, Result, encode_all
from trimtab_trainer.data.records import DropCause, InvalidRecord
from trimtab_trainer.data.store import Int64, TokenStore, TokenWriter, write_references
from trimtab_trainer.errors import BadData
from trimtab_trainer.prepare.reading import Recognised, read_all
from trimtab_trainer.prepare.rejects import Rejects
from trimtab_trainer.prepare.sources import DataSet
from trimtab_trainer.settings import OnTooLong


@dataclass(frozen=True)
class Tokenized:
    """The records of each data set, in the order of `sets`, and what happened on the way.

    A record is its first text's id, int64; a ranking's further answers and further wordings have the next ones.
    """

    by_set: list[Int64]
    examples: list[NDArray[np.bool_]]
    """Which records of each data set others can get as few-shot examples."""
    dropped: dict[DropCause, int]
    truncated: int
    recognised: Recognised


def tokenize(
    stage: PrepareStage, sets: Sequence[DataSet], encoder: EncoderSettings, vocabulary: int, folder: Path
) -> tuple[Tokenized, TokenStore]:
    """Tokenize all records of `sets` into `folder`.

    Raises:
        BadData: a record can't be used and may not be dropped, or a data set leaves nothing to learn from.
        BadConfiguration: the chat template can't be used.
    """
    rejects = Rejects(stage.on_invalid, stage.max_dropped)
    recognised = Recognised()
    by_set = [array("q") for _ in sets]
    examples = [array("b") for _ in sets]
    references: list[str] = []
    truncated = 0
    with TokenWriter(folder, vocabulary) as writer:
        for data in sets:
            for file in data.files:
                writer.add_file(file.name)
        results = encode_all(encoder, read_all(sets, stage, recognised), sum(data.size for data in sets))
        for place, texts, cut in _usable(results, stage, rejects):
            first, *_ = [writer.append(text.ids, text.loss_mask, place.file, place.line, text.label) for text in texts]
            by_set[place.source].append(first)
            examples[place.source].append((place.file, place.line) in recognised.examples)
            if stage.verifier is not None:
                references.append(recognised.references.pop((place.file, place.line)))
            truncated += cut
    if references:
        write_references(folder, references)
    for data, records in zip(sets, by_set, strict=True):
        if not records:
            dropped = f" ({rejects.dropped} dropped, first {rejects.first})" if rejects.dropped else ""
            raise BadData(f"{data.source.uri} leaves no record with a label{dropped}; check the data set")
    counts = [np.array(records, dtype=np.int64) for records in by_set]
    flags = [np.array(each, dtype=np.bool_) for each in examples]
    return Tokenized(counts, flags, dict(rejects.by_cause), truncated, recognised), TokenStore(folder, writer.dtype)


def _usable(
    results: Iterator[Result], stage: PrepareStage, rejects: Rejects
) -> Iterator[tuple[Place, tuple[Encoded, ...], bool]]:
    """Records that stay, each with whether it was truncated."""
    for place, result in results:
        if isinstance(result, InvalidRecord):
            rejects.invalid(place, result)
            continue
        longest = max(len(text.ids) for text in result)
        room = stage.max_length - stage.max_new_tokens
        cut = stage.type is not StageType.PRETRAIN and longest > room
        if cut:
            cause = f"{longest} tokens are more than maxLength = {stage.max_length}"
            if stage.max_new_tokens:
                cause += f" less {stage.max_new_tokens} for the answer"
                raise BadData(f"{place}: {cause}; raise maxLength, lower rollout.maxNewTokens, or shorten the prompt")
            if stage.on_too_long is OnTooLong.FAIL:
                raise BadData(f"{place}: {cause}; raise maxLength, shorten it, or set onTooLong to truncate or drop")
            if stage.on_too_long is OnTooLong.DROP:
                rejects.drop(place, InvalidRecord(cause, "raise maxLength"), DropCause.TOO_LONG)
                continue
            result = tuple(
                replace(text, ids=text.ids[: stage.max_length], loss_mask=text.loss_mask[: stage.max_length].copy())
                for text in result
            )
        if twins := _twins(result) if stage.type in COMPARING else "":
            cause = f"{twins} are the same tokens" + (f" at maxLength = {stage.max_length}" if cut else "")
            rejects.invalid(place, InvalidRecord(cause, "remove the record: nothing is to be learnt from it"))
        elif all(text.loss_mask[1:].any() for text in result):
            yield place, result, cut
        elif cut:
            cause = f"no label is left of it at maxLength = {stage.max_length}"
            rejects.drop(place, InvalidRecord(cause, "raise maxLength"), DropCause.NO_LABEL_LEFT)
        else:
            rejects.invalid(place, InvalidRecord("no token bears loss", "give it an answer, or remove it"))


def _twins(answers: Sequence[Encoded]) -> str:
    """Two answers that the model can't tell apart, by their ranks; empty where all differ.

    Texts that differ can give the same tokens: a chat template may trim them, truncation may cut the difference off.
    """
    seen: dict[bytes, int] = {}
    for i, answer in enumerate(answers):
        first = seen.setdefault(answer.ids.tobytes(), i)
        if first != i:
            return "chosen and rejected" if len(answers) == 2 else f"the answers of place {first + 1} and {i + 1}"
    return ""
