"""From a pydantic model to a structural schema, the OpenAPI 3.0 subset that a CRD may hold."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

_NOT_STRUCTURAL = {"anyOf", "oneOf", "allOf", "const", "not"}


class _OpenApi30(GenerateJsonSchema):
    """Kubernetes speaks OpenAPI 3.0: no null type, no const; an absent value is absent, never null."""

    def nullable_schema(self, schema: Any) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def literal_schema(self, schema: Any) -> JsonSchemaValue:
        return {"type": "string", "enum": list(schema["expected"])}

    def default_schema(self, schema: Any) -> JsonSchemaValue:
        out = super().default_schema(schema)
        return {key: value for key, value in out.items() if (key, value) != ("default", None)}


def structural_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's schema, references inlined; TypeError for what no structural schema can say."""
    raw = model.model_json_schema(by_alias=True, schema_generator=_OpenApi30)
    return _rewrite(raw, raw.get("$defs", {}))


def _rewrite(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    if reference := node.get("$ref"):
        siblings = {key: value for key, value in node.items() if key != "$ref"}
        node = {**definitions[reference.removeprefix("#/$defs/")], **siblings}
    out: dict[str, Any] = {}
    for key, value in node.items():
        if key in _NOT_STRUCTURAL:
            raise TypeError(f"not structural: {key} in {node}")
        match key:
            case "title" | "$defs" | "propertyNames":
                continue
            case "description":
                out[key] = " ".join(value.split())
            case "default" if value in ([], {}, ""):
                continue
            case "properties":
                out[key] = {name: _rewrite(child, definitions) for name, child in value.items()}
            case "items":
                out[key] = _rewrite(value, definitions)
            case "additionalProperties":
                if isinstance(value, dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
                    out[key] = _rewrite(value, definitions)
            case "exclusiveMinimum" | "exclusiveMaximum":
                out[key], out[key.replace("exclusiveM", "m")] = True, value
            case "maxLength" if node.get("type") == "object":
                out["maxProperties"] = value
            case _:
                out[key] = value
    return out
