"""Task templates: the fields of a record become a question and its answer.

The templates are Jinja, in the sandbox that transformers uses for chat templates. A field that is absent or null is
undefined, and using it is an error. The filter `options` writes a list of choices as FLAN does (Wei et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2 import Template as Compiled
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimtab_trainer.data.files import Row
from trimtab_trainer.data.messages import checked
from trimtab_trainer.data.records import Conversation, InvalidRecord, Message
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import Template

_PARTS = (("prompt", "user"), ("completion", "assistant"))


def options(choices: Any) -> str:
    """A list of choices, each on a line of its own after the line `OPTIONS:`."""
    if not isinstance(choices, (list, tuple)) or not choices or any(isinstance(each, (list, dict)) for each in choices):
        raise InvalidRecord("the filter options was given no list of choices", "give it a field that holds a list")
    return "\n- ".join(["OPTIONS:", *map(str, choices)])


class TaskTemplates:
    """The templates of one data source."""

    def __init__(self, templates: Sequence[Template], place: str) -> None:
        """Compile them; `place` is for messages, such as `data[0]`.

        Raises:
            BadConfiguration: a template is no Jinja, or one names no field of the record.
        """
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        environment.filters["options"] = options
        self.fields: frozenset[str] = frozenset()
        """Every field that some template names."""
        self._compiled: list[list[tuple[str, str, Compiled]]] = []
        for i, template in enumerate(templates):
            parts, found = [], set()
            for key, role in _PARTS:
                name, source = f"{place}.templates[{i}].{key}", getattr(template, key)
                try:
                    found |= meta.find_undeclared_variables(environment.parse(source))
                    parts.append((name, role, environment.from_string(source)))
                except TemplateError as error:
                    line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
                    raise BadConfiguration(f"{name}: {line}{error.message}; correct it") from error
            if not found:
                raise BadConfiguration(
                    f"{place}.templates[{i}] names no field of the record, so every record would give the same text; "
                    f"write one as {{{{ field }}}}"
                )
            self.fields |= found
            self._compiled.append(parts)

    def __len__(self) -> int:
        """Number of templates."""
        return len(self._compiled)

    def render(self, index: int, row: Row) -> Conversation:
        """A question and its answer by template `index`.

        Raises:
            InvalidRecord: a field is missing, or nothing is left to ask or to answer.
        """
        fields = {key: value for key, value in row.items() if value is not None}
        return Conversation(
            [Message(role, _render(name, compiled, fields)) for name, role, compiled in self._compiled[index]]
        )


def _render(name: str, compiled: Compiled, fields: Row) -> str:
    try:
        text = compiled.render(fields)
    except UndefinedError as error:
        known = ", ".join(sorted(map(str, fields)))[:200]
        raise InvalidRecord(
            f"{name}: {error.message}; the record has {known or 'no fields'}", "correct the template or the record"
        ) from error
    except InvalidRecord as error:
        raise InvalidRecord(f"{name}: {error.cause}", error.remedy) from error
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InvalidRecord(
            f"{name}: {type(error).__name__}: {error}"[:500], "correct the template or the record"
        ) from error
    if not text.strip():
        raise InvalidRecord(f"{name} gives an empty text", "fill the field or remove the record")
    return checked(text, name)
