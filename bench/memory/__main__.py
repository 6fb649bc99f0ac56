"""`python -m bench.memory`: the estimate of memory beside what real stages need on this machine's CPU, as a table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.trainer.engine import stages
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, PrepareStage, StageType, TrainConfig, dump
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.engine import reward
from trimtab_trainer.ppo_settings import Ppo, Rollout
from trimtab_trainer.prepare.activations import count_activations
from trimtab_trainer.prepare.memory import process_memory
from trimtab_trainer.prepare.shape import model_shape
from trimtab_trainer.settings import Lora, Preference

MIB = 1 << 20
TOKENS = 128
"""Of each segment."""
MODEL = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class Case:
    """A stage to measure, from random weights."""

    name: str
    type: StageType = StageType.PRETRAIN
    micro: int = 8
    fields: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("pretrain"),
    Case("pretrain-checkpointed", micro=32, recipe={"gradient_checkpointing": True}),
    Case("pretrain-zero-2", fields={"zero_stage": 2}),
    Case("pretrain-zero-3", fields={"zero_stage": 3}),
    Case("sft-bf16", StageType.SFT, 16, {"precision": "bf16"}),
    Case("sft-lora", StageType.SFT, 10, {"lora": Lora(rank=16)}),
    Case("dpo", StageType.DPO, 4, {"preference": Preference()}),
    Case("reward", StageType.REWARD, 4),
    Case("ppo", StageType.PPO, 16, {"ppo": Ppo(rollout=Rollout(max_new_tokens=16))}),
)


def write_start(root: Path, name: str, auto: Any, kind: manifest.Kind) -> Artifact:
    """Random weights as the result of an earlier stage."""
    folder = root / "volume" / name / "model"
    torch.manual_seed(0)
    auto.from_config(AutoConfig.for_model(**MODEL, num_labels=1)).save_pretrained(folder)
    if kind == "reward":
        reward.write_offset(folder, 0.0)
    return Artifact(uri=f"pvc://models/{name}/model", digest=manifest.seal(folder, kind, {}))


def configure(case: Case, root: Path, model: Artifact, scorer: Artifact) -> TrainConfig:
    """The stage of a case, with its prepared data."""
    prepared = stages.write_prepared(
        root, row_counts=[2 * case.micro], batch=case.micro, stage_type=case.type, model_config=MODEL,
        lengths=(TOKENS, TOKENS), seed=CASES.index(case),
    )  # fmt: skip
    extra: dict[str, Any] = dict(case.fields)
    if case.type is not StageType.PRETRAIN:
        extra["model"] = model
    if case.type in (StageType.DPO, StageType.PPO):
        extra["reference"] = model
    if case.type is StageType.PPO:
        extra["reward"] = scorer
    return stages.stage(
        prepared, stage=case.name, type=case.type, folder=f"pvc://models/{case.name}", threads=2,
        recipe={"global_batch_size": case.micro, "micro_batch_size": case.micro, **case.recipe}, **extra,
    )  # fmt: skip


def predict(config: TrainConfig, prepared: Path) -> int:
    """Bytes, as prepare would say."""
    plan = PreparedData(prepared)
    answers = config.ppo.rollout.max_new_tokens if config.ppo else 0
    row = max(len(plan.row(0, i).input_ids) for i in range(plan.rows(0))) + answers
    stage = PrepareStage(
        name=config.stage, type=config.type, data=[], recipe=config.recipe, lora=config.lora,
        precision=config.precision, zero_stage=config.zero_stage, ppo=config.ppo,
    )  # fmt: skip
    checkpointing = config.recipe.gradient_checkpointing
    counted = count_activations(MODEL, config.precision, row, checkpointing=checkpointing)
    return process_memory(stage, model_shape(MODEL), counted, row).peak


def measure(config: TrainConfig, root: Path) -> dict[str, int]:
    """Bytes of each phase above the size after imports, in a process of its own."""
    file, result = root / "stage.json", root / "result.json"
    file.write_text(dump(config))
    (root / "volume" / config.stage).mkdir()
    environment = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "2", "DS_ACCELERATOR": "cpu", "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "HF_HUB_OFFLINE": "1",
        "TRIMTAB_VOLUMES": json.dumps({"models": str(root / "volume")}),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "bench.memory.worker", str(file), str(result)],
        env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    peaks: dict[str, int] = json.loads(result.read_bytes())["peaks"]
    return peaks


def run(names: list[str]) -> Iterator[str]:
    """Lines of the table."""
    yield "| stage | estimated MiB | measured MiB | ratio | largest phase |"
    yield "| --- | ---: | ---: | ---: | --- |"
    with tempfile.TemporaryDirectory(prefix="trimtab-memory-") as folder:
        root = Path(folder)
        model = write_start(root, "start", AutoModelForCausalLM, "model")
        scorer = write_start(root, "scorer", AutoModelForSequenceClassification, "reward")
        for case in (case for name in names for case in CASES if case.name == name):
            config = configure(case, root, model, scorer)
            estimated = predict(config, root / "volume" / config.prepared.uri.removeprefix("pvc://models/"))
            peaks = measure(config, root)
            phase = max(peaks, key=lambda name: peaks[name])
            ratio = estimated / peaks[phase]
            yield f"| {case.name} | {estimated // MIB} | {peaks[phase] // MIB} | {ratio:.2f} | {phase} |"


def main() -> None:
    """Print the table."""
    known = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="bench.memory", description=__doc__)
    parser.add_argument("cases", nargs="*", default=known, help=f"of: {', '.join(known)}")
    for line in run(parser.parse_args().cases):
        print(line, flush=True)


if __name__ == "__main__":
    main()
