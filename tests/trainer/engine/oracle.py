"""An independent trainer in plain torch: one process, no packing, no padding, no DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab_trainer.data.store import PreparedData, Row


@dataclass
class Oracle:
    """What the reference run gave."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    validation: float


def train(prepared: PreparedData, recipe: dict, optimizer_name: str) -> Oracle:
    torch.manual_seed(recipe["seed"])
    keys = {k: v for k, v in prepared.model_config.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**keys, attn_implementation="eager"))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    if optimizer_name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe["learning_rate"])
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe["learning_rate"], betas=(0.9, 0.95), eps=1e-6)
    losses, norms = [], []
    batch = recipe["global_batch_size"]
    for epoch in range(recipe["epochs"]):
        for start in range(0, prepared.rows(epoch), batch):
            if len(losses) == prepared.info.total_steps:
                break
            rows = [prepared.row(epoch, i) for i in range(start, min(start + batch, prepared.rows(epoch)))]
            loss = sum(row_loss(model, row) for row in rows) / sum(int(row.loss_mask.sum()) for row in rows)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"])))
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        held_out = [prepared.validation_row(i) for i in range(prepared.validation_rows())]
        validation = sum(float(row_loss(model, row)) for row in held_out) / sum(
            int(r.loss_mask.sum()) for r in held_out
        )
    return Oracle({n: p.detach() for n, p in model.named_parameters()}, losses, norms, validation)


def row_loss(model: LlamaForCausalLM, row: Row) -> torch.Tensor:
    """Sum over the row's loss-bearing tokens; each segment goes through the model alone."""
    total = torch.zeros(())
    start = 0
    for length in row.segment_lengths:
        ids = torch.from_numpy(row.input_ids[start : start + length]).long()
        mask = torch.from_numpy(row.loss_mask[start : start + length])[1:]
        logits = model(input_ids=ids[None]).logits[0]
        total = total + cross_entropy(logits[:-1][mask], ids[1:][mask], reduction="sum")
        start += length
    return total
