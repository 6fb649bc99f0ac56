"""Preferences from the field's usual files: pairs, with the prompt apart or in both conversations, and rankings.

The prompt must be the same for all answers. Where it stands in the conversations, it is all but their last turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from trimtab_trainer.data.files import Row
from trimtab_trainer.data.messages import filled, messages_of, tools_of, value_of
from trimtab_trainer.data.records import Conversation, InvalidRecord, Label, Message, Ranking

MOST_ANSWERS = 16
"""Of one prompt."""
_SIDES = ("chosen", "rejected")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def explicit_pair(row: Row) -> Ranking:
    """`prompt`, `chosen`, `rejected`: texts or messages; messages may repeat the prompt."""
    prompt = _turns(value_of(row, "prompt"), "prompt", "user")
    return _pair([_answered(prompt, _turns(value_of(row, key), key, "assistant")) for key in _SIDES], row)


def implicit_pair(row: Row) -> Ranking:
    """`chosen`, `rejected`: whole conversations, as messages or in the text form of hh-rlhf."""
    return _pair([_conversation(value_of(row, key), key) for key in _SIDES], row)


def openai_pair(row: Row) -> Ranking:
    """`input.messages`, `preferred_output`, `non_preferred_output`."""
    given = value_of(row, "input")
    if not isinstance(given, dict):
        raise InvalidRecord(f"'input' is a {type(given).__name__}, not an object", "write an object with messages")
    prompt = messages_of(value_of(given, "messages"), "input.messages")
    answers = [prompt + messages_of(value_of(row, key), key) for key in ("preferred_output", "non_preferred_output")]
    return _pair(answers, {**row, "tools": given.get("tools")})


def ranked(row: Row) -> Ranking:
    """`prompt`, `completions` and their `ranks`: 0 or 1 is best, equal ranks are ties."""
    prompt = _turns(value_of(row, "prompt"), "prompt", "user")
    completions = _list_of(row, "completions")
    ranks = _numbers(row, "ranks", len(completions))
    turns = [_answered(prompt, _turns(each, f"completions[{i}]", "assistant")) for i, each in enumerate(completions)]
    return _ranking(turns, ranks, tools_of(row))


def rated(row: Row) -> Ranking:
    """UltraFeedback's own files: `instruction`, `completions` of `response` and `overall_score`, higher is better."""
    prompt = [Message("user", filled(row, "instruction"))]
    completions = _list_of(row, "completions")
    for i, each in enumerate(completions):
        if not isinstance(each, dict):
            raise InvalidRecord(f"completions[{i}] is a {type(each).__name__}", "write objects with response")
    scores = [each.get("overall_score") for each in completions]
    turns = [[*prompt, Message("assistant", filled(each, "response"))] for each in completions]
    ratings = _numbers({"overall_score": scores}, "overall_score", len(turns))
    return _ranking(turns, [-rating for rating in ratings], None)


def _turns(value: Any, key: str, role: str) -> list[Message]:
    return messages_of(value, key) if isinstance(value, list) else [Message(role, filled({key: value}, key))]


def _answered(prompt: list[Message], turns: list[Message]) -> list[Message]:
    return turns if turns[: len(prompt)] == prompt else prompt + turns


def _conversation(value: Any, key: str) -> list[Message]:
    if isinstance(value, list):
        return messages_of(value, key)
    before, *parts = _HH_TURN.split(filled({key: value}, key))
    if before.strip() or not parts:
        raise InvalidRecord(
            f"'{key}' is no conversation",
            "write messages, or text whose turns begin with a blank line and Human: or Assistant:",
        )
    turns = [Message(_HH_ROLES[speaker], text.strip()) for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
    empty = next((i for i, turn in enumerate(turns) if not turn.content), None)
    if empty is not None:
        raise InvalidRecord(f"turn {empty} of '{key}' is empty", "fill it or remove the record")
    return turns


def _list_of(row: Row, key: str) -> list[Any]:
    values = value_of(row, key)
    if not isinstance(values, list):
        raise InvalidRecord(f"'{key}' is a {type(values).__name__}, not a list", "write a list")
    if len(values) < 2:
        raise InvalidRecord(
            f"'{key}' has {len(values) or 'no'} answer{'' if len(values) == 1 else 's'}: there is nothing to compare",
            "give two at least, or remove the record",
        )
    if len(values) > MOST_ANSWERS:
        raise InvalidRecord(f"'{key}' has {len(values)} answers, more than {MOST_ANSWERS}", "split the record")
    return values


def _numbers(row: Row, key: str, count: int) -> list[float]:
    values = value_of(row, key)
    if not isinstance(values, list) or len(values) != count or not all(map(_is_number, values)):
        raise InvalidRecord(f"'{key}' is not one number for each of the {count} answers", "give each answer one")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(row: Row, key: str, default: float, lowest: float, highest: float) -> float:
    value = row.get(key)
    if value is None:
        return default
    if not _is_number(value) or not lowest <= value <= highest:
        raise InvalidRecord(f"'{key}' is not a number from {lowest:g} to {highest:g}", "correct it or leave it out")
    return float(value)


def _pair(answers: Sequence[list[Message]], row: Row) -> Ranking:
    """The chosen answer and the rejected one, perhaps with a `margin` and the `probability` that it is better."""
    for key, turns in zip(_SIDES, answers, strict=True):
        _require_answer(turns, f"'{key}'")
    chosen, rejected = answers
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRecord("chosen and rejected answer different prompts", "give both sides the same prompt")
    if chosen[-1] == rejected[-1]:
        raise InvalidRecord("chosen and rejected are the same", "remove the record: nothing is to be learnt from it")
    margin, probability = _number(row, "margin", 0.0, 0.0, 1e6), _number(row, "probability", 1.0, 0.0, 1.0)
    tools = tools_of(row)
    if probability < 0.5:
        chosen, rejected, probability = rejected, chosen, 1 - probability
    return Ranking(
        (Conversation(chosen, tools), Conversation(rejected, tools)),
        (Label(0, 0, margin, probability), Label(1, 1, margin, probability)),
    )


def _ranking(answers: list[list[Message]], ranks: list[float], tools: list[Any] | None) -> Ranking:
    for i, turns in enumerate(answers):
        _require_answer(turns, f"completion {i}")
        if turns[:-1] != answers[0][:-1]:
            raise InvalidRecord(f"completions 0 and {i} answer different prompts", "give all the same prompt")
        if turns[-1] in (other[-1] for other in answers[:i]):
            raise InvalidRecord(f"completion {i} stands twice", "remove it once: it can't be compared with itself")
    levels = sorted(set(ranks))
    if len(levels) == 1:
        raise InvalidRecord("all completions are ties", "remove the record: nothing is to be learnt from it")
    order = sorted(range(len(answers)), key=lambda i: ranks[i])
    return Ranking(
        tuple(Conversation(answers[i], tools) for i in order),
        tuple(Label(position, levels.index(ranks[i])) for position, i in enumerate(order)),
    )


def _require_answer(turns: list[Message], what: str) -> None:
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise InvalidRecord(
            f"{what} does not end with an assistant's turn after a prompt", "add one, or remove the record"
        )
