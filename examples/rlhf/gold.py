"""Ways to write an answer, and the gold reward: what people really like, which no stage ever sees.

The recipe is that of a controlled study of reward models: a programmatic gold reward labels the pairs, with noise, and
measures the policies afterwards (Gao et al. 2022, "Scaling laws for reward model overoptimization", § 2).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

HEDGE, OFFER, REMARK = "Well, ", " I hope this helps.", " See also the manual."
"""People dislike the first, like the second, and do not care about the third, which is as long as the second."""
A_WORD = -0.02
NOT_ENDED = -1.0
LABEL_SCALE = 2.0
"""Of the Bradley-Terry model that labels the pairs: the larger, the less noise."""


@dataclass(frozen=True)
class Style:
    """How an answer begins and ends."""

    hedge: bool
    ending: str

    def of(self, answer: str) -> str:
        """The answer, written so."""
        return (HEDGE if self.hedge else "") + answer + self.ending


def draw_style(generator: random.Random) -> Style:
    """As people write: "Well, " in 30 % of answers, "I hope this helps." in 40 %, the remark in 20 %."""
    (ending,) = generator.choices([OFFER, REMARK, ""], [0.4, 0.2, 0.4])
    return Style(generator.random() < 0.3, ending)


def gold_reward(answer: str, ended: bool) -> float:
    """+1 for the offer at the end, −1 for the hedge at the beginning, −0.02 a word, −1 where the answer has no end."""
    text = answer.strip()
    style = text.endswith(OFFER.strip()) - text.startswith(HEDGE.strip())
    return style + A_WORD * len(text.split()) + (0.0 if ended else NOT_ENDED)


def preference(first: str, second: str) -> float:
    """Probability that people prefer `first`: σ(2 × difference of the gold rewards) (Bradley and Terry 1952)."""
    difference = gold_reward(first, True) - gold_reward(second, True)
    return 1 / (1 + math.exp(-LABEL_SCALE * difference))
