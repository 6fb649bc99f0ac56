"""What is checked before a model is served: every byte by its digest, and that no file can carry code."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab_serving.config import ServeConfig
from trimtab_trainer.errors import BadConfiguration, CorruptArtifact, InputMissing, UnsafeInput
from trimtab_trainer.manifest import MANIFEST, verify
from trimtab_trainer.volumes import local_path

ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".png", ".svg"})
"""Weights, configuration, templates, tokenizers (`merges.txt`, `tokenizer.model`) and the model card."""

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM's CPU kernels know (vLLM 0.32, `CPUAttentionBackend`)."""

_CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})


def verified_model(config: ServeConfig) -> Path:
    """Folder of the configured model, after every check passed.

    Raises:
        InputMissing: the folder or its manifest is not there, or is no model.
        CorruptArtifact: a file differs from the manifest, or the manifest from the digest.
        UnsafeInput: a file of a type that can hold code, or a configuration that asks for code.
        BadConfiguration: a URI that can't be resolved.
    """
    folder = local_path(config.model.uri)
    if not folder.is_dir():
        raise InputMissing(f"{config.model.uri}: {folder} is not a folder; check model.uri and the claim behind it")
    manifest = verify(folder, config.model.digest)
    if manifest.kind != "model":
        raise InputMissing(f"{folder}: the artifact holds {manifest.kind!r}, not a model; check model.uri")
    for name in sorted(manifest.files):
        _refuse_code(folder / name)
    return folder


def require_cpu_support(folder: Path) -> None:
    """Refuse a model that vLLM can't run on a CPU, with the cause that vLLM's own last words do not name.

    Raises:
        BadConfiguration: the size of the attention heads.
    """
    path = folder / "config.json"
    config = json.loads(path.read_bytes())
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    if size is not None and size not in CPU_HEAD_SIZES:
        raise BadConfiguration(
            f"{path}: attention heads of size {size}; vLLM on a CPU takes {', '.join(map(str, CPU_HEAD_SIZES))}: "
            "train with another hidden_size or num_attention_heads, or serve on a GPU"
        )


def _refuse_code(path: Path) -> None:
    if path.suffix not in ALLOWED_SUFFIXES:
        raise UnsafeInput(
            f"{path}: files of type {path.suffix or 'none'!r} are not served; a model folder holds "
            f"{' '.join(sorted(ALLOWED_SUFFIXES))} only"
        )
    if path.suffix != ".json":
        return
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptArtifact(f"{path}: not JSON ({error}); {MANIFEST} was sealed over a broken file") from error
    if isinstance(content, dict) and (asked := _CODE_KEYS & content.keys()):
        raise UnsafeInput(f"{path}: {min(asked)!r} asks for code from the model folder; remove it and seal again")
