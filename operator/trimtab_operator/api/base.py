"""What all API models share: camelCase keys, frozen values, bounded strings, CEL rules."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.alias_generators import to_camel

GROUP = "trimtab.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


class ApiModel(BaseModel):
    """A part of a custom resource. Unknown keys are ignored: the API server has pruned or refused them already."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


Model = TypeVar("Model", bound=ApiModel)


def parsed(model: type[Model], obj: dict[str, Any] | None) -> Model | None:
    """An object of someone else's as a model; None where it is absent or does not fit."""
    try:
        return None if obj is None else model.model_validate(obj)
    except ValidationError:
        return None


def complaint(error: ValidationError) -> str:
    """The first fault of an object, with its path."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules, each with its message, for `json_schema_extra`."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


def list_map(*keys: str) -> dict[str, Any]:
    """A list whose items are merged by key in server-side apply."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

Name = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]
ObjectName = Annotated[
    str,
    Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"),
]
"""The name of most objects: a DNS subdomain."""
StageName = Annotated[str, Field(min_length=1, max_length=32, pattern=DNS_LABEL)]
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$"
Quantity = Annotated[
    str,
    BeforeValidator(str),
    Field(min_length=1, max_length=32, pattern=_QUANTITY),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 32, "pattern": _QUANTITY}),
]
"""A Kubernetes quantity; YAML may hold it as a number or a string."""
Timestamp = Annotated[str, Field(max_length=40, json_schema_extra={"format": "date-time"})]
Uri = Annotated[
    str,
    Field(
        min_length=8,
        max_length=1024,
        pattern=r"^(hf|s3|gs|az|https|pvc|file)://[^\s@\\]+$",
    ),
]
ArtifactUri = Annotated[
    str, Field(min_length=8, max_length=512, pattern=r"^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[A-Za-z0-9._-]+)*$")
]
Digest = Annotated[str, Field(max_length=71, pattern=r"^sha256:[0-9a-f]{64}$")]


class SecretReference(ApiModel):
    """A Secret of the same namespace."""

    name: ObjectName = Field(description="Name of the Secret.")


class Condition(ApiModel):
    """A condition as Kubernetes' API conventions describe it."""

    type: Annotated[str, Field(max_length=64)] = Field(description="What is said.")
    status: Annotated[str, Field(max_length=7, json_schema_extra={"enum": ["True", "False", "Unknown"]})] = Field(
        description="True, False or Unknown."
    )
    reason: Annotated[str, Field(min_length=1, max_length=128)] = Field(description="Cause in one CamelCase word.")
    message: Annotated[str, Field(max_length=4096)] = Field(default="", description="Cause, place and remedy.")
    observed_generation: Annotated[int, Field(ge=0)] = Field(default=0, description="Generation this is about.")
    last_transition_time: Timestamp = Field(description="When status changed last.")
