"""What a training record is, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
OPENING_ROLES = frozenset({"system", "developer"})


class DropCause(StrEnum):
    """Why a record is left out."""

    INVALID = "invalid"
    TOO_LONG = "too long"
    NO_LABEL_LEFT = "no label left after the cut"


class InvalidRecord(Exception):
    """Why a record can't be used, and what to do about it; the caller adds the place."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: one of `ROLES`.
        content: its text; empty for an assistant turn that only calls tools.
        train: False where the record says that this turn bears no loss (`"train": false` or `"weight": 0`).
        extra: further keys that a chat template may use, such as `name` and `tool_calls`.
    """

    role: str
    content: str
    train: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """The dictionary that a chat template sees."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, and the tools that the model may call (JSON schemas), if any."""

    messages: list[Message]
    tools: list[Any] | None = None
    examples: int = 0
    """Few-shot examples among the messages: a question and an answer each, before the first other turn."""

    @property
    def opening(self) -> int:
        """Leading messages of the system."""
        return next((i for i, each in enumerate(self.messages) if each.role not in OPENING_ROLES), len(self.messages))

    def with_examples(self, examples: list[Conversation]) -> Conversation:
        """The same with `examples` put before it; they bear no loss."""
        turns = [replace(message, train=False) for each in examples for message in each.messages]
        at = self.opening
        return Conversation([*self.messages[:at], *turns, *self.messages[at:]], self.tools, len(examples))

    def with_fewer_examples(self) -> Conversation:
        """The same without the first example."""
        at = self.opening
        return Conversation(self.messages[:at] + self.messages[at + 2 :], self.tools, self.examples - 1)


@dataclass(frozen=True, slots=True)
class Document:
    """Running text."""

    text: str


class Label(NamedTuple):
    """What a ranking says of one of its answers.

    Attributes:
        position: of the answer within its ranking, from 0, the best answer first.
        rank: 0 is best; equal ranks are ties.
        margin: by how much the first of two answers should win at least.
        probability: that the first of two answers is the better one.
    """

    position: int = 0
    rank: int = 0
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Ranking:
    """Two or more answers to one prompt, the best first: their last turns differ, each the assistant's."""

    answers: tuple[Conversation, ...]
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class Wordings:
    """One record of a task in several wordings; each pass over the data set takes the next one."""

    conversations: tuple[Conversation, ...]


NO_LABEL = Label()

Record = Conversation | Document | Ranking | Wordings


def conversations_of(record: Record) -> tuple[Conversation, ...]:
    """What a chat template renders of a record; InvalidRecord where that is nothing."""
    match record:
        case Conversation():
            return (record,)
        case Ranking():
            return record.answers
        case Wordings():
            return record.conversations
        case Document():
            raise InvalidRecord("running text", "give messages")


def labels_of(record: Record) -> tuple[Label, ...]:
    """One for each text of the record."""
    return record.labels if isinstance(record, Ranking) else (NO_LABEL,) * len(conversations_of(record))


def texts_of(record: Record) -> list[str]:
    """All text of a record."""
    if isinstance(record, Document):
        return [record.text]
    return [message.content for each in conversations_of(record) for message in each.messages]
