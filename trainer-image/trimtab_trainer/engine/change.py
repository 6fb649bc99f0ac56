"""What a stage changed in its weights: the relative distance from the starting ones, by layer and kind of matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

_LAYERS_IN_TABLE = 6
"""More layers than this are summed up in the table; the plot has them all."""
_LAYERS_IN_NUMBERS = 12
"""More layers than this, and the plot's cells are too small for their numbers."""
_LIGHT = 0.6
"""Of the colour scale: from here on, dark numbers are read better."""
OUTSIDE = -1


@dataclass
class Norms:
    """Frobenius norms of some tensors taken together, as if they were one."""

    moved: float = 0.0
    """Of W - W0."""
    start: float = 0.0
    """Of W0."""

    def add(self, moved: float, start: float) -> None:
        """Take one more tensor in."""
        self.moved, self.start = math.hypot(self.moved, moved), math.hypot(self.start, start)

    @property
    def distance(self) -> float | None:
        """||W - W0|| / ||W0||, 0 where nothing moved; None where tensors of zeros did."""
        if self.moved == 0:
            return 0.0
        return self.moved / self.start if self.start else None


@dataclass
class Change:
    """How far the weights went. A tensor counts with its layer and its kind, such as 3 and `self_attn.q_proj`."""

    norms: dict[str, dict[int, Norms]] = field(default_factory=dict)
    """By kind, then by layer; `OUTSIDE` for what is in no layer. In the order of the model."""
    matrices: set[str] = field(default_factory=set)
    """Kinds of two dimensions and more; the others are norms and biases."""
    new: list[str] = field(default_factory=list)
    """Tensors without a counterpart in the starting weights."""

    @property
    def layered(self) -> list[str]:
        """Kinds that are in layers."""
        return [kind for kind, layers in self.norms.items() if OUTSIDE not in layers]

    @property
    def drawn(self) -> list[str]:
        """Matrices that are in layers."""
        return [kind for kind in self.layered if kind in self.matrices]

    @property
    def layers(self) -> list[int]:
        """All layers, ascending."""
        return sorted({layer for kind in self.layered for layer in self.norms[kind]})


def total(parts: Iterable[Norms]) -> Norms:
    """Of all of them together."""
    whole = Norms()
    for part in parts:
        whole.add(part.moved, part.start)
    return whole


def measure(weights: Mapping[str, torch.Tensor], start: Path, prefix: str) -> Change:
    """Compare weights with those of a model's folder, one tensor at a time.

    Args:
        weights: by name, on the CPU; the starting ones are rounded to their dtype first, as the stage did.
        start: folder of the starting weights, safetensors.
        prefix: of the backbone's names in the model (`model`, `transformer`), which some files leave out.
    """
    change = Change()
    files = {}
    for file in sorted(start.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    for name, tensor in weights.items():
        stored = next((each for each in (name, name.removeprefix(f"{prefix}.")) if each in files), None)
        if stored is None:
            change.new.append(name)
            continue
        with safe_open(files[stored], "pt") as opened:
            before = opened.get_tensor(stored).to(tensor.dtype).float()
        layer, kind = place_of(name)
        norms = change.norms.setdefault(kind, {}).setdefault(layer, Norms())
        if tensor.ndim >= 2:
            change.matrices.add(kind)
        norms.add(_norm(tensor.float() - before), _norm(before))
    return change


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def place_of(name: str) -> tuple[int, str]:
    """The layer of a tensor, or `OUTSIDE`, and its kind. The experts of a layer are one kind.

    >>> place_of("model.layers.3.self_attn.q_proj.weight"), place_of("lm_head.weight")
    ((3, 'self_attn.q_proj'), (-1, 'lm_head'))
    >>> place_of("model.layers.0.mlp.experts.7.up_proj.weight"), place_of("transformer.h.2.attn.c_attn.bias")
    ((0, 'mlp.experts.*.up_proj'), (2, 'attn.c_attn.bias'))
    """
    parts = name.removesuffix(".weight").split(".")
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return OUTSIDE, ".".join(parts)
    return int(parts[layer]), ".".join("*" if part.isdigit() else part for part in parts[layer + 1 :])


def section(change: Change, plot: str) -> str:
    """The card's section; `plot` is the name of the file that `draw` wrote."""
    lines = [
        "",
        "## What changed in the weights",
        "",
        "Relative distance from the starting weights, ‖W − W₀‖ / ‖W₀‖ (Frobenius norms), by kind of matrix and layer. "
        "0 is unchanged.",
        "",
        *_table(change),
    ]
    if change.drawn:
        lines += ["", f"![Relative distance from the starting weights]({plot})"]
    if change.new:
        lines += ["", f"New in this stage, so without a distance: {', '.join(f'`{name}`' for name in change.new)}."]
    return "\n".join([*lines, ""])


def _table(change: Change) -> list[str]:
    layers = change.layers
    in_full = len(layers) <= _LAYERS_IN_TABLE
    columns = [f"layer {layer}" for layer in layers] if in_full else ["smallest", "median", "largest", "at layer"]
    rows = [["kind", "all layers", *columns], ["---"] * (2 + len(columns))]
    for kind, norms in change.norms.items():
        row = [f"`{kind}`", _shown(total(norms.values()).distance)]
        if kind not in change.layered:
            row += ["" for _ in columns]
        elif in_full:
            row += [_shown(norms[layer].distance) if layer in norms else "" for layer in layers]
        else:
            row += _summary({layer: each.distance for layer, each in norms.items()})
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def _summary(distances: Mapping[int, float | None]) -> list[str]:
    """The smallest, the median and the largest, and where that is."""
    known = {layer: distance for layer, distance in distances.items() if distance is not None}
    if not known:
        return [_shown(None)] * 3 + [""]
    farthest = max(known, key=known.__getitem__)
    values = (min(known.values()), median(known.values()), known[farthest])
    return [*map(_shown, values), str(farthest) if known[farthest] else ""]


def _shown(distance: float | None) -> str:
    """Two digits; a tensor of zeros that moved has no distance.

    >>> _shown(0.01234), _shown(0.00012), _shown(0.0), _shown(None)
    ('0.012', '1.2e-4', '0', 'from 0')
    """
    if distance is None:
        return "from 0"
    if 0 < distance < 1e-3:
        return f"{distance:.1e}".replace("e-0", "e-")
    return f"{distance:.2g}"


def draw(change: Change, file: Path) -> None:
    """A heat map of the matrices, kinds by layers, on a logarithmic scale; what did not move is grey.

    Norms and biases are in the table only: they move far less, and would take up the scale. Nothing without layers.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    kinds, layers = change.drawn, change.layers
    if not kinds:
        return
    nowhere = Norms()
    cells = [[change.norms[kind].get(layer, nowhere).distance or math.nan for layer in layers] for kind in kinds]
    moved = [value for row in cells for value in row if value > 0] or [1.0]
    low, high = min(moved) / 1.02, max(moved) * 1.02
    in_numbers = len(layers) <= _LAYERS_IN_NUMBERS
    width = min(13.0, 3.2 + max(3.5, len(layers) * (0.62 if in_numbers else 0.26)))
    figure = Figure(figsize=(width, 1.4 + 0.34 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = colormaps["viridis"].with_extremes(bad="0.88")
    scale = LogNorm(low, high)
    image = axes.imshow(cells, colours, scale, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    step = -(-len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set_xlabel("layer", fontsize=9)
    axes.set_title("Relative distance from the starting weights, ‖W − W₀‖ / ‖W₀‖", fontsize=10)
    axes.set_xticks([i + 0.5 for i in range(len(layers) - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(kinds) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    ticks = [low * (high / low) ** (i / 4) for i in range(5)]
    bar = figure.colorbar(image, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.set_ticks(ticks, labels=[_shown(tick) for tick in ticks], fontsize=8)
    if in_numbers:
        _write_numbers(axes, change, scale)
    figure.savefig(file, dpi=130, metadata={"Software": None})


def _write_numbers(axes: Any, change: Change, scale: Any) -> None:
    """The distance in each cell, dark on the light ones."""
    for row, kind in enumerate(change.drawn):
        for column, layer in enumerate(change.layers):
            if layer in change.norms[kind]:
                distance = change.norms[kind][layer].distance
                colour = "black" if not distance or scale(distance) > _LIGHT else "white"
                axes.text(column, row, _shown(distance), ha="center", va="center", fontsize=7, color=colour)
