"""`python -m bench.trainer.ours WORKLOAD STEPS`: Trimtab's side of a benchmark, in turns.

Workloads: `sft`; `dpo`, and `dpo-padded` with one answer a row and pairs of like length side by side; `rankings`, and
`pairs` with each ranking of four expanded to its six pairs.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from bench.trainer import data
from bench.trainer.turns import Turns
from tests.trainer.engine.stages import stage
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from trimtab_trainer.config import Artifact, StageType
from trimtab_trainer.data.pack import ranking_rows, record_rows, shuffle_rows
from trimtab_trainer.data.store import (
    NO_LABEL,
    Label,
    PreparedData,
    PreparedInfo,
    RowPlan,
    TokenStore,
    TokenWriter,
    epoch_name,
    write_info,
    write_plan,
)
from trimtab_trainer.engine.batches import plan_steps
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.loop import Loop
from trimtab_trainer.engine.model import frozen
from trimtab_trainer.engine.networks import LanguageModel, Scorer
from trimtab_trainer.engine.objectives import NextToken, Objective, Pairwise, Ranked
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.settings import Loss, Preference
from trimtab_trainer.supervisor.processes import keep_freed_memory

TYPES = {
    "sft": (StageType.SFT, 1),
    "dpo": (StageType.DPO, 2),
    "dpo-padded": (StageType.DPO, 2),
    "rankings": (StageType.REWARD, 4),
    "pairs": (StageType.REWARD, 4),
}
ROWS = {"sft": 1, "dpo": 2, "dpo-padded": 2 * data.PADDED, "rankings": 1, "pairs": 2}
"""Of a step: about 1,000 tokens in `sft`, eight pairs in `dpo`, and about 2,000 tokens in the others."""
UNUSED = Artifact(uri="pvc://models/unused", digest="sha256:" + "0" * 64)


def answers_of(workload: str, text: data.Text) -> Iterator[list[list[int]]]:
    """What is compared with each other."""
    return itertools.combinations(text.answers, 2) if workload == "pairs" else iter([text.answers])


def prepare(folder: Path, workload: str, texts: list[data.Text]) -> PreparedData:
    """As `prepare` writes it, of tokens instead of records."""
    stage_type, _ = TYPES[workload]
    firsts, counts = [], []
    with TokenWriter(folder, data.VOCABULARY) as writer:
        file = writer.add_file("random")
        for line, text in enumerate(texts, start=1):
            for answers in answers_of(workload, text):
                labels = [Label(i, i) for i in range(len(answers))] if len(answers) > 1 else [NO_LABEL]
                for answer, label in zip(answers, labels, strict=True):
                    ids = np.array(text.prompt + answer, dtype=np.int32)
                    record = writer.append(ids, np.arange(len(ids)) >= len(text.prompt), file, line, label)
                    if label is labels[0]:
                        firsts.append(record)
                        counts.append(len(answers))
    store = TokenStore(folder, writer.dtype)
    plan = plan_of(workload, np.array(firsts, dtype=np.int64), np.array(counts, dtype=np.int64), store)
    write_plan(folder, epoch_name(0), plan, store)
    write_info(folder, info_of(stage_type, len(plan), writer.dtype, int(store.offsets[-1])))
    return PreparedData(folder)


def plan_of(workload: str, firsts: np.ndarray, counts: np.ndarray, store: TokenStore) -> RowPlan:
    """Packed as `prepare` does it, or padded."""
    lengths = store.lengths()
    generator = np.random.default_rng(3)
    if workload == "dpo-padded":
        return grouped_by_length(firsts, lengths, generator)
    if counts[0] == 1:
        plan = record_rows(firsts, lengths[firsts], data.ROW, packing=True)
    else:
        plan = ranking_rows(firsts, counts, lengths, data.MAX_LENGTH, packing=True)
    return shuffle_rows(plan, generator, keep_last=False)


def grouped_by_length(firsts: np.ndarray, lengths: np.ndarray, generator: np.random.Generator) -> RowPlan:
    """One answer a row; of 50 random batches at a time the pairs are sorted by length, as transformers does it."""
    total = lengths[firsts] + lengths[firsts + 1]
    order = generator.permutation(len(firsts))
    size = 50 * data.PADDED
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    ordered = np.concatenate([group[np.argsort(-total[group], kind="stable")] for group in groups])
    batches = ordered[: len(ordered) // data.PADDED * data.PADDED].reshape(-1, data.PADDED)
    pairs = firsts[generator.permutation(batches).flatten()]
    texts = np.stack([pairs, pairs + 1], axis=1).flatten()
    segments = np.stack([texts, np.zeros_like(texts), lengths[texts]], axis=1)
    return RowPlan(segments, np.arange(len(texts) + 1, dtype=np.int64))


def info_of(stage_type: StageType, rows: int, dtype: str, tokens: int) -> PreparedInfo:
    """What `info.json` tells."""
    return PreparedInfo(
        type=stage_type,
        loss=Loss.COMPLETION,
        max_length=data.MAX_LENGTH,
        packing=True,
        seed=0,
        records=rows,
        dropped=0,
        truncated=0,
        tokens=tokens,
        validation_records=0,
        held_out_tasks={},
        global_batch_size=1,
        epochs=1,
        epoch_rows=[rows],
        total_steps=1_000_000,
        vocabulary_size=data.VOCABULARY,
        token_dtype=dtype,
        tokenizer_digest=UNUSED.digest,
        document_separator_id=0,
        end_of_turn_id=data.END,
        padding_id=data.PADDING,
    )


def model_of(kind: type) -> torch.nn.Module:
    """With random weights, the same ones each time."""
    torch.manual_seed(0)
    return kind.from_config(AutoConfig.for_model(**data.MODEL, num_labels=1), attn_implementation="sdpa")


def objective_of(workload: str) -> Objective:
    """As the stage's type has it."""
    if workload == "sft":
        return NextToken()
    if TYPES[workload][0] is StageType.REWARD:
        return Ranked()
    return Pairwise(frozen(LanguageModel(model_of(AutoModelForCausalLM)), torch.device("cpu")), Preference())


def alone() -> Group:
    """A group of this process, set up as the trainer's own processes are."""
    keep_freed_memory()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return Group()


def main() -> None:
    """Train until told to stop."""
    workload, steps = sys.argv[1], int(sys.argv[2])
    turns = Turns(steps)
    group = alone()
    stage_type, answers = TYPES[workload]
    rows = ROWS[workload]
    recipe = {"learning_rate": data.LEARNING_RATE, "global_batch_size": rows, "micro_batch_size": rows}
    config = stage(UNUSED, recipe={**recipe, "schedule": "constant", "warmup_ratio": 0.0})
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(Path(folder), workload, data.texts(4000 // answers, answers))
        if stage_type is StageType.REWARD:
            network = Scorer(model_of(AutoModelForSequenceClassification))
        else:
            network = LanguageModel(model_of(AutoModelForCausalLM))
        loop = Loop(Engine(network, config), group, prepared, config, objective_of(workload), lambda: False)
        turns.wait()
        while True:
            for step in plan_steps(prepared.info.epoch_rows, rows, 1_000_000):
                result = loop.step(step)
                turns.step_done(result.tokens, sets_of(workload, prepared, step.start, step.stop))


def sets_of(workload: str, prepared: PreparedData, start: int, stop: int) -> float:
    """Texts, pairs, or rankings of four, in rows [start, stop)."""
    if workload == "sft":
        return sum(len(prepared.row(0, i).segment_lengths) for i in range(start, stop))
    return prepared.rankings(0, start, stop) / (6 if workload == "pairs" else 1)


if __name__ == "__main__":
    main()
