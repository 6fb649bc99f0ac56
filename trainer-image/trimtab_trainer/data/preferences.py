"""Pairs of answers from the fields' usual files: with the prompt apart, or in both conversations.

The prompt must be the same on both sides. Where it stands in the conversations, it is all but their last turn.
"""

from __future__ import annotations

import re
from typing import Any

from trimtab_trainer.data.files import Row
from trimtab_trainer.data.messages import filled, messages_of, tools_of, value_of
from trimtab_trainer.data.records import Conversation, InvalidRecord, Message, Pair

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def explicit_pair(row: Row) -> Pair:
    """`prompt`, `chosen`, `rejected`: texts or messages; messages may repeat the prompt."""
    prompt = _turns(value_of(row, "prompt"), "prompt", "user")
    chosen, rejected = (_answered(prompt, _turns(value_of(row, key), key, "assistant")) for key in _SIDES)
    return _pair(chosen, rejected, tools_of(row))


def implicit_pair(row: Row) -> Pair:
    """`chosen`, `rejected`: whole conversations, as messages or in the text form of hh-rlhf."""
    chosen, rejected = (_conversation(value_of(row, key), key) for key in _SIDES)
    return _pair(chosen, rejected, tools_of(row))


def openai_pair(row: Row) -> Pair:
    """`input.messages`, `preferred_output`, `non_preferred_output`."""
    given = value_of(row, "input")
    if not isinstance(given, dict):
        raise InvalidRecord(f"'input' is a {type(given).__name__}, not an object", "write an object with messages")
    prompt = messages_of(value_of(given, "messages"), "input.messages")
    chosen, rejected = (
        prompt + messages_of(value_of(row, key), key) for key in ("preferred_output", "non_preferred_output")
    )
    return _pair(chosen, rejected, tools_of(given))


_SIDES = ("chosen", "rejected")


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


def _pair(chosen: list[Message], rejected: list[Message], tools: list[Any] | None) -> Pair:
    for key, turns in zip(_SIDES, (chosen, rejected), strict=True):
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise InvalidRecord(
                f"'{key}' does not end with an assistant's turn after a prompt", "add one, or remove the record"
            )
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRecord("chosen and rejected answer different prompts", "give both sides the same prompt")
    if chosen[-1] == rejected[-1]:
        raise InvalidRecord("chosen and rejected are the same", "remove the record: nothing is to be learnt from it")
    return Pair(Conversation(chosen, tools), Conversation(rejected, tools))
