"""Render conversations with the tokenizer's chat template, and find the characters that bear loss.

The template runs in transformers' own sandboxed Jinja environment. It has to be prefix-stable: rendering the first k
turns gives the beginning of rendering all of them. Otherwise the model would be trained on prompts that it never gets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab_trainer.data.records import Conversation, InvalidRecord, Message
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
END_OF_TURN_PROBE = "trimtab end of turn"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the half-open character ranges that bear loss, in order."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not tokenizer.chat_template:
            raise BadConfiguration(
                f"{name} has no chat template; use a model or tokenizer that has one, or train one (chatTemplate)"
            )
        self.name = name
        self._tokenizer = tokenizer
        self._control = control_tokens(tokenizer)
        self._is_tagged = _GENERATION.search(str(tokenizer.get_chat_template())) is not None
        self.end_of_turn = self._find_end_of_turn()

    def render(self, conversation: Conversation, loss: Loss) -> Rendered:
        """Render a conversation and choose what bears loss.

        `assistant`: all assistant turns, `completion`: the last of them, `all`: everything. Each assistant turn starts
        after the generation prompt and includes its end-of-turn token; of a template with `{% generation %}` tags, only
        what they enclose bears loss, and the end of turn behind it. Turns marked `train: false` never bear loss.

        Raises:
            InvalidRecord: no turn to learn from, or text that holds a control token.
            BadConfiguration: the template fails, or is not prefix-stable.
        """
        messages = conversation.messages
        self._refuse_control_tokens(messages)
        text = self._apply(conversation, len(messages), False)
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if loss is Loss.COMPLETION:
            answers = answers[-1:]
        if loss is Loss.ALL:
            spans = _without(
                len(text), [self._span(conversation, i, text) for i, m in enumerate(messages) if not m.train]
            )
        else:
            spans = [self._span(conversation, i, text) for i in answers if messages[i].train]
            if self._is_tagged:
                spans = _common(spans, self._tagged(conversation, text))
        if not spans:
            raise InvalidRecord(f"no turn bears loss ({loss})", "add an assistant turn that is not marked train: false")
        return Rendered(text, spans)

    def render_prompt(self, conversation: Conversation) -> Rendered:
        """Render a conversation up to where the model answers; an answer at its end is left off.

        Raises:
            InvalidRecord: no turn is left to answer, or text holds a control token.
            BadConfiguration: the template fails.
        """
        messages = conversation.messages
        self._refuse_control_tokens(messages)
        turns = len(messages) - (messages[-1].role == "assistant")
        if turns == 0:
            raise InvalidRecord("no turn to answer", "add a user's turn, or remove the record")
        text = self._apply(conversation, turns, True)
        return Rendered(text, [(0, len(text))])

    def _span(self, conversation: Conversation, index: int, text: str) -> Span:
        answer = conversation.messages[index].role == "assistant"
        start = self._apply(conversation, index, answer) if index or answer else ""
        end = self._apply(conversation, index + 1, False)
        for prefix, turns in ((start, index), (end, index + 1)):
            if not text.startswith(prefix):
                raise BadConfiguration(
                    f"the chat template of {self.name} is not prefix-stable: it renders the first {turns} turns alone "
                    f"differently than within all {len(conversation.messages)}; use a template that never changes "
                    f"earlier turns, or records with one answer each"
                )
        # Line breaks that a template writes after the end of turn are never generated: the model has stopped by then.
        trimmed = end.rstrip()
        return len(start), len(trimmed) if answer and trimmed.endswith(self.end_of_turn) else len(end)

    def _tagged(self, conversation: Conversation, text: str) -> list[Span]:
        """What the template's tags enclose, each with the end-of-turn token that follows: no tag may keep it out."""
        from transformers.utils.chat_template_utils import render_jinja_template

        settings: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            [[message.for_template() for message in conversation.messages]],
            tools=conversation.tools,
            chat_template=self._tokenizer.get_chat_template(tools=conversation.tools),
            return_assistant_tokens_mask=True,
            **settings,
        )
        (found,) = rendered[1]
        end = self.end_of_turn
        return [(start, stop + len(end) if text.startswith(end, stop) else stop) for start, stop in found]

    def _apply(self, conversation: Conversation, turns: int, generation_prompt: bool) -> str:
        messages = [message.for_template() for message in conversation.messages[:turns]]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            reason = f"{type(error).__name__}: {error}"[:500]
            raise BadConfiguration(
                f"the chat template of {self.name} fails: {reason}; correct the template, or the record"
            ) from error
        return str(text)

    def _refuse_control_tokens(self, messages: list[Message]) -> None:
        for i, message in enumerate(messages):
            for token in self._control:
                if token in message.content:
                    raise InvalidRecord(
                        f"message {i} holds the control token {token!r}", "remove it: it would end or forge a turn"
                    )

    def _find_end_of_turn(self) -> str:
        """The control token that follows an answer; the end-of-sequence token where the template writes none."""
        probe = Conversation([Message("user", "question"), Message("assistant", END_OF_TURN_PROBE)])
        tail = self._apply(probe, 2, False).rpartition(END_OF_TURN_PROBE)[2].strip()
        matching = [token for token in reversed(self._control) if tail.startswith(token)]
        if matching:
            return matching[0]
        raise BadConfiguration(
            f"the chat template of {self.name} writes no control token after an answer, so no model could learn "
            f"to stop; end each assistant turn with one"
        )


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Every token that is never text, shortest first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (len(token), token))


def _common(spans: list[Span], others: list[Span]) -> list[Span]:
    """The ranges that lie in both; each list is ascending and disjoint."""
    pairs = ((max(a, c), min(b, d)) for a, b in spans for c, d in others)
    return [(start, end) for start, end in pairs if start < end]


def _without(length: int, holes: list[Span]) -> list[Span]:
    """The ranges of [0, length) outside `holes`, which are ascending and disjoint."""
    edges = [0, *(edge for hole in holes for edge in hole), length]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]
