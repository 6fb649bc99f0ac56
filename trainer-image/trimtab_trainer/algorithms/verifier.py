"""Whether an answer is right, decided by a program: reward 1 or 0. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from trimtab_trainer.algorithms.expression import Expression
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.verifier_settings import ExactMatch, NumericAnswer, Verifier

Check = Callable[[str, str], bool]
"""Whether an answer is right, given the reference (empty where the verifier takes none)."""

_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+−])?"  # behind a word or a bracket it is an operator
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]+)?"
)


def build_check(verifier: Verifier) -> Check:
    """The check that a verifier asks for.

    Raises:
        BadConfiguration: an expression or a schema is not valid.
    """
    if verifier.exact_match is not None:
        return _exact_match(verifier.exact_match)
    if verifier.numeric_answer is not None:
        return _numeric_answer(verifier.numeric_answer)
    if verifier.json_schema is not None:
        from trimtab_trainer.algorithms.json_schema import schema_check  # few stages need the library

        admits = schema_check(verifier.json_schema.schema_)
        return lambda answer, _: admits(answer)
    if verifier.regular_expression is not None:
        expression = Expression(verifier.regular_expression.pattern, "ppo.verifier.regularExpression.pattern")
        return lambda answer, _: expression.is_found(answer)
    raise BadConfiguration(
        "ppo.verifier is empty; set one of exactMatch, regularExpression, jsonSchema and numericAnswer"
    )


def last_number(text: str) -> Decimal | None:
    """The last number of a text: digits, perhaps in groups (1,234), with a sign, a fraction or an exponent.

    >>> last_number("3 apples and 1,200.50 in all.")
    Decimal('1200.50')
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    try:
        return Decimal(numbers[-1].replace(",", "").replace("−", "-"))
    except ArithmeticError:  # an exponent that nothing has
        return None


def _exact_match(settings: ExactMatch) -> Check:
    part = _counted(settings.answer_pattern, "exactMatch.answerPattern")

    def normal(text: str) -> str:
        return text.strip().casefold() if settings.ignore_case else text.strip()

    def check(answer: str, reference: str) -> bool:
        counted = part(answer)
        return counted is not None and normal(counted) == normal(reference)

    return check


def _numeric_answer(settings: NumericAnswer) -> Check:
    part = _counted(settings.answer_pattern, "numericAnswer.answerPattern")
    absolute, relative = (Decimal(repr(each)) for each in (settings.absolute_tolerance, settings.relative_tolerance))

    def check(answer: str, reference: str) -> bool:
        number, right = last_number(part(answer) or ""), last_number(reference)
        if number is None or right is None:
            return False
        try:
            return number == right or abs(number - right) <= absolute + relative * abs(right)
        except ArithmeticError:  # too far apart for their difference to be a number
            return False

    return check


def _counted(pattern: str | None, place: str) -> Callable[[str], str | None]:
    """What counts of an answer; None where it is not there."""
    if pattern is None:
        return lambda answer: answer
    return Expression(pattern, f"ppo.verifier.{place}").the_group("answer")
