"""Run by torchrun: five steps of the real loop for each cell of the matrix; each cell's weights go to a file.

Arguments: the prepared folders of text, of pairs and of rankings, one that launches share, one of this launch's.
Cell names: zero-micro-optimizer-precision, after `dpo-` for pairs, `reward-` for rankings and `lora-` for adapters;
`naive` and `dpo-naive` weigh their losses wrongly.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from tests.trainer.engine.stages import VOCABULARY, stage
from transformers import AutoConfig, AutoModelForSequenceClassification

from trimtab_trainer import chunks
from trimtab_trainer.config import Artifact, StageType, TrainConfig
from trimtab_trainer.data.store import VALIDATION, PreparedData
from trimtab_trainer.engine import loop, setup
from trimtab_trainer.engine.batches import MicroBatch, collate, plan_steps
from trimtab_trainer.engine.build import build_objective
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.networks import Scorer
from trimtab_trainer.engine.objectives import NextToken, Objective, Pairwise, Sums
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.settings import Lora, Preference

REFERENCE_SEED, BETA = 8, 0.5
LORA, LORA_LEARNING_RATE = Lora(rank=4), 1e-2
UNUSED = Artifact(uri="pvc://models/unused", digest="sha256:" + "0" * 64)
RECIPE = {
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "global_batch_size": 4,
    "epochs": 2,
    "seed": 7,
}


def cell_name(zero: int, micro: int, optimizer: str, precision: str) -> str:
    return f"{zero}-{micro}-{optimizer}-{precision}"


def cells() -> list[tuple[int, int, str, str]]:
    exact = itertools.product((0, 1, 2, 3), (1, 4), ("sgd", "adamw"), ("fp32",))
    rounded = itertools.product((0, 1, 2, 3), (1,), ("adamw",), ("bf16",))
    return [*exact, *rounded]


def tied_cells() -> list[tuple[int, int, str, str]]:
    return list(itertools.product((0, 3), (1,), ("sgd",), ("fp32",)))


def dpo_cells() -> list[tuple[int, int, str, str]]:
    return list(itertools.product((0, 3), (1, 4), ("sgd", "adamw"), ("fp32",)))


def reward_cells() -> list[tuple[int, int, str, str]]:
    return [*itertools.product((0, 3), (1, 4), ("sgd",), ("fp32",)), (2, 4, "adamw", "fp32")]


def lora_cells() -> list[tuple[int, int, str, str]]:
    return [*itertools.product((0, 1, 2, 3), (4,), ("adamw",), ("fp32",)), (0, 1, "sgd", "fp32"), (3, 1, "sgd", "fp32")]


def lora_dpo_cells() -> list[tuple[int, int, str, str]]:
    return list(itertools.product((0, 2, 3), (1,), ("adamw",), ("fp32",)))


class MeanOfMicroBatch(NextToken):
    """The plausible mistake: each micro-batch counts the same, whatever its number of tokens."""

    def sums(self, outputs: torch.Tensor, batch: MicroBatch) -> Sums:
        return Sums(super().sums(outputs, batch).loss * 6.0 / max(1, outputs.shape[1]))


class PerToken(Pairwise):
    """The plausible mistake: log-probabilities are averaged over the answer's tokens."""

    def _log_probs(self, outputs: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        return super()._log_probs(outputs, batch) / torch.tensor(batch.loss_tokens)


def pairwise(config: TrainConfig, prepared: PreparedData, kind: type[Pairwise] = Pairwise) -> Pairwise:
    """Held to other weights than those it starts from, so that no margin is 0."""
    other = config.model_copy(update={"recipe": config.recipe.model_copy(update={"seed": REFERENCE_SEED})})
    reference = load_model(other, prepared, verify=False).eval()
    return kind(reference, Preference(beta=BETA))


def tied(prepared: PreparedData) -> PreparedData:
    """The same for a model whose head is its embedding."""
    opened = PreparedData(prepared.folder)
    opened.model_config["tie_word_embeddings"] = True
    return opened


def scorer(config: TrainConfig, prepared: PreparedData) -> Scorer:
    """With random weights."""
    torch.manual_seed(config.recipe.seed)
    keys = AutoConfig.for_model(**prepared.model_config, num_labels=1)
    return Scorer(AutoModelForSequenceClassification.from_config(keys, attn_implementation="sdpa"))


def run_cell(config: TrainConfig, prepared: PreparedData, group: Group, objective: Objective | None, out: Path) -> None:
    """`objective`: None for the one that a stage takes, held to the weights that it starts from."""
    torch.manual_seed(0)
    network = load_model(config, prepared, verify=False) if config.type is not StageType.REWARD else None
    engine = Engine(network or scorer(config, prepared), config)
    if objective is None:
        start = {"model": UNUSED, "reference": UNUSED}
        objective = build_objective(config.model_copy(update=start), group, engine)
    trainer = loop.Loop(engine, group, prepared, config, objective, lambda: False)
    results = [trainer.step(step) for step in plan_steps(prepared.info.epoch_rows, 4, prepared.info.total_steps)]
    validation = trainer.validate(VALIDATION, lambda: None)
    weights = engine.weights()
    if group.is_first:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out.with_suffix(".safetensors"))
        rows = [{"loss": r.loss, "norm": r.gradient_norm, "tokens": r.tokens, **r.metrics} for r in results]
        out.with_suffix(".json").write_text(json.dumps({"steps": rows, "validation": validation["loss"]}))
    engine.deepspeed.destroy()


def configure(zero: int, micro: int, optimizer: str, precision: str) -> TrainConfig:
    return stage(
        UNUSED,
        zero_stage=zero,
        precision=precision,
        recipe={**RECIPE, "micro_batch_size": micro, "optimizer": optimizer, "epsilon": 1e-6},
    )


def adapted(zero: int, micro: int, optimizer: str, precision: str) -> TrainConfig:
    """With an adapter on the random weights."""
    config = configure(zero, micro, optimizer, precision)
    recipe = config.recipe.model_copy(update={"learning_rate": LORA_LEARNING_RATE})
    return config.model_copy(update={"lora": LORA, "recipe": recipe})


def accumulated(zero: int, kept_in: str | None, prepared: PreparedData) -> float:
    """Relative error of a bf16 gradient that is the sum of 32 micro-batches, from that sum in fp64.

    `kept_in`: the dtype that DeepSpeed adds them up in, if not that of a stage.
    """
    config = configure(zero, 1, "sgd", "bf16")
    plain = {"weight_decay": 0.0, "clip_norm": 0.0}
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update=plain)})
    batches = [collate([prepared.row(0, i % prepared.rows(0))], prepared.info.padding_id) for i in range(32)]
    network = load_model(config, prepared, verify=False)
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in network.parameters()]
    for batch in batches:
        NextToken().sums(network(batch), batch).loss.backward()
        for total, parameter in zip(exact, network.parameters(), strict=True):
            total += parameter.grad.double()
            parameter.grad = None
    with pytest.MonkeyPatch.context() as patch:
        if kept_in is not None:
            settings = setup.engine_config(config) | {"data_types": {"grad_accum_dtype": kept_in}}
            patch.setattr(setup, "engine_config", lambda _: settings)
        engine = Engine(load_model(config, prepared, verify=False), config)
    before = [safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]
    for batch in batches:
        engine.backward(NextToken().sums(engine.outputs(batch), batch).loss)
    engine.step(1.0)
    found = [old - safe_get_full_fp32_param(p) for old, p in zip(before, engine.module.parameters(), strict=True)]
    engine.deepspeed.destroy()
    missed = sum(float((g - e).square().sum()) for g, e in zip(found, exact, strict=True))
    return (missed / sum(float(e.square().sum()) for e in exact)) ** 0.5


def resized_cells() -> list[tuple[int, int, str, str]]:
    return [(zero, 1, "adamw", precision) for zero, precision in ((1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16"))]


def optimizer_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Master weights and both moments, whole, by parameter or, where the shards are stretches, by group; collective."""
    if engine.deepspeed.zero_optimization_stage() == 3:
        whole = {(n, "fp32"): safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
        for key in ("exp_avg", "exp_avg_sq"):
            whole |= {(n, key): safe_get_full_optimizer_state(p, key) for n, p in engine.module.named_parameters()}
        return {f"{name}/{key}": tensor.clone() for (name, key), tensor in whole.items()}
    found = {}
    groups = setup.parameter_groups(engine.module, 0.0)
    for i, (group, shard) in enumerate(zip(groups, engine._optimizer.param_groups, strict=True)):
        (flat,) = shard["params"]
        state = engine._optimizer.state[flat]
        for key, own in (("fp32", flat.detach()), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, own.contiguous())
            found[f"{i}/{key}"] = torch.cat(parts)[: sum(p.numel() for p in group["params"])].clone()
    return found


def resize(cell: tuple[int, int, str, str], prepared: PreparedData, group: Group, shared: Path) -> None:
    """One process trains and saves, two load it; what each holds then, and after one step more, goes to files."""
    config = configure(*cell)
    torch.manual_seed(0)
    engine = Engine(load_model(config, prepared, verify=False), config)
    trainer = loop.Loop(engine, group, prepared, config, NextToken(), lambda: False)
    *steps, last = plan_steps(prepared.info.epoch_rows, 4, 3)
    name = cell_name(*cell)
    if group.size == 1:
        for step in steps:
            trainer.step(step)
        engine.save(str(shared / name), "deepspeed")
    else:
        engine.load_resized(str(shared / name), "deepspeed", shared / name / "scratch", group, lambda: None)
    held = optimizer_state(engine)
    trainer.step(last)
    told = {
        "decay": [each["weight_decay"] for each in engine.deepspeed.optimizer.param_groups],
        "steps": [float(state["step"]) for state in engine._optimizer.state.values()],
    }
    if group.is_first:
        save_file(held, shared / f"{name}-by-{group.size}.safetensors")
        (shared / f"{name}-by-{group.size}.json").write_text(json.dumps(told))
    engine.deepspeed.destroy()


def main() -> None:
    *folders, shared, out = map(Path, sys.argv[1:])
    chunks.CPU_BYTES = 3 * 4 * VOCABULARY  # three tokens a chunk
    gc.freeze()
    group = Group()
    texts, pairs, rankings = (PreparedData.open(folder, None) for folder in folders)
    for cell in cells():
        run_cell(configure(*cell), texts, group, NextToken(), out / cell_name(*cell))
    for cell in tied_cells():
        run_cell(configure(*cell), tied(texts), group, NextToken(), out / f"tied-{cell_name(*cell)}")
        run_cell(adapted(*cell), tied(texts), group, None, out / f"tied-lora-{cell_name(*cell)}")
    for cell in dpo_cells():
        config = configure(*cell)
        run_cell(config, pairs, group, pairwise(config, pairs), out / f"dpo-{cell_name(*cell)}")
    for cell in lora_cells():
        run_cell(adapted(*cell), texts, group, None, out / f"lora-{cell_name(*cell)}")
    for cell in lora_dpo_cells():
        preferred = {"type": StageType.DPO, "preference": Preference(beta=BETA)}
        config = adapted(*cell).model_copy(update=preferred)
        run_cell(config, pairs, group, None, out / f"lora-dpo-{cell_name(*cell)}")
    for cell in reward_cells():
        config = configure(*cell).model_copy(update={"type": StageType.REWARD})
        run_cell(config, rankings, group, None, out / f"reward-{cell_name(*cell)}")
    plain = configure(0, 1, "sgd", "fp32")
    run_cell(plain, pairs, group, pairwise(plain, pairs, PerToken), out / "dpo-naive")
    run_cell(plain, texts, group, MeanOfMicroBatch(), out / "naive")
    for zero in range(4):
        errors = {name: accumulated(zero, kept_in, texts) for name, kept_in in (("own", None), ("bf16", "bf16"))}
        (out / f"accumulated-{zero}.json").write_text(json.dumps(errors))
    for cell in resized_cells():
        resize(cell, texts, group, shared)
    group.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # as the worker: no interpreter shutdown, whose order of destructors may abort a process that has done its work
    os._exit(0)
