"""The fields of a custom resource, as its schema has them: where they stand, and what values they take."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Schema = dict[str, Any]
Path = tuple[str | int, ...]
MISSING = object()

_TEXTS = (
    *("case", "pvc://models/case", "job://case/case", "hf://org/case", "1", "1Gi", "CASE", "case:1"),
    *("0" * 40, "sha256:" + "0" * 64, "sha256:" + "1" * 64, "example.com/case"),
    *("server", "trainer"),
)
"""One of them fits any pattern; the last two are service accounts that the chart's allow-list has here."""
_MAP_KEYS = ("cpu", "example.com/case", "case")


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value and no further fields."""

    path: Path
    schema: Schema

    def __str__(self) -> str:
        return ".".join(str(part) for part in self.path)

    @property
    def place(self) -> str:
        """The path without indices and keys of maps, as documentation has it."""
        return ".".join(str(part) for part in self.path if part != -1)

    @property
    def name(self) -> str:
        """Of the field; of an item, that of its list."""
        return next(str(part) for part in reversed(self.path) if part != -1)

    def samples(self) -> list[Any]:
        """Different valid values, bounds included."""
        match self.schema:
            case {"enum": values}:
                return list(values)
            case {"x-kubernetes-int-or-string": True}:
                return ["1", "2"]
            case {"x-kubernetes-preserve-unknown-fields": True}:
                return [{"model_type": "llama"}, {"model_type": "gpt2"}]
            case {"type": "boolean"}:
                return [True, False]
            case {"type": "integer" | "number" as kind}:
                return self._numbers(kind)
            case {"type": "string"}:
                return self._strings()
        raise TypeError(f"{self}: no sample for {self.schema}")

    def wrong(self) -> list[Any]:
        """Values of another type, out of bounds, or that break the pattern."""
        schema = self.schema
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return ["text", 1]
        if schema.get("x-kubernetes-int-or-string"):
            return [[], "-1", "1gi"]
        kind = schema["type"]
        values: list[Any] = [{"a": 1}, ["a"]]
        if kind != "string":
            values.append("text")
        if kind in ("integer", "number"):
            step = 1 if kind == "integer" else 1e-9
            for bound, sign in (("minimum", -1), ("maximum", 1)):
                if bound in schema:
                    out = schema[bound] + (0 if schema.get(f"exclusive{bound.title()}") else sign * step)
                    values.append(out if kind == "number" or isinstance(out, int) else int(out))
        elif kind == "string":
            values += [1, True]
            if "maxLength" in schema and "enum" not in schema:
                values.append("a" * (schema["maxLength"] + 1))
            if "enum" in schema:
                values.append("neither")
            if schema.get("minLength"):
                values.append("")
        return values

    def _numbers(self, kind: str) -> list[Any]:
        low, high = self.schema.get("minimum", -(2**31)), self.schema.get("maximum", 2**31 - 1)
        step = 1 if kind == "integer" else (high - low) / 1024
        low += step if self.schema.get("exclusiveMinimum") else 0
        high -= step if self.schema.get("exclusiveMaximum") else 0
        middle = [low + step, low + 2 * step, low, high]
        return [int(value) if kind == "integer" else value for value in middle if low <= value <= high]

    def _strings(self) -> list[str]:
        shortest, longest = self.schema.get("minLength", 0), self.schema.get("maxLength", 10**6)
        pattern = re.compile(self.schema.get("pattern", ""))
        found = [text for text in _TEXTS if pattern.search(text) and shortest <= len(text) <= longest]
        more = []
        for text in found[:1]:
            others = (text + "x", "1" + text[1:]) if len(found) == 1 else (text + "x",)
            more = [other for other in others if pattern.search(other)]
            edge = text + "x" * (longest - len(text))
            more += [edge] if pattern.search(edge) and longest <= 2048 else []
        return [text for text in [*found, *more] if len(text) <= longest]


def leaves(schema: Schema, path: Path = ()) -> Iterator[Leaf]:
    """All of them, in the schema's order; of a list its last item (-1), of a map one key."""
    if schema.get("properties"):
        for name, child in schema["properties"].items():
            yield from leaves(child, (*path, name))
    elif "items" in schema:
        yield from leaves(schema["items"], (*path, -1))
    elif isinstance(schema.get("additionalProperties"), dict):
        yield from leaves(schema["additionalProperties"], (*path, _MAP_KEYS[0 if path[-1] in _QUANTITIES else 1]))
    else:
        yield Leaf(path, schema)


_QUANTITIES = ("limits", "requests")


def get(value: Any, path: Path) -> Any:
    """What stands there; MISSING where nothing does."""
    for part in path:
        if (isinstance(value, list) and isinstance(part, int) and value) or (isinstance(value, dict) and part in value):
            value = value[part]
        else:
            return MISSING
    return value


def put(spec: Any, schema: Schema, path: Path, value: Any) -> Any:
    """A copy with the value there; what must stand beside it on the way is filled in."""
    spec = copy.deepcopy(spec)
    here, below = spec, schema
    for part, following in zip(path, (*path[1:], None), strict=True):
        below = _child(below, part)
        if following is None:
            if isinstance(here, list):
                here[-1:] = [value]
            else:
                here[part] = value
            break
        if get(here, (part,)) is MISSING:
            made = _filled(below)
            if isinstance(here, list):
                here.append(made)
            else:
                here[part] = made
        here = here[part]
    return spec


def without(spec: Any, path: Path) -> Any:
    """A copy without what stands there."""
    spec = copy.deepcopy(spec)
    holder = get(spec, path[:-1])
    del holder[path[-1]]
    return spec


def _child(schema: Schema, part: str | int) -> Schema:
    if isinstance(part, int):
        return dict(schema["items"])
    return dict(schema.get("properties", {}).get(part) or schema["additionalProperties"])


def _filled(schema: Schema) -> Any:
    """The least that such a field may hold."""
    if "items" in schema:
        return []
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        return {name: _filled(schema["properties"][name]) for name in schema.get("required", [])}
    return Leaf((), schema).samples()[0]
