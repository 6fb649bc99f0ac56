"""Recognise the format of a data file by its keys, and turn its rows into records.

| format | keys | becomes |
| --- | --- | --- |
| OpenAI chat | `messages`, perhaps `tools` | conversation |
| ShareGPT | `conversations` of `from`, `value` | conversation |
| prompt and completion | `prompt`, `completion`: text, or lists of messages | conversation |
| Alpaca | `instruction`, `output`, perhaps `input` | conversation: instruction, blank line, input; output |
| FLAN CoT | `input`, `target`, `rationale` | conversation: input; rationale, new line, "The answer is " target |
| text | `text` | document |

Preference data (hh-rlhf, UltraFeedback and others) is recognised in order to say what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from trimtab_trainer.config import StageType
from trimtab_trainer.data.files import DataFile, Row, Rows, read_rows
from trimtab_trainer.data.records import ROLES, Conversation, Document, InvalidRecord, Message, Record
from trimtab_trainer.errors import BadData

RECOGNITION_ROWS = 100
"""Rows that are looked at before a file counts as not recognised."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Format:
    """A data format: the keys that tell it, and how a row of it becomes a record."""

    name: str
    kind: Literal["conversation", "document", "preferences"]
    keys: frozenset[str]
    convert: Callable[[Row], Record]


def open_records(file: DataFile, stage: StageType) -> tuple[Format, Iterator[tuple[int, Record | InvalidRecord]]]:
    """Recognise a file and stream its records with their line numbers.

    Raises:
        BadData: the format is unknown, or not one that the stage can learn from.
        InputMissing: the file is not there.
    """
    rows = read_rows(file)
    seen: list[tuple[int, Row | InvalidRecord]] = []
    found: Format | None = None
    for item in rows:
        seen.append(item)
        found = None if isinstance(item[1], InvalidRecord) else recognise(item[1])
        if found or len(seen) == RECOGNITION_ROWS:
            break
    if found is None:
        raise _unknown(file, seen)
    _require_fit(file, found, stage)
    return found, _convert_all(found, chain(seen, rows))


def recognise(row: Row) -> Format | None:
    """The format of a row, None when its keys fit none. Preferences come first: many hold `messages` too."""
    keys = {key for key, value in row.items() if value is not None}
    return next((known for known in FORMATS if known.keys <= keys), None)


def _unknown(file: DataFile, seen: list[tuple[int, Row | InvalidRecord]]) -> BadData:
    if not seen:
        return BadData(f"{file.name} holds no records; write at least one")
    number, row = seen[0]
    if isinstance(row, InvalidRecord):
        return BadData(f"line {number} of {file.name}: {row.cause}; {row.remedy}")
    keys = ", ".join(sorted(map(str, row)))[:200] or "none"
    expected = "; ".join(", ".join(sorted(known.keys)) for known in FORMATS if known.kind != "preferences")
    return BadData(f"line {number} of {file.name}: format not recognised (keys: {keys}); expected one of: {expected}")


def _require_fit(file: DataFile, found: Format, stage: StageType) -> None:
    if found.kind == "preferences":
        raise BadData(
            f"{file.name} holds {found.name}: data for reward models and preference optimisation, not for a {stage} "
            f"stage; give demonstrations (messages, or prompt and completion), or text for pretrain"
        )
    if stage is StageType.PRETRAIN and found.kind != "document":
        raise BadData(
            f"{file.name} holds {found.name}; a pretrain stage learns running text: give .txt files or a 'text' field"
        )
    if stage is StageType.SFT and found.kind != "conversation":
        raise BadData(
            f"{file.name} holds running text; an sft stage learns answers: give messages, or use a pretrain stage"
        )


def _convert_all(known: Format, rows: Rows | chain[Any]) -> Iterator[tuple[int, Record | InvalidRecord]]:
    for number, row in rows:
        if isinstance(row, InvalidRecord):
            yield number, row
            continue
        try:
            yield number, known.convert(row)
        except InvalidRecord as error:
            yield number, error


def _value(row: Row, key: str) -> Any:
    if row.get(key) is None:
        raise InvalidRecord(f"'{key}' is missing", f"add '{key}' or remove the record")
    return row[key]


def _text(row: Row, key: str) -> str:
    return _checked(_value(row, key), key)


def _checked(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise InvalidRecord(f"'{key}' is a {type(value).__name__}, not text", f"write '{key}' as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecord(f"'{key}' holds half of a surrogate pair", "write valid Unicode") from error
    return value


def _filled(row: Row, key: str) -> str:
    if not (text := _text(row, key)).strip():
        raise InvalidRecord(f"'{key}' is empty", "fill it or remove the record")
    return text


def _document(row: Row) -> Record:
    return Document(_filled(row, "text"))


def _chat(row: Row) -> Record:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRecord(f"'tools' is a {type(tools).__name__}, not a list", "write a list of JSON schemas")
    return Conversation(_messages(_value(row, "messages"), "messages"), tools or None)


def _sharegpt(row: Row) -> Record:
    return Conversation(_messages(_value(row, "conversations"), "conversations"))


def _prompt_completion(row: Row) -> Record:
    prompt, completion = _value(row, "prompt"), _value(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Conversation(_messages(prompt, "prompt") + _messages(completion, "completion"))
    return _turn(_filled(row, "prompt"), _filled(row, "completion"))


def _alpaca(row: Row) -> Record:
    instruction, details = _filled(row, "instruction"), _checked(row.get("input") or "", "input")
    return _turn(f"{instruction}\n\n{details}" if details else instruction, _filled(row, "output"))


def _flan(row: Row) -> Record:
    # FLAN's files write a line break as a backslash and an n.
    question, target, rationale = (_filled(row, key).replace("\\n", "\n") for key in ("input", "target", "rationale"))
    return _turn(question, f"{rationale}\nThe answer is {target}")


def _turn(user: str, assistant: str) -> Conversation:
    return Conversation([Message("user", user), Message("assistant", assistant)])


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InvalidRecord(
            f"'{key}' is not a list of messages, or an empty one", 'write [{"role": …, "content": …}, …]'
        )
    return [_message(item, f"{key}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise InvalidRecord(
            f"'{place}' is a {type(item).__name__}, not a message", "write an object with role and content"
        )
    named = {key: value for key, value in item.items() if value is not None}
    if "from" in named and "role" not in named:
        role = _SHAREGPT_ROLES.get(str(named.pop("from")).lower(), "")
        content = named.pop("value", "")
    else:
        role, content = str(named.pop("role", "")), named.pop("content", "")
    if role not in ROLES:
        raise InvalidRecord(f"'{place}' has no known role", f"use one of {', '.join(sorted(ROLES))}")
    text = _checked(_joined(content, place), f"{place}.content")
    if not text.strip() and not (role == "tool" or named.get("tool_calls")):
        raise InvalidRecord(f"'{place}.content' is empty", "fill it or remove the message")
    return Message(role, text, _trained(named, place), named)


def _joined(content: Any, place: str) -> Any:
    """Text of OpenAI's list of content parts; anything else unchanged."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise InvalidRecord(f"'{place}.content' holds a part that is not text", "remove images and audio")
    return "".join(_checked(part.get("text"), f"{place}.content") for part in content)


def _trained(named: dict[str, Any], place: str) -> bool:
    """Take `train` (ours) and `weight` (OpenAI's) out of the message's further keys."""
    train, weight = named.pop("train", True), named.pop("weight", 1)
    if not isinstance(train, bool):
        raise InvalidRecord(f"'{place}.train' is {train!r}", "write true or false")
    if weight not in (0, 1):
        raise InvalidRecord(f"'{place}.weight' is {weight!r}", "write 0 or 1")
    return train and weight == 1


def _never(row: Row) -> Record:
    raise AssertionError("preference data are refused before they are converted")


def _preferences(name: str, *keys: str) -> Format:
    return Format(name, "preferences", frozenset(keys), _never)


FORMATS = (
    _preferences("UltraFeedback-like preferences (prompt, chosen, rejected)", "prompt", "chosen", "rejected"),
    _preferences("hh-rlhf-like preferences (chosen, rejected)", "chosen", "rejected"),
    _preferences("OpenAI preferences", "preferred_output", "non_preferred_output"),
    _preferences("rated completions (UltraFeedback)", "instruction", "completions"),
    _preferences("labelled completions (KTO)", "prompt", "completion", "label"),
    Format("OpenAI chat", "conversation", frozenset({"messages"}), _chat),
    Format("ShareGPT", "conversation", frozenset({"conversations"}), _sharegpt),
    Format("prompt and completion", "conversation", frozenset({"prompt", "completion"}), _prompt_completion),
    Format("Alpaca", "conversation", frozenset({"instruction", "output"}), _alpaca),
    Format("FLAN CoT", "conversation", frozenset({"input", "target", "rationale"}), _flan),
    Format("text", "document", frozenset({"text"}), _document),
)
"""In the order in which they are tried."""
