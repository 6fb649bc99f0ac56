"""The verifier of a `ppo` stage: a program that says whether an answer is right."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trimtab_operator.api.base import ApiModel, rules
from trimtab_trainer.verifier_settings import (
    AbsoluteTolerance,
    AnswerPattern,
    IgnoreCase,
    Pattern,
    ReferenceField,
    RelativeTolerance,
)

VERIFIERS = ("exactMatch", "regularExpression", "jsonSchema", "numericAnswer")


def _compiles(field: str) -> dict[str, Any]:
    """A rule that fails on an expression that RE2 does not take: evaluating it is an error then, whatever it gives."""
    return rules(
        (
            f"!has(self.{field}) || ''.matches(self.{field}) in [true, false]",
            f"{field} must be a regular expression in RE2's syntax, which has no look-around and no back-references",
        )
    )


class ExactMatch(ApiModel):
    """The answer is the reference, without white space around both."""

    model_config = ApiModel.model_config | {"json_schema_extra": _compiles("answerPattern")}

    field: ReferenceField | None = None
    answer_pattern: AnswerPattern | None = None
    ignore_case: IgnoreCase | None = None


class RegularExpression(ApiModel):
    """The answer matches; there is no reference."""

    model_config = ApiModel.model_config | {"json_schema_extra": _compiles("pattern")}

    pattern: Pattern


class JsonSchema(ApiModel):
    """The answer is one JSON document that the schema admits; there is no reference."""

    schema_: dict[str, Any] = Field(
        alias="schema",
        description="JSON Schema of any draft, 2020-12 without $schema. Nothing is fetched: $ref stays inside.",
        json_schema_extra={"type": "object", "maxProperties": 64, "x-kubernetes-preserve-unknown-fields": True},
    )


class NumericAnswer(ApiModel):
    """The last number of the answer is the last one of the reference."""

    model_config = ApiModel.model_config | {"json_schema_extra": _compiles("answerPattern")}

    field: ReferenceField | None = None
    answer_pattern: AnswerPattern | None = None
    absolute_tolerance: AbsoluteTolerance | None = None
    relative_tolerance: RelativeTolerance | None = None


class Verifier(ApiModel):
    """Rewards 1 for a right answer and 0 for another one, by a program that no model can talk round."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            (
                f"[{', '.join(f'has(self.{name})' for name in VERIFIERS)}].exists_one(x, x)",
                f"set exactly one of {', '.join(VERIFIERS[:-1])} and {VERIFIERS[-1]}",
            )
        )
    }

    exact_match: ExactMatch | None = Field(default=None, description="The answer is the reference.")
    regular_expression: RegularExpression | None = Field(default=None, description="The answer matches.")
    json_schema: JsonSchema | None = Field(default=None, description="The answer is JSON that the schema admits.")
    numeric_answer: NumericAnswer | None = Field(
        default=None, description="The answer's last number is that of the reference."
    )
