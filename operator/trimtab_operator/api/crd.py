"""The two CustomResourceDefinitions, built from the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from trimtab_operator.api.base import GROUP, VERSION, rules
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.modelendpoint import ModelEndpoint
from trimtab_operator.api.schema import structural_schema

_NAME_FITS_A_LABEL = (
    "self.metadata.name.size() <= 63",
    "metadata.name: at most 63 characters, since labels carry it; choose a shorter name",
)


@dataclass(frozen=True)
class Column:
    """A printer column of `kubectl get`; priority 1 shows with `-o wide` only."""

    name: str
    type: str
    path: str
    priority: int = 0

    def manifest(self) -> dict[str, Any]:
        """The column as the CRD holds it."""
        column: dict[str, Any] = {"name": self.name, "type": self.type, "jsonPath": self.path}
        return column | ({"priority": self.priority} if self.priority else {})


@dataclass(frozen=True)
class Resource:
    """A custom resource: its model, and what stands beside the schema in the CRD."""

    model: type[BaseModel]
    plural: str
    short_name: str
    columns: tuple[Column, ...]
    scale: bool = False


RESOURCES = (
    Resource(
        FineTuneJob,
        "finetunejobs",
        "ftj",
        (
            Column("Phase", "string", ".status.phase"),
            Column("Stage", "string", ".status.progress.stage"),
            Column("Progress", "string", ".status.progressText"),
            Column("ETA", "string", ".status.remainingText"),
            Column("Reason", "string", ".status.reason"),
            Column("Endpoint", "string", ".status.endpoint.url", 1),
            Column("Age", "date", ".metadata.creationTimestamp"),
        ),
    ),
    Resource(
        ModelEndpoint,
        "modelendpoints",
        "mep",
        (
            Column("Phase", "string", ".status.phase"),
            Column("Model", "string", ".spec.servedModelName"),
            Column("Revision", "string", ".status.stable.revision"),
            Column("Ready", "integer", ".status.stable.ready"),
            Column("Reason", "string", ".status.reason"),
            Column("URL", "string", ".status.url", 1),
            Column("Age", "date", ".metadata.creationTimestamp"),
        ),
        scale=True,
    ),
)


def crd(resource: Resource) -> dict[str, Any]:
    """The CustomResourceDefinition of one resource."""
    kind = resource.model.__name__
    schema = structural_schema(resource.model)
    for given in ("apiVersion", "kind", "metadata"):
        schema["properties"][given] = {"type": "object" if given == "metadata" else "string"}
    schema["required"] = ["spec"]
    schema["properties"]["status"].pop("default", None)
    schema |= rules(_NAME_FITS_A_LABEL)
    subresources: dict[str, Any] = {"status": {}}
    if resource.scale:
        subresources["scale"] = {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": resource.plural,
                "singular": kind.lower(),
                "shortNames": [resource.short_name],
                "categories": ["trimtab"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": subresources,
                    "additionalPrinterColumns": [column.manifest() for column in resource.columns],
                }
            ],
        },
    }
