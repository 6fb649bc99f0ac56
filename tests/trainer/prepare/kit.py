"""Small jobs to prepare, and what looks into their results."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab_trainer import prepare
from trimtab_trainer.config import PrepareConfig, PrepareReport
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.data.tokenizer import train_tokenizer
from trimtab_trainer.settings import TokenizerTraining

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int) -> list[dict[str, Any]]:
    """Question and answer pairs, all different."""
    return [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(count)
    ]


def stage(name: str, kind: str, *uris: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "data": [{"uri": uri} for uri in uris], "maxLength": 64, **fields}


def sft(*uris: str, **fields: Any) -> dict[str, Any]:
    return stage("chat", "sft", *uris, **{"loss": "assistant", **fields})


def tiny_model(path: Path) -> Path:
    """A model of `TINY` with random weights and its tokenizer, in Hugging Face's format."""
    train_tokenizer(iter(["What is it? It is 1."] * 9), TokenizerTraining(vocabulary_size=300), path)
    torch.manual_seed(1)
    options = {key: value for key, value in TINY.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **options)).save_pretrained(path)
    return path


def config(root: Path, *stages: dict[str, Any], model: dict[str, Any] | None = None, uid: str = "u-1") -> PrepareConfig:
    return PrepareConfig.model_validate(
        {
            "job": {"namespace": "default", "name": "job", "uid": uid},
            "root": root.as_uri(),
            "model": model or {"config": TINY, "tokenizerTrain": {"vocabularySize": 300}},
            "stages": list(stages),
        }
    )


def run(root: Path, *stages: dict[str, Any], **options: Any) -> PrepareReport:
    return prepare.run(config(root, *stages, **options))


def opened(root: Path, report: PrepareReport, index: int = 0) -> PreparedData:
    digest = report.stages[index].digest
    return PreparedData.open(root / "prepared" / digest.removeprefix("sha256:"), digest)


def leftovers(root: Path) -> list[str]:
    """Anything that a failed run left on the volume."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
