"""Whether a model's weights can be trained: every number finite, every tensor there and as the configuration wants it.

One NaN among billions makes the first loss NaN, when the accelerators are paid for; a tensor that is not there would be
drawn at random without a word. Each file is read once, a block at a time, whatever the size of its tensors.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab_trainer.errors import BadConfiguration, InputMissing

BLOCK_BYTES = 4 << 20
_SHOWN = 3


class _Bits(NamedTuple):
    """How a floating-point format says "not finite": all bits of the exponent set, and NaN where any of the rest is."""

    word: str
    exponent: int
    mantissa: int


FLOATS = {
    "F64": _Bits("<u8", 0x7FF << 52, (1 << 52) - 1),
    "F32": _Bits("<u4", 0x7F80_0000, 0x007F_FFFF),
    "F16": _Bits("<u2", 0x7C00, 0x03FF),
    "BF16": _Bits("<u2", 0x7F80, 0x007F),
}
"""By safetensors' name; weights of other formats are quantised, and can't be trained."""


@dataclass(frozen=True)
class _Tensor:
    """One entry of a safetensors header; `start` is the place of its first byte in the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def check_weights(folder: Path) -> None:
    """Check all weights of a model folder whose files are whole (`check_model_folder`).

    Raises:
        InputMissing: a number is not finite, or a tensor is missing, of another shape or quantised; names tensor and
            file.
        BadConfiguration: transformers can't load the model.
    """
    tensors = [tensor for file in sorted(folder.rglob("*.safetensors")) for tensor in _tensors(file)]
    for tensor in tensors:
        if tensor.dtype in FLOATS:
            _check_finite(tensor, FLOATS[tensor.dtype])
    _check_fit(folder, tensors)


def _tensors(file: Path) -> Iterator[_Tensor]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    for name, entry in header.items():
        if name != "__metadata__":
            start = 8 + size + entry["data_offsets"][0]
            yield _Tensor(name, file, entry["dtype"], tuple(entry["shape"]), start)


def _check_finite(tensor: _Tensor, bits: _Bits) -> None:
    left, done = math.prod(tensor.shape), 0
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        while left:
            words: NDArray[Any] = np.fromfile(stream, bits.word, min(left, BLOCK_BYTES // np.dtype(bits.word).itemsize))
            found = np.flatnonzero((words & bits.exponent) == bits.exponent)
            if len(found):
                what = "NaN" if words[found[0]] & bits.mantissa else "an infinite number"
                at = [int(i) for i in np.unravel_index(done + int(found[0]), tensor.shape)]
                raise InputMissing(
                    f"{tensor.file.name}: tensor {tensor.name} holds {what} at {at}, and every loss would be NaN; "
                    "restore the file, or save the model again from weights that are finite"
                )
            left, done = left - len(words), done + len(words)


def _check_fit(folder: Path, tensors: list[_Tensor]) -> None:
    """Ask transformers' own loader, which knows every family's names, on the meta device: it reads no numbers."""
    from transformers import AutoModelForCausalLM  # see train_tokenizer
    from transformers.utils import logging as reports

    config = json.loads((folder / "config.json").read_bytes())
    if "quantization_config" in config:
        raise InputMissing(
            f"config.json: the weights are quantised (quantization_config); give the model in {_formats()}"
        )
    load: Any = AutoModelForCausalLM.from_pretrained  # not typed
    level = reports.get_verbosity()
    reports.set_verbosity(logging.CRITICAL)  # what it would report is raised below
    try:
        model, info = load(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # a configuration from outside can fail anywhere in the model's code
        raise BadConfiguration(
            f"config.json: {type(error).__name__}: {' '.join(str(error).split())[:500]}; correct the config"
        ) from error
    finally:
        reports.set_verbosity(level)
    files = {tensor.name: tensor.file.name for tensor in tensors}
    remedy = "restore the files, or the config.json that belongs to them"
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise InputMissing(f"no *.safetensors holds {', '.join(missing[:_SHOWN])}{more}; {remedy}")
    if wrong := sorted(info["mismatched_keys"]):
        name, found, wanted = wrong[0]
        raise InputMissing(
            f"{files.get(name, 'the weights')}: tensor {name} is {list(found)}, config.json makes it {list(wanted)}; "
            f"{remedy}"
        )
    parameters = {name for name, _ in model.named_parameters()}
    for tensor in tensors:
        names = {tensor.name, f"{model.base_model_prefix}.{tensor.name}"}
        if tensor.dtype not in FLOATS and names & parameters:
            raise InputMissing(
                f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype}, which can't be trained; "
                f"give the model in {_formats()}"
            )


def _formats() -> str:
    *first, last = FLOATS
    return f"{', '.join(first)} or {last}"
