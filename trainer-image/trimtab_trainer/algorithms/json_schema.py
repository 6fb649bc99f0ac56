"""Whether a text is JSON of a given form, by JSON Schema of any draft.

Nothing is fetched, and expressions are RE2's, so an answer takes no more time than its length asks for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry, Specification
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012, UnknownDialect, specification_with

from trimtab_trainer.algorithms.expression import Expression
from trimtab_trainer.errors import BadConfiguration

_PLACE = "ppo.verifier.jsonSchema.schema"
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_UNSUPPORTED = {
    "patternProperties": "name the properties",
    "$schema": "give it at the top only",
}
"""Below the top, keywords for which the library would leave RE2, and what to do instead."""
_PROBES: tuple[Any, ...] = (None, True, 1, "text", [], [1], {}, {"a": 1})
"""Documents, one of each type at least."""


def schema_check(schema: dict[str, Any]) -> Callable[[str], bool]:
    """What says whether a text is one JSON document that the schema admits; white space around it does not count.

    Raises:
        BadConfiguration: the schema is not valid, leads outside of itself, or refers to itself without an end.
    """
    dialect: Any = validator_for(schema, default=Draft202012Validator)
    own = {keyword: value for keyword, value in schema.items() if keyword != "$schema"}
    try:
        specification = specification_with(str(schema["$schema"])) if "$schema" in schema else DRAFT202012
        dialect.check_schema(own, format_checker=FormatChecker(()))  # with formats it would try expressions as Python's
    except UnknownDialect as error:
        raise BadConfiguration(f"{_PLACE}: $schema {error.uri!r} is no draft of JSON Schema; remove it") from error
    except SchemaError as error:
        raise BadConfiguration(f"{_PLACE}{error.json_path[1:]}: {error.message}; correct the schema") from error
    parts = list(_subschemas(own, specification))
    validator = _linear(dialect, parts)(own, registry=Registry())
    for part in parts:
        for keyword, remedy in _UNSUPPORTED.items():
            if keyword in part:
                raise BadConfiguration(f"{_PLACE}: {keyword} is not supported here; {remedy}")
        for keyword in _REFERENCES:
            if keyword in part:
                _require_end(validator, keyword, part[keyword])
    return lambda answer: _is_admitted(validator, answer)


def _subschemas(schema: Any, specification: Specification[Any]) -> Iterator[dict[str, Any]]:
    """All schemas within a schema that are objects, it first."""
    if isinstance(schema, dict):
        yield schema
        for part in specification.subresources_of(schema):
            yield from _subschemas(part, specification)


def _linear(dialect: type[Validator], parts: list[dict[str, Any]]) -> type[Validator]:
    """The dialect with RE2 for Python's expressions."""
    patterns = {part["pattern"] for part in parts if "pattern" in part}
    expressions = {pattern: Expression(pattern, f"{_PLACE}: pattern") for pattern in patterns}

    def pattern(validator: Validator, wanted: str, instance: Any, _: Any) -> Iterator[ValidationError]:
        if validator.is_type(instance, "string") and not expressions[wanted].is_found(instance):
            yield ValidationError(f"{wanted!r} is not found")

    linear: type[Validator] = extend(dialect, {"pattern": pattern})  # type: ignore[no-untyped-call]
    return linear


def _require_end(validator: Validator, keyword: str, reference: str) -> None:
    """Follow a reference with one document of each type: what loops for none of them ends with each real one."""
    place = f"{_PLACE}: {keyword} {reference!r}"
    if not reference.startswith("#"):
        raise BadConfiguration(f"{place} leads outside of it; copy what it names into $defs")
    alone = validator.evolve(schema={keyword: reference})
    try:
        for probe in _PROBES:
            alone.is_valid(probe)
    except Unresolvable as error:
        raise BadConfiguration(f"{place} leads nowhere; correct it") from error
    except RecursionError as error:
        raise BadConfiguration(f"{place} leads to itself without an end; have it pass a property or an item") from error


def _is_admitted(validator: Validator, answer: str) -> bool:
    try:
        document = json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):  # no JSON, or nested too deeply
        return False
    try:
        return validator.is_valid(document)
    except (RecursionError, ArithmeticError):  # the latter: a number too large for multipleOf
        return False


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
