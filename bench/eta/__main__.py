"""`python -m bench.eta`: what real stages say at step 20 of the time that they still take, beside what they took."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.trainer.engine import stages

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.ppo_settings import Ppo, Rollout
from trimtab_trainer.progress.heartbeat import Heartbeat, read_heartbeat
from trimtab_trainer.settings import Preference

STEP = 20
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Case:
    """A stage; its pauses: validation every 30 steps, a checkpoint every 25."""

    name: str
    type: StageType
    steps: int = 120
    batch: int = 8
    fields: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("pretrain", StageType.PRETRAIN),
    Case("sft", StageType.SFT),
    Case("dpo", StageType.DPO, fields={"preference": Preference()}),
    Case("reward", StageType.REWARD),
    Case("ppo", StageType.PPO, 60, fields={"ppo": Ppo(rollout=Rollout(max_new_tokens=24), minibatches=2, passes=2)}),
)


def configure(case: Case, root: Path, results: dict[str, str]) -> TrainConfig:
    """The stage of a case, with its prepared data, from the results of the cases before."""
    prepared = stages.write_prepared(
        root, row_counts=[case.steps * case.batch], batch=case.batch, validation=64, stage_type=case.type,
        model_config=MODEL, lengths=(8, 48), seed=len(results),
    )  # fmt: skip
    models = {name: Artifact(uri=f"pvc://models/{name}/model", digest=digest) for name, digest in results.items()}
    extra: dict[str, Any] = dict(case.fields)
    if case.type is not StageType.PRETRAIN:
        extra["model"] = models["pretrain"]
    if case.type in (StageType.DPO, StageType.PPO):
        extra["reference"] = models["pretrain"]
    if case.type is StageType.PPO:
        extra["reward"] = models["reward"]
    return stages.stage(
        prepared, stage=case.name, type=case.type, folder=f"pvc://models/{case.name}", validation_every_steps=30,
        recipe={"global_batch_size": case.batch, "micro_batch_size": 4, "learning_rate": 1e-4},
        checkpoint={"every_steps": 25}, **extra,
    )  # fmt: skip


def follow(run: stages.Run) -> tuple[Heartbeat, float]:
    """The heartbeat after `STEP` steps, and the seconds from it to the end."""
    heard: Heartbeat | None = None
    while run.process.poll() is None:
        for file in (run.root / "tmp").glob("trimtab-*/heartbeat.json"):
            beat = read_heartbeat(file)
            if heard is None and beat is not None and beat.step >= STEP and beat.remaining_seconds is not None:
                heard = beat
        time.sleep(0.002)
    ended = time.monotonic()
    if run.finish() != 0 or heard is None:
        raise SystemExit(run.output)
    return heard, ended - heard.at


def drift(rows: list[dict[str, Any]]) -> float:
    """How much longer the median step took after `STEP` than before: what else the machine did."""
    at = [datetime.fromisoformat(row["time"]).timestamp() for row in rows]
    seconds = [after - before for before, after in pairwise(at)]
    return median(seconds[STEP - 1 :]) / median(seconds[1 : STEP - 1])


def measure(names: list[str]) -> Iterator[str]:
    """Lines of the table."""
    yield "| stage | at step | said, s | took, s | ratio | later step over earlier one | ratio at the earlier speed |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    with tempfile.TemporaryDirectory(prefix="trimtab-eta-") as folder:
        root, results = Path(folder), dict[str, str]()
        for case in CASES:
            if case.name not in (*names, "pretrain") and not (case.name == "reward" and "ppo" in names):
                continue
            run = stages.start(root, configure(case, root, results), stages.container)
            beat, took = follow(run)
            results[case.name] = manifest.manifest_digest(run.folder / "model")
            ratio, slower = (beat.remaining_seconds or 0.0) / took, drift(run.rows())
            cells = [case.name, str(beat.step), f"{beat.remaining_seconds:.1f}", f"{took:.1f}", f"{ratio:.2f}"]
            yield f"| {' | '.join([*cells, f'{slower:.2f}', f'{ratio * slower:.2f}'])} |"


def main() -> None:
    """Print the table."""
    known = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="bench.eta", description=__doc__)
    parser.add_argument("stages", nargs="*", default=known, help=f"of: {', '.join(known)}")
    for line in measure(parser.parse_args().stages):
        print(line, flush=True)


if __name__ == "__main__":
    main()
