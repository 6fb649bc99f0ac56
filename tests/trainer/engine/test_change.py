"""The model card's account of what changed in the weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trimtab_trainer.engine import change

START = {
    "model.embed_tokens.weight": torch.full((4, 2), 1.0),
    "model.layers.0.self_attn.q_proj.weight": torch.full((2, 2), 2.0),
    "model.layers.1.self_attn.q_proj.weight": torch.full((2, 2), 1.0),
    "model.layers.0.mlp.bias": torch.zeros(2),
    "model.layers.1.mlp.bias": torch.zeros(2),
}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """In two files, as large models come."""
    names = list(START)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: START[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    return tmp_path


def test_the_distance_is_relative_and_taken_over_a_kind_as_one_matrix(start: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in START.items()}
    weights["model.layers.0.self_attn.q_proj.weight"] += 0.1
    weights["model.layers.1.self_attn.q_proj.weight"] += 0.3
    weights["model.layers.1.mlp.bias"] += 1
    weights["score.weight"] = torch.ones(1, 2)
    found = change.measure(weights, start, "model")
    assert found.new == ["score.weight"]
    assert found.layers == [0, 1]
    query = found.norms["self_attn.q_proj"]
    assert [query[layer].distance for layer in (0, 1)] == [pytest.approx(0.05), pytest.approx(0.3)]
    whole = change.total(query.values()).distance
    assert whole == pytest.approx(math.hypot(0.2, 0.6) / math.hypot(4, 2)), "not the mean of both"
    assert found.norms["model.embed_tokens"][change.OUTSIDE].distance == 0
    assert [found.norms["mlp.bias"][layer].distance for layer in (0, 1)] == [0, None], "zeros that moved have none"
    text = change.section(found, "plot.png")
    assert "| `self_attn.q_proj` | 0.14 | 0.05 | 0.3 |" in text
    assert "| `mlp.bias` | from 0 | 0 | from 0 |" in text
    assert "`score.weight`" in text


def test_what_the_stage_s_dtype_rounds_away_is_no_change(tmp_path: Path) -> None:
    fine = {"model.layers.0.w.weight": torch.tensor([[1.0, 1.001]])}
    save_file(fine, tmp_path / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in fine.items()}
    assert change.measure(rounded, tmp_path, "model").norms["w"][0].distance == 0


def test_files_may_leave_out_the_backbone_s_prefix(tmp_path: Path) -> None:
    save_file({"h.0.attn.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    found = change.measure({"transformer.h.0.attn.weight": torch.full((2, 2), 1.5)}, tmp_path, "transformer")
    assert found.norms["attn"][0].distance == pytest.approx(0.5)


def test_many_layers_are_summed_up_in_the_table_and_all_in_the_plot(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.w.weight" for layer in range(11)]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    moved = {name: torch.ones(2, 2) * (1 + layer / 100) for layer, name in enumerate(names)}
    found = change.measure(moved, tmp_path, "model")
    assert "| `w` | 0.059 | 0 | 0.05 | 0.1 | 10 |" in change.section(found, "plot.png")
    assert "![" in change.section(found, "plot.png")
    change.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
