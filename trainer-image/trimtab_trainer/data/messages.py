"""Values and messages of a row, checked: what every converter of records is made of."""

from __future__ import annotations

from typing import Any

from trimtab_trainer.data.files import Row
from trimtab_trainer.data.records import ROLES, InvalidRecord, Message

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


def value_of(row: Row, key: str) -> Any:
    """The value of a key; InvalidRecord where it is absent or null."""
    if row.get(key) is None:
        raise InvalidRecord(f"'{key}' is missing", f"add '{key}' or remove the record")
    return row[key]


def text_of(row: Row, key: str) -> str:
    """The text of a key."""
    return checked(value_of(row, key), key)


def checked(value: Any, key: str) -> str:
    """The value, which must be text that can be written."""
    if not isinstance(value, str):
        raise InvalidRecord(f"'{key}' is a {type(value).__name__}, not text", f"write '{key}' as a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecord(f"'{key}' holds half of a surrogate pair", "write valid Unicode") from error
    return value


def filled(row: Row, key: str) -> str:
    """The text of a key, which must not be blank."""
    if not (text := text_of(row, key)).strip():
        raise InvalidRecord(f"'{key}' is empty", "fill it or remove the record")
    return text


def tools_of(row: Row) -> list[Any] | None:
    """JSON schemas of the tools that the model may call; None without any."""
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRecord(f"'tools' is a {type(tools).__name__}, not a list", "write a list of JSON schemas")
    return tools or None


def messages_of(value: Any, key: str) -> list[Message]:
    """A list of messages, in OpenAI's or ShareGPT's form."""
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
    text = checked(_joined(content, place), f"{place}.content")
    if not text.strip() and not (role == "tool" or named.get("tool_calls")):
        raise InvalidRecord(f"'{place}.content' is empty", "fill it or remove the message")
    return Message(role, text, _trained(named, place), named)


def _joined(content: Any, place: str) -> Any:
    """Text of OpenAI's list of content parts; anything else unchanged."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        raise InvalidRecord(f"'{place}.content' holds a part that is not text", "remove images and audio")
    return "".join(checked(part.get("text"), f"{place}.content") for part in content)


def _trained(named: dict[str, Any], place: str) -> bool:
    """Take `train` (ours) and `weight` (OpenAI's) out of the message's further keys."""
    train, weight = named.pop("train", True), named.pop("weight", 1)
    if not isinstance(train, bool):
        raise InvalidRecord(f"'{place}.train' is {train!r}", "write true or false")
    if weight not in (0, 1):
        raise InvalidRecord(f"'{place}.weight' is {weight!r}", "write 0 or 1")
    return train and weight == 1
