"""A CRD's structural schema, applied as the API server applies it: prune, default, validate."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jsonschema import Draft4Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

Schema = dict[str, Any]


def place(path: Iterable[str | int]) -> str:
    """A path as the API server writes it: `spec.stages[0].name`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def prune(value: Any, schema: Schema, path: tuple[str | int, ...] = ()) -> tuple[Any, list[str]]:
    """The value without fields that the schema does not know, and a message for each that was dropped."""
    if isinstance(value, list) and "items" in schema:
        items = [prune(item, schema["items"], (*path, index)) for index, item in enumerate(value)]
        return [item for item, _ in items], [message for _, messages in items for message in messages]
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return value, []
    properties, more = schema.get("properties", {}), schema.get("additionalProperties")
    if not properties and not isinstance(more, dict):
        return value, []
    kept: dict[str, Any] = {}
    messages: list[str] = []
    for name, child in value.items():
        below = properties.get(name, more)
        if below is None:
            near = difflib.get_close_matches(name, properties, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(properties))}"
            messages.append(f'{place((*path, name))}: unknown field "{name}"; {hint}')
            continue
        kept[name], deeper = prune(child, below, (*path, name))
        messages += deeper
    return kept, messages


def with_defaults(value: Any, schema: Schema) -> Any:
    """A copy of the value with the schema's defaults where a field is absent."""
    if isinstance(value, list) and "items" in schema:
        return [with_defaults(item, schema["items"]) for item in value]
    if not isinstance(value, dict):
        return value
    out = dict(value)
    for name, child in schema.get("properties", {}).items():
        if name not in out and "default" in child:
            out[name] = copy.deepcopy(child["default"])
    more = schema.get("additionalProperties")
    for name in out:
        below = schema.get("properties", {}).get(name, more)
        if isinstance(below, dict):
            out[name] = with_defaults(out[name], below)
    return out


def _int_or_string(_validator: Any, wanted: bool, value: Any, _schema: Schema) -> Iterator[ValidationError]:
    if wanted and (isinstance(value, bool) or not isinstance(value, int | str)):
        yield ValidationError(f"{json.dumps(value)} is neither an integer nor a string")


def _unique_keys(_validator: Any, keys: list[str], value: Any, _schema: Schema) -> Iterator[ValidationError]:
    seen: list[dict[str, Any]] = []
    for index, item in enumerate(value if isinstance(value, list) else []):
        key = {name: item.get(name) for name in keys} if isinstance(item, dict) else {}
        if key and key in seen:
            yield ValidationError(f"Duplicate value: {json.dumps(key)}", path=(index,))
        seen.append(key)


_Validator: Any = extend(  # type: ignore[no-untyped-call]
    Draft4Validator,
    {"x-kubernetes-int-or-string": _int_or_string, "x-kubernetes-list-map-keys": _unique_keys},
)
"""OpenAPI 3.0 takes draft 4's boolean exclusiveMinimum."""


def validate(value: Any, schema: Schema) -> list[str]:
    """What the schema refuses, one message a fault, in the order of the paths."""
    errors = sorted(_Validator(schema).iter_errors(value), key=lambda error: place(error.absolute_path))
    return [message for error in errors for message in _messages(error)]


_Text = Callable[[Any, Any], str]
_TEXTS: dict[str, _Text] = {
    "type": lambda want, value: f"Invalid value: {_shown(value)}: must be of type {want}",
    "enum": lambda want, value: f"Unsupported value: {_shown(value)}: supported values: {', '.join(map(repr, want))}",
    "pattern": lambda want, value: f"Invalid value: {_shown(value)}: should match '{want}'",
    "minimum": lambda want, value: f"Invalid value: {_shown(value)}: should be at least {want}",
    "maximum": lambda want, value: f"Invalid value: {_shown(value)}: should be at most {want}",
    "minLength": lambda want, value: f"Invalid value: {_shown(value)}: at least {want} characters",
    "maxLength": lambda want, _: f"Too long: may not be more than {want} characters",
    "minItems": lambda want, _: f"Invalid value: at least {want} items",
    "maxItems": lambda want, value: f"Too many: {len(value)}: must have at most {want} items",
    "maxProperties": lambda want, value: f"Too many: {len(value)}: must have at most {want} items",
}


def _messages(error: ValidationError) -> Iterator[str]:
    path = list(error.absolute_path)
    value: Any = error.instance
    if error.validator == "required":
        # Draft 4 gives one error for each missing name; its message starts with that name.
        name = error.message.split("'")[1]
        yield f"{place([*path, name])}: Required value"
        return
    text = _TEXTS.get(str(error.validator))
    said = text(error.validator_value, value) if text else error.message
    schema = error.schema if isinstance(error.schema, dict) else {}
    if error.validator in ("minimum", "maximum") and schema.get(f"exclusive{str(error.validator).title()}"):
        said = said.replace("at least", "more than").replace("at most", "less than")
    yield f"{place(path)}: {said}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
