"""The verifier of a `ppo` stage, as in `settings`: a program's judgement of an answer instead of a reward model's.

Imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trimtab_trainer.settings import Contract

ReferenceField = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        description="Field of the prompt's record that holds the right answer; answer by default.",
    ),
]
Pattern = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        description="Regular expression in RE2's syntax, found anywhere in the answer; ^ and $ hold it to the ends.",
    ),
]
AnswerPattern = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        description="Regular expression in RE2's syntax, whose group (?P<answer>…) is what counts of the answer, where "
        "it is found first; an answer in which it is not found is wrong. Absent: all of the answer counts.",
    ),
]
IgnoreCase = Annotated[bool, Field(description="Whether capital letters equal small ones; false by default.")]
AbsoluteTolerance = Annotated[
    float, Field(ge=0, le=1e6, description="How far a right number may be from the reference; 0 by default.")
]
RelativeTolerance = Annotated[
    float, Field(ge=0, le=1, description="More than that, as a part of the reference; 0 by default.")
]


class ExactMatch(Contract):
    """The answer is the reference, without white space around both."""

    field: ReferenceField = "answer"
    answer_pattern: AnswerPattern | None = None
    ignore_case: IgnoreCase = False


class RegularExpression(Contract):
    """The answer matches; there is no reference."""

    pattern: Pattern


class JsonSchema(Contract):
    """The answer is one JSON document that the schema admits; there is no reference."""

    schema_: dict[str, Any] = Field(alias="schema")


class NumericAnswer(Contract):
    """The last number of the answer is that of the reference."""

    field: ReferenceField = "answer"
    answer_pattern: AnswerPattern | None = None
    absolute_tolerance: AbsoluteTolerance = 0.0
    relative_tolerance: RelativeTolerance = 0.0


class Verifier(Contract):
    """What says whether an answer is right: one of these."""

    exact_match: ExactMatch | None = None
    regular_expression: RegularExpression | None = None
    json_schema: JsonSchema | None = None
    numeric_answer: NumericAnswer | None = None

    @property
    def reference_field(self) -> str | None:
        """Field of the prompt's record that the answer is compared with; None where nothing is."""
        compared = self.exact_match or self.numeric_answer
        return compared.field if compared else None
