"""Starting weights: a fetched model folder without anything unsafe, content-addressed; or a completed configuration."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, BaseModelSource, Digest
from trimtab_trainer.data.fetch import Source, fetch
from trimtab_trainer.data.files import DataFile
from trimtab_trainer.data.tokenizer import TOKENIZER_FILES
from trimtab_trainer.errors import BadConfiguration, InputMissing, placed
from trimtab_trainer.prepare.publish import fresh_folder, is_intact, publish_addressed, write_atomically
from trimtab_trainer.prepare.unsafe import check_json_keys, check_model_folder, wanted_model_file
from trimtab_trainer.prepare.weights import check_weights
from trimtab_trainer.settings import Contract, TokenizerTraining
from trimtab_trainer.volumes import local_path

CHECKS_VERSION = 2
"""Raised when a fetched model is looked at more closely than before, so that what was found earlier counts no more."""


@dataclass(frozen=True)
class Base:
    """What root stages start from.

    Attributes:
        artifact: verified weights; None for random ones.
        config: the model's configuration in Hugging Face's keys, as given.
        tokenizer: folder with the tokenizer's files; None when it is to be trained.
        train: how to train the tokenizer; None when there is one.
    """

    artifact: Artifact | None
    config: dict[str, Any]
    tokenizer: Path | None
    train: TokenizerTraining | None


class _Remembered(Contract):
    digest: Digest


def resolve_base(model: BaseModelSource, root_uri: str, root: Path, scratch: Path) -> Base:
    """Find or fetch the weights and the tokenizer of root stages.

    Raises:
        BadConfiguration: neither or both of `uri` and `config`, or no tokenizer.
        InputMissing: the model can't be fetched or is damaged (`UnsafeInput`: it holds code).
    """
    if (model.uri is None) == (model.config is None):
        raise BadConfiguration("model: give exactly one of uri and config")
    if model.config is not None:
        tokenizer = _fetch_tokenizer(model, scratch / "tokenizer") if model.tokenizer_uri else None
        if tokenizer is None and model.tokenizer_train is None:
            raise BadConfiguration("model: random weights need a tokenizer; give tokenizer.uri or tokenizer.train")
        return Base(None, model.config, tokenizer, None if tokenizer else model.tokenizer_train)
    if model.tokenizer_train is not None or model.tokenizer_uri is not None:
        raise BadConfiguration(
            "model: a model with weights keeps its tokenizer and template, whose tokens the weights have learnt; "
            "remove tokenizer"
        )
    artifact, folder = _weights(model, root_uri, root, scratch / "model")
    config = json.loads((folder / "config.json").read_bytes())
    return Base(artifact, config, folder, None)


def _weights(model: BaseModelSource, root_uri: str, root: Path, scratch: Path) -> tuple[Artifact, Path]:
    uri = model.uri or ""
    source = Source(uri, model.revision, Path(model.secret_path) if model.secret_path else None)
    if model.digest is not None:
        folder = local_path(uri)
        kind = manifest.verify(folder, model.digest).kind
        if kind != "model":
            raise BadConfiguration(f"model: {uri} holds a {kind}, not a model; start from another stage's result")
        _fetch_model(source, scratch)
        with placed(uri):
            check_weights(folder)
        return Artifact(uri=uri, digest=model.digest), folder
    models = root / "models"
    note = models / "by-input" / f"{hashlib.sha256(f'{uri} {model.revision}'.encode()).hexdigest()}.json"
    pinned = urlsplit(uri).scheme == "hf"  # the only scheme whose contents can't change under the same name
    if pinned and note.is_file():
        digest = _Remembered.model_validate_json(note.read_bytes()).digest
        if is_intact(models / digest.removeprefix("sha256:"), digest):
            return _artifact(root_uri, digest), models / digest.removeprefix("sha256:")
    files = _fetch_model(source, scratch)
    draft = fresh_folder(scratch.with_name(f"{scratch.name}-draft"))
    for file in files:
        target = draft / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.path.is_relative_to(scratch):
            file.path.rename(target)
        else:
            shutil.copyfile(file.path, target)
    with placed(uri):
        check_weights(draft)
    digest = manifest.seal(draft, "model", {"uri": uri, "revision": model.revision})
    models.mkdir(parents=True, exist_ok=True)
    folder = publish_addressed(draft, models, digest)
    if pinned:
        write_atomically(note, _Remembered(digest=digest).model_dump_json())
    return _artifact(root_uri, digest), folder


def _fetch_model(source: Source, scratch: Path) -> list[DataFile]:
    """The model's files, checked; its own manifest is left out."""
    with placed(source.uri):
        files = fetch(source, "model", wanted_model_file, scratch)
        files = [file for file in files if file.name != manifest.MANIFEST]
        check_model_folder(files, source.uri)
    return files


def _artifact(root_uri: str, digest: str) -> Artifact:
    return Artifact(uri=f"{root_uri.rstrip('/')}/models/{digest.removeprefix('sha256:')}", digest=digest)


def _fetch_tokenizer(model: BaseModelSource, scratch: Path) -> Path:
    uri = model.tokenizer_uri or ""
    hub = urlsplit(uri).scheme == "hf"
    remote = hub or urlsplit(uri).scheme in ("s3", "gs", "az")
    source = Source(
        uri, model.revision if hub else None, Path(model.secret_path) if model.secret_path and remote else None
    )
    files = fetch(source, "model", lambda name: name in TOKENIZER_FILES, scratch)
    folder = fresh_folder(scratch.with_name(f"{scratch.name}-files"))
    for file in files:
        if file.name not in TOKENIZER_FILES:
            raise InputMissing(f"{uri}: {file.name} is no tokenizer file; give a folder with tokenizer.json")
        if file.name.endswith("config.json"):
            check_json_keys(file)
        shutil.copyfile(file.path, folder / file.name)
    return folder


def complete_config(
    config: dict[str, Any], vocabulary: int, separator: int, padding: int, longest: int
) -> dict[str, Any]:
    """The full configuration of a model with random weights: the class's defaults, and what follows from the tokenizer.

    Args:
        config: Hugging Face's keys, `model_type` among them.
        vocabulary: entries of the tokenizer; the default `vocab_size`.
        separator: id of the document separator; the end of sequence of a base model.
        padding: id of the padding token.
        longest: longest row of any stage in tokens; `max_position_embeddings` is at least that unless given.

    Raises:
        BadConfiguration: the model type or a key is unknown, or code is named.
    """
    from transformers import AutoConfig  # see train_tokenizer

    kind = str(config.get("model_type"))
    try:
        defaults = AutoConfig.for_model(kind).to_dict()
    except (ValueError, TypeError) as error:
        raise BadConfiguration(f"model.config: unknown model_type {kind!r}; use one that transformers knows") from error
    if unknown := sorted(config.keys() - defaults.keys()):
        raise BadConfiguration(f"model.config: {', '.join(unknown)}: no such key for {kind}; check the spelling")
    tokens = {"eos_token_id": separator, "pad_token_id": padding, "bos_token_id": None}
    known = defaults.get("max_position_embeddings")
    places = {"max_position_embeddings": max(known, longest)} if isinstance(known, int) else {}
    try:
        complete = AutoConfig.for_model(**{"vocab_size": vocabulary, **places, **tokens, **config})
    except Exception as error:  # validation code of any of hundreds of classes
        raise BadConfiguration(
            f"model.config: {type(error).__name__}: {' '.join(str(error).split())[:500]}; correct it"
        ) from error
    return dict(complete.to_dict())


def check_fit(config: dict[str, Any], vocabulary: int, max_length: int) -> None:
    """Check that the tokenizer and the longest row fit the model.

    Raises:
        BadConfiguration: a token or a position would have no embedding.
    """
    text = config.get("text_config") or config
    size, places = text.get("vocab_size"), text.get("max_position_embeddings")
    if isinstance(size, int) and size < vocabulary:
        raise BadConfiguration(
            f"the tokenizer has {vocabulary} tokens, the model's vocab_size is {size}; raise vocab_size"
        )
    if isinstance(places, int) and places < max_length:
        raise BadConfiguration(f"maxLength is {max_length}, the model has {places} positions; lower maxLength")
