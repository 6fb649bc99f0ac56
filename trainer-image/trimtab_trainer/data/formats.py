"""Recognise the format of a data file by its keys, and turn its rows into records.

| format | keys | becomes |
| --- | --- | --- |
| OpenAI chat | `messages`, perhaps `tools` | conversation |
| ShareGPT | `conversations` of `from`, `value` | conversation |
| prompt and completion | `prompt`, `completion`: text, or lists of messages | conversation |
| Alpaca | `instruction`, `output`, perhaps `input` | conversation: instruction, blank line, input; output |
| FLAN CoT | `input`, `target`, `rationale` | conversation: input; rationale, new line, "The answer is " target |
| text | `text` | document |
| prompts | `prompt`: text or messages | prompt |
| preferences | `chosen`, `rejected`, perhaps `prompt`: text or messages; perhaps `margin`, `probability` | pair |
| OpenAI preferences | `input`, `preferred_output`, `non_preferred_output` | pair |
| rankings | `prompt`, `completions`, `ranks` | ranking |
| UltraFeedback | `instruction`, `completions` of `response`, `overall_score` | ranking |

Single labelled completions (KTO) are recognised in order to say what is wanted instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from trimtab_trainer.config import StageType
from trimtab_trainer.data.files import DataFile, Row, Rows, read_rows
from trimtab_trainer.data.messages import checked, filled, messages_of, tools_of, value_of
from trimtab_trainer.data.preferences import explicit_pair, implicit_pair, openai_pair, ranked, rated
from trimtab_trainer.data.records import Conversation, Document, InvalidRecord, Message, Record
from trimtab_trainer.errors import BadData

RECOGNITION_ROWS = 100
"""Rows that are looked at before a file counts as not recognised."""

Kind = Literal["conversation", "document", "pair", "ranking", "label", "prompt"]


@dataclass(frozen=True)
class Format:
    """A data format: the keys that tell it, and how a row of it becomes a record."""

    name: str
    kind: Kind
    keys: frozenset[str]
    convert: Callable[[Row], Record]


def open_rows(file: DataFile, stage: StageType, text_too: bool) -> tuple[Format, Rows]:
    """Recognise a file and stream its rows with their line numbers.

    `text_too`: running text is welcome whatever the stage learns from.

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
    if not (text_too and found.kind == "document"):
        _require_fit(file, found, stage)
    return found, chain(seen, rows)


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
    expected = "; ".join(", ".join(sorted(known.keys)) for known in FORMATS if known.kind != "label")
    return BadData(f"line {number} of {file.name}: format not recognised (keys: {keys}); expected one of: {expected}")


_WANTED: dict[StageType, tuple[tuple[Kind, ...], str]] = {
    StageType.PRETRAIN: (("document",), "running text: give .txt files or a 'text' field"),
    StageType.SFT: (("conversation",), "answers: give messages, or prompt and completion"),
    StageType.DPO: (("pair",), "pairs of answers: give prompt, chosen and rejected"),
    StageType.PPO: (("prompt", "conversation"), "prompts: give prompt, or messages"),
    StageType.REWARD: (
        ("pair", "ranking"),
        "compared answers: give prompt, chosen and rejected, or prompt, completions and ranks",
    ),
}
"""Of each stage: what it learns from, and how it is given."""


def _require_fit(file: DataFile, found: Format, stage: StageType) -> None:
    kinds, wanted = _WANTED[stage]
    if found.kind in kinds:
        return
    better = next((other for other, (theirs, _) in _WANTED.items() if found.kind in theirs), None)
    hint = f", or make it a stage of type {better}" if better else ""
    raise BadData(f"{file.name} holds {found.name}; a stage of type {stage} learns from {wanted}{hint}")


def _document(row: Row) -> Record:
    return Document(filled(row, "text"))


def _chat(row: Row) -> Record:
    return Conversation(messages_of(value_of(row, "messages"), "messages"), tools_of(row))


def _sharegpt(row: Row) -> Record:
    return Conversation(messages_of(value_of(row, "conversations"), "conversations"))


def _prompt_completion(row: Row) -> Record:
    prompt, completion = value_of(row, "prompt"), value_of(row, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Conversation(messages_of(prompt, "prompt") + messages_of(completion, "completion"))
    return _turn(filled(row, "prompt"), filled(row, "completion"))


def _alpaca(row: Row) -> Record:
    instruction, details = filled(row, "instruction"), checked(row.get("input") or "", "input")
    return _turn(f"{instruction}\n\n{details}" if details else instruction, filled(row, "output"))


def _flan(row: Row) -> Record:
    question, target, rationale = (filled(row, key) for key in ("input", "target", "rationale"))
    return _turn(question, f"{rationale}\nThe answer is {target}")


def _turn(user: str, assistant: str) -> Conversation:
    return Conversation([Message("user", user), Message("assistant", assistant)])


def _prompt(row: Row) -> Record:
    prompt = value_of(row, "prompt")
    if isinstance(prompt, list):
        return Conversation(messages_of(prompt, "prompt"))
    return Conversation([Message("user", filled(row, "prompt"))])


def _never(row: Row) -> Record:
    raise AssertionError("labels are refused before they are converted")


def _format(name: str, kind: Kind, convert: Callable[[Row], Record], *keys: str) -> Format:
    return Format(name, kind, frozenset(keys), convert)


FORMATS = (
    _format("preferences (prompt, chosen, rejected)", "pair", explicit_pair, "prompt", "chosen", "rejected"),
    _format("hh-rlhf-like preferences (chosen, rejected)", "pair", implicit_pair, "chosen", "rejected"),
    _format("OpenAI preferences", "pair", openai_pair, "input", "preferred_output", "non_preferred_output"),
    _format("rankings (prompt, completions, ranks)", "ranking", ranked, "prompt", "completions", "ranks"),
    _format("rated completions (UltraFeedback)", "ranking", rated, "instruction", "completions"),
    _format("labelled completions (KTO)", "label", _never, "prompt", "completion", "label"),
    _format("OpenAI chat", "conversation", _chat, "messages"),
    _format("ShareGPT", "conversation", _sharegpt, "conversations"),
    _format("prompt and completion", "conversation", _prompt_completion, "prompt", "completion"),
    _format("Alpaca", "conversation", _alpaca, "instruction", "output"),
    _format("FLAN CoT", "conversation", _flan, "input", "target", "rationale"),
    _format("text", "document", _document, "text"),
    _format("prompts", "prompt", _prompt, "prompt"),
)
"""In the order in which they are tried."""
