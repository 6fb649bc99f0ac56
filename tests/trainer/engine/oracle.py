"""An independent trainer in plain torch: one process, no packing, no padding, no DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from trimtab_trainer.data.store import VALIDATION, PreparedData, Row


@dataclass
class Oracle:
    """What the reference run gave."""

    weights: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    validation: float


Losses = Callable[[Any, Row], torch.Tensor]
"""The losses of a row's units (tokens, pairs), [U], for a model."""


def random_model(prepared: PreparedData, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    keys = {k: v for k, v in prepared.model_config.items() if k != "model_type"}
    return LlamaForCausalLM(LlamaConfig(**keys, attn_implementation="eager"))


def train(
    prepared: PreparedData,
    recipe: dict,
    optimizer_name: str,
    losses_of: Losses | None = None,
    model: nn.Module | None = None,
) -> Oracle:
    losses_of = losses_of or token_losses
    model = model or random_model(prepared, recipe["seed"])
    learning = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learning if p.ndim > 1]
    vectors = [p for p in learning if p.ndim == 1]
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
            loss = torch.cat([losses_of(model, row) for row in rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(learning, recipe["clip_norm"])))
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        held_out = [prepared.row(VALIDATION, i) for i in range(prepared.rows(VALIDATION))]
        validation = float(torch.cat([losses_of(model, row) for row in held_out]).mean())
    return Oracle({n: p.detach() for n, p in model.named_parameters()}, losses, norms, validation)


class LowRank(nn.Module):
    """W + s B A, as a parametrisation of W."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B, self.scaling = nn.Parameter(a), nn.Parameter(b), scaling

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scaling * self.lora_B @ self.lora_A


def adapted_model(
    prepared: PreparedData, seed: int, start: dict[str, torch.Tensor], scaling: float
) -> LlamaForCausalLM:
    """`start`: the A and B that training begins with, by peft's names."""
    model = random_model(prepared, seed).requires_grad_(False)
    for name, a in start.items():
        if ".lora_A." in name:
            module = model.get_submodule(name.split(".lora_A.")[0])
            low_rank = LowRank(a.clone(), start[name.replace("lora_A", "lora_B")].clone(), scaling)
            parametrize.register_parametrization(module, "weight", low_rank)
    return model


def token_losses(model: LlamaForCausalLM, row: Row) -> torch.Tensor:
    """Of each loss-bearing token."""
    return -torch.cat(segment_log_probs(model, row))


def pair_losses(reference: LlamaForCausalLM, beta: float, model: LlamaForCausalLM, row: Row) -> torch.Tensor:
    """DPO's loss of each pair, as the paper writes it."""
    with torch.no_grad():
        held = [tokens.sum() for tokens in segment_log_probs(reference, row)]
    moved = [tokens.sum() - other for tokens, other in zip(segment_log_probs(model, row), held, strict=True)]
    margins = torch.stack([chosen - rejected for chosen, rejected in zip(moved[::2], moved[1::2], strict=True)])
    return torch.log1p(torch.exp(-beta * margins))


def dpo(prepared: PreparedData, reference_seed: int, beta: float) -> Losses:
    return partial(pair_losses, random_model(prepared, reference_seed), beta)


def scoring_model(prepared: PreparedData, seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    keys = {k: v for k, v in prepared.model_config.items() if k != "model_type"}
    return LlamaForSequenceClassification(LlamaConfig(**keys, num_labels=1, attn_implementation="eager"))


def ranking_losses(model: LlamaForSequenceClassification, row: Row) -> torch.Tensor:
    """Of each prompt, the mean over its untied pairs; each answer goes through transformers' own pooling alone."""
    scores = []
    start = 0
    for length in row.segment_lengths:
        ids = torch.from_numpy(row.input_ids[start : start + length]).long()
        scores.append(model(input_ids=ids[None]).logits[0, 0])
        start += length
    losses, first = [], 0
    while first < len(scores):
        last = first + 1
        while last < len(scores) and row.labels["position"][last]:
            last += 1
        margin, p = float(row.labels["margin"][first]), float(row.labels["probability"][first])
        pairs = [
            p * torch.log1p(torch.exp(scores[j] - scores[i] + margin))
            + (1 - p) * torch.log1p(torch.exp(scores[i] - scores[j] - margin))
            for i in range(first, last)
            for j in range(i + 1, last)
            if row.labels["rank"][i] != row.labels["rank"][j]
        ]
        losses.append(torch.stack(pairs).mean())
        first = last
    return torch.stack(losses)


def segment_log_probs(model: LlamaForCausalLM, row: Row) -> list[torch.Tensor]:
    """log p of each segment's loss-bearing tokens; each segment goes through the model alone."""
    found = []
    start = 0
    for length in row.segment_lengths:
        ids = torch.from_numpy(row.input_ids[start : start + length]).long()
        mask = torch.from_numpy(row.loss_mask[start : start + length])[1:]
        logits = model(input_ids=ids[None]).logits[0]
        found.append(-cross_entropy(logits[:-1][mask], ids[1:][mask], reduction="none"))
        start += length
    return found
