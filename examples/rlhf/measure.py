"""Measure the models of the finished job on held-out questions and pairs, and hold the figures against their bounds.

    python examples/rlhf/measure.py WORKDIR [--job FILE] [--prompts 200]

Prints tables, writes `report.json` and `report.png` into WORKDIR. The exit code is 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from gold import gold_reward, preference
from models import Policy, RewardModel, Tensor, Tokens, Turn
from report import Estimate, Figure, PolicyFigures, Report, draw, show

HERE = Path(__file__).parent
EACH = 4
"""Answers to each question."""
LONGEST = 24
"""Tokens of an answer, where the job has no stage that says it."""
POLICIES = ("sft", "ppo", "ppo-free", "dpo")
LEAST_KL_RATIO = 1.15
MOST_LOSS_RISE = 0.3
MOST_BELOW_CEILING = 0.05
LEAST_MARGINS = 0.7
LENGTH_MATCHED = 1
"""Words by which the two answers of a pair may differ."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs; the lists go together."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]

    @property
    def ceiling(self) -> float:
        """Expected accuracy of one who knows the gold reward: the labels are noisy."""
        chances = [preference(*couple) for couple in zip(self.chosen, self.rejected, strict=True)]
        return sum(max(chance, 1 - chance) for chance in chances) / len(chances)

    @property
    def longer_by(self) -> Tensor:
        """Words that the chosen answer has more, [N]."""
        couples = zip(self.chosen, self.rejected, strict=True)
        return torch.tensor([float(len(a.split()) - len(b.split())) for a, b in couples], dtype=torch.float64)

    def turns(self, tokens: Tokens) -> tuple[list[Turn], list[Turn]]:
        """The chosen and the rejected answers."""
        chosen, rejected = (
            [tokens.turn(*each) for each in zip(self.prompts, answers, strict=True)]
            for answers in (self.chosen, self.rejected)
        )
        return chosen, rejected


@dataclass(frozen=True)
class Sampled:
    """What one policy answered; [prompts, EACH]."""

    gold: Tensor
    divergence: Tensor
    score: Tensor | None
    turns: list[Turn]


def read(file: Path) -> list[dict[str, Any]]:
    """Records of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_pairs(file: Path) -> Pairs:
    """Pairs of a file of `make_data.py`."""
    rows = read(file)
    prompts, chosen, rejected = ([row[key] for row in rows] for key in ("prompt", "chosen", "rejected"))
    return Pairs(prompts, chosen, rejected)


def accuracy(differences: Tensor) -> Estimate:
    """Share of differences above zero; a tie counts half."""
    return Estimate.of((differences > 0).double() + 0.5 * (differences == 0))


class Measurement:
    """Everything that is measured of one finished job."""

    def __init__(self, workdir: Path, job: dict[str, Any], prompts: int) -> None:
        self._volume = workdir / "volumes/default/rlhf"
        self._stages = {stage["name"]: stage for stage in job["spec"]["stages"]}
        self._tokens = Tokens(self.folder("sft") / "model")
        self._prompts = [row["prompt"] for row in read(self.data("prompts-heldout"))[:prompts]]
        if len(self._prompts) < prompts:
            raise SystemExit(f"{self.data('prompts-heldout')}: {len(self._prompts)} questions, {prompts} are wanted")
        self._demonstrations = [
            self._tokens.turn(row["prompt"], row["completion"]) for row in read(self.data("demonstrations-heldout"))
        ]
        self._pairs = read_pairs(self.data("pairs-heldout"))
        self._sides = self._pairs.turns(self._tokens)
        self.reward = RewardModel(self.folder("reward") / "model") if "reward" in self._stages else None
        self.policies = {
            name: Policy(self.folder(name) / "model", self._tokens) for name in POLICIES if name in self._stages
        }

    def data(self, name: str) -> Path:
        """A data file."""
        return self._volume / "data" / f"{name}.jsonl"

    def folder(self, stage: str) -> Path:
        """Where the stage's result lies."""
        found = list(self._volume.glob(f"models/rlhf-*/{stage}"))
        if len(found) != 1 or not (found[0] / "model").is_dir():
            raise SystemExit(f"{self._volume}: no single result of stage {stage}; run the job in a new folder")
        return found[0]

    def report(self) -> Report:
        """Sample, score and compare."""
        sampled = {name: self._sample(policy, name) for name, policy in self.policies.items()}
        policies = {name: self._figures(name, found) for name, found in sampled.items()}
        figures: list[Figure] = []
        if "ppo" in sampled:
            figures += self._ppo_figures(sampled, policies)
        if self.reward:
            figures += self._reward_figures(self.reward)
        if "dpo" in self.policies:
            figures += self._dpo_figures()
        curves = {name: self.steps(name) for name in ("ppo", "ppo-free") if name in self._stages}
        return Report(policies, figures, curves)

    def steps(self, stage: str) -> list[dict[str, float]]:
        """What the stage logged of its steps."""
        return [row for row in read(self.folder(stage) / "metrics.jsonl") if "klSequence" in row]

    def _sample(self, policy: Policy, name: str) -> Sampled:
        rollout = self._stages.get("ppo", {}).get("ppo", {}).get("rollout", {})
        turns = policy.sample(self._prompts, EACH, rollout.get("maxNewTokens", LONGEST), seed=7)
        gold = torch.tensor([gold_reward(turn.text, turn.ended) for turn in turns], dtype=torch.float64)
        divergence = policy.divergence(turns, self.policies["sft"]) if name != "sft" else torch.zeros_like(gold)
        score = None
        if self.reward:
            ended = torch.tensor([turn.ended for turn in turns])
            missing_end = torch.tensor(float(rollout.get("missingEndReward", -1)), dtype=torch.float64)
            score = torch.where(ended, self.reward.rewards(turns), missing_end).view(-1, EACH)
        return Sampled(gold.view(-1, EACH), divergence.view(-1, EACH), score, turns)

    def _figures(self, name: str, found: Sampled) -> PolicyFigures:
        turns = found.turns
        return PolicyFigures(
            gold=Estimate.of(found.gold.mean(dim=1)),
            kl=Estimate.of(found.divergence.mean(dim=1)),
            score=None if found.score is None else Estimate.of(found.score.mean(dim=1)),
            answer_loss=self.policies[name].answer_loss(self._demonstrations),
            ended=sum(turn.ended for turn in turns) / len(turns),
            words=sum(len(turn.text.split()) for turn in turns) / len(turns),
            example=turns[0].text,
        )

    def _ppo_figures(self, sampled: dict[str, Sampled], policies: dict[str, PolicyFigures]) -> list[Figure]:
        gain = Estimate.of((sampled["ppo"].gold - sampled["sft"].gold).mean(dim=1))
        limit = float(self._stages["ppo"]["ppo"]["kl"]["maximum"])
        kl, free = (policies[name].kl for name in ("ppo", "ppo-free"))
        more = Estimate.of((sampled["ppo-free"].divergence - sampled["ppo"].divergence).mean(dim=1))
        rise = policies["ppo"].answer_loss - policies["sft"].answer_loss
        last = [max(row["step"] for row in self.steps(name)) for name in ("ppo", "ppo-free")]
        return [
            Figure("gold reward: ppo − sft, a prompt", gain, "> 2 SE", gain.value > 2 * gain.error),
            Figure("KL a sequence: ppo, nats", kl, f"< {limit:g}", kl.value < limit),
            Figure("answer loss: ppo − sft, nats a token", Estimate(rise), "≤ 0.3", rise <= MOST_LOSS_RISE),
            Figure("KL: ppo-free / ppo", _ratio(free, kl), "≥ 1.15", free.value >= LEAST_KL_RATIO * kl.value),
            Figure("KL: ppo-free − ppo, nats a prompt", more, "> 2 SE", more.value > 2 * more.error),
            Figure("steps: ppo-free − ppo", Estimate(last[1] - last[0]), "= 0", last[0] == last[1]),
        ]

    def _reward_figures(self, reward: RewardModel) -> list[Figure]:
        chosen, rejected = self._sides
        found = accuracy(reward.rewards(chosen) - reward.rewards(rejected))
        ceiling = self._pairs.ceiling
        longer_wins = read_pairs(self.data("pairs")).longer_by.sign().sum() > 0
        by_length = self._pairs.longer_by if longer_wins else -self._pairs.longer_by
        rule = "the longer" if longer_wins else "the shorter"
        near = abs(found.value - ceiling) <= MOST_BELOW_CEILING
        gold = [2 * preference(*couple) - 1 for couple in zip(self._pairs.chosen, self._pairs.rejected, strict=True)]
        return [
            Figure("reward model: accuracy", found, f"{ceiling:.3f} ± {MOST_BELOW_CEILING}", near),
            Figure("  gold reward on the same labels", accuracy(torch.tensor(gold))),
            Figure(f"  length alone ({rule} answer)", accuracy(by_length)),
        ]

    def _dpo_figures(self) -> list[Figure]:
        sft, dpo = (
            self.policies[name].log_probs(self._sides[0]) - self.policies[name].log_probs(self._sides[1])
            for name in ("sft", "dpo")
        )
        matched = self._pairs.longer_by.abs() <= LENGTH_MATCHED
        margins = accuracy(dpo - sft)
        good = margins.value > LEAST_MARGINS
        return [
            Figure("dpo: pairs with a margin above 0", margins, f"> {LEAST_MARGINS}", good),
            Figure(f"  of the {int(matched.sum())} of like length", accuracy((dpo - sft)[matched])),
            Figure("  sft: chosen answer more likely", accuracy(sft)),
            Figure("  sft: the same, of like length", accuracy(sft[matched])),
        ]


def _ratio(above: Estimate, below: Estimate) -> Estimate:
    return Estimate(above.value / below.value if below.value else float("nan"))


def measure(workdir: Path, job: Path, prompts: int) -> bool:
    """Measure, show, write; whether all bounds are met."""
    torch.set_num_threads(1)  # see models.batched
    manifest = yaml.safe_load(job.read_text(encoding="utf-8"))
    report = Measurement(workdir, manifest, prompts).report()
    show(report)
    (workdir / "report.json").write_text(report.to_json(), encoding="utf-8")
    draw(report, workdir / "report.png")
    return not report.missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure the models of the finished rlhf example.")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--job", type=Path, default=HERE / "job.yaml", help="the manifest that was run")
    parser.add_argument("--prompts", type=int, default=200, help="held-out questions that are answered")
    given = parser.parse_args(arguments)
    return 0 if measure(given.workdir, given.job, given.prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
