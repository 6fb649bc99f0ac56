"""What a verifier compares an answer with: a field of the prompt's record."""

from __future__ import annotations

from trimtab_trainer.algorithms.verifier import last_number
from trimtab_trainer.data.files import Row
from trimtab_trainer.data.messages import filled, value_of
from trimtab_trainer.data.records import InvalidRecord
from trimtab_trainer.verifier_settings import Verifier


def reference_of(row: Row, verifier: Verifier) -> str:
    """The right answer, as text; empty for a verifier that compares with none.

    Raises:
        InvalidRecord: the record has none, or not what the verifier can compare with.
    """
    field = verifier.reference_field
    if field is None:
        return ""
    value = value_of(row, field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)
    text = filled({field: value}, field)
    if verifier.numeric_answer is not None and last_number(text) is None:
        raise InvalidRecord(
            f"'{field}' holds no number, which numericAnswer compares with",
            "write the right number, or remove the record",
        )
    return text
