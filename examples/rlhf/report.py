"""Figures with their standard errors and bounds: as tables, as JSON, and reward drawn against KL."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (0: not estimated)."""

    value: float
    error: float = 0.0

    @classmethod
    def of(cls, values: torch.Tensor) -> Estimate:
        """Of independent values [N]."""
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(values.mean().item(), error)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" ± {self.error:.3f}" if self.error else "")


@dataclass(frozen=True)
class Figure:
    """A measured figure, and whether it meets its bound, where it has one."""

    name: str
    estimate: Estimate
    bound: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class PolicyFigures:
    """Of one policy's answers to held-out questions.

    Attributes:
        gold: gold reward of an answer.
        kl: nats a sequence, to the model after `sft`.
        score: the reward model's, the missing end punished as in `ppo`; None without a reward model.
        answer_loss: of held-out demonstrations, nats a token.
        ended: share of answers that end by themselves.
        words: in an answer, on average.
        example: the first answer.
    """

    gold: Estimate
    kl: Estimate
    score: Estimate | None
    answer_loss: float
    ended: float
    words: float
    example: str


@dataclass(frozen=True)
class Report:
    """Everything that was measured; `curves` holds the steps of the PPO runs."""

    policies: dict[str, PolicyFigures]
    figures: list[Figure]
    curves: dict[str, list[dict[str, float]]]

    @property
    def missed(self) -> list[Figure]:
        """Figures that miss their bound."""
        return [figure for figure in self.figures if figure.met is False]

    def to_json(self) -> str:
        """All but the curves, which are in `metrics.jsonl`."""
        kept: dict[str, Any] = asdict(self)
        del kept["curves"]
        return json.dumps(kept, indent=2, ensure_ascii=False) + "\n"


def show(report: Report) -> None:
    """Print the tables."""
    console = Console(width=120)
    policies = Table(title="Answers to held-out questions")
    for column in ("", "gold reward", "KL to sft", "reward model", "answer loss", "ended", "words", "an answer"):
        policies.add_column(column, overflow="fold")
    for name, row in report.policies.items():
        values = (str(row.gold), str(row.kl), str(row.score or "–"), f"{row.answer_loss:.3f}", f"{row.ended:.0%}")
        policies.add_row(name, *values, f"{row.words:.1f}", row.example)
    console.print(policies)
    figures = Table(title="Figures and their bounds")
    for column in ("figure", "measured", "bound", "met"):
        figures.add_column(column)
    marks = {True: "yes", False: "[red]NO[/red]", None: ""}
    for figure in report.figures:
        figures.add_row(figure.name, str(figure.estimate), figure.bound, marks[figure.met])
    console.print(figures)


def draw(report: Report, file: Path) -> None:
    """Reward against KL: the reward model's, which `ppo` follows, and the gold reward, which it never sees."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(canvas)
    left, right = canvas.subplots(1, 2)
    for number, (name, row) in enumerate(report.policies.items()):
        colour = f"C{number}"
        if steps := report.curves.get(name):
            points = ([step[key] for step in steps] for key in ("klSequence", "score"))
            left.plot(*points, ".-", color=colour, linewidth=0.8, label=f"{name}, steps")
        for axes, reward in ((left, row.score), (right, row.gold)):
            if reward:
                bars = {"xerr": 2 * row.kl.error, "yerr": 2 * reward.error}
                axes.errorbar(row.kl.value, reward.value, **bars, fmt="o", color=colour, capsize=3, label=name)
    for axes, what in ((left, "reward model's score"), (right, "gold reward")):
        axes.set(xlabel="KL to sft (nats a sequence)", ylabel=what)
        if axes.has_data():
            axes.legend(fontsize="small")
    canvas.savefig(file, dpi=120, metadata={"Software": None})
