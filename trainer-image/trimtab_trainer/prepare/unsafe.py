"""What a model folder may hold: weights as safetensors, JSON, tokenizer files. Nothing that loading would run.

Loading code that a repository brings is a known way in (facts: CVE-2026-4372, CVE-2026-22807), so such folders are
refused, not cleaned: who ships code beside weights may rely on it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from trimtab_trainer.data.files import DataFile
from trimtab_trainer.errors import InputMissing, UnsafeInput

ALLOWED = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model")
REFUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py", ".pyc", ".so", ".sh", ".h5", ".msgpack")
MOST_HEADER_BYTES = 32 << 20
"""Of one safetensors file; the headers of the largest models have a few million. A parser needs a multiple of it."""
REFUSED_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


def wanted_model_file(name: str) -> bool:
    """Whether a file of a model folder is taken; the rest (licence pictures, other formats) is left behind.

    Raises:
        UnsafeInput: the file is code, or a pickle that runs code when it is read.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in REFUSED:
        raise UnsafeInput(
            f"{name}: code and pickles are refused, they can run anything when the model is loaded; "
            f"give a folder with *.safetensors, JSON and tokenizer files only"
        )
    return suffix in ALLOWED


def check_model_folder(files: Sequence[DataFile], uri: str) -> None:
    """Check contents: configurations without code hooks, whole safetensors, all shards of the index.

    Raises:
        UnsafeInput: a configuration names code.
        InputMissing: there is no configuration or no weights, or a file is damaged.
    """
    names = {file.name for file in files}
    if "config.json" not in names:
        raise InputMissing(f"{uri}: no config.json; give a model folder in Hugging Face's format")
    if not any(name.endswith(".safetensors") for name in names):
        raise InputMissing(f"{uri}: no *.safetensors; convert the weights to safetensors")
    for file in files:
        if file.name.endswith(".safetensors"):
            _check_weights(file)
        elif file.name.endswith("config.json"):
            check_json_keys(file)
        elif file.name.endswith(".safetensors.index.json"):
            _check_index(_json(file), file.name, names)


def check_json_keys(file: DataFile) -> None:
    """Refuse a configuration that names code at any depth; raises `UnsafeInput` with the key."""
    _check_keys(_json(file), file.name)


def _json(file: DataFile) -> Any:
    try:
        return json.loads(file.path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputMissing(f"{file.name}: not JSON ({error}); restore the file") from error


def _check_keys(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in REFUSED_KEYS:
                raise UnsafeInput(f"{name}: the key {key!r} makes loading run code; use a model without it")
            _check_keys(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check_keys(inner, name)


def _check_index(index: Any, name: str, present: set[str]) -> None:
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise InputMissing(f"{name}: no weight_map; restore the file")
    if missing := sorted({str(shard) for shard in shards.values()} - present):
        raise InputMissing(f"{name} names {missing[0]}, which is not there; restore the folder")


def _check_weights(file: DataFile) -> None:
    from safetensors import SafetensorError, safe_open

    with file.path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > MOST_HEADER_BYTES:
        raise UnsafeInput(
            f"{file.name}: its header claims {header:,} bytes, more than {MOST_HEADER_BYTES:,}; restore the file"
        )
    try:
        with safe_open(file.path, framework="numpy"):
            pass  # opening checks header, offsets and the file's length
    except (SafetensorError, OSError) as error:
        raise InputMissing(f"{file.name}: damaged or not safetensors ({error}); restore the file") from error
