"""Pod shape: the narrow set of fields that a user may set, never a whole PodTemplateSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from trimtab_operator.api.base import ApiModel, ObjectName, Quantity, SecretReference, list_map, rules

RESERVED_VARIABLES = (
    "TRIMTAB_",
    "LD_",
    "PYTHON",
    "KUBERNETES_",
    "JOB_COMPLETION_INDEX",
    "OMP_NUM_THREADS",
    "HOME",
    "PATH",
)

_QUALIFIED_NAME = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
_QUALIFIED_KEYS = (
    f"self.all(k, k.size() <= 317 && k.matches('{_QUALIFIED_NAME}'))",
    "a key is a name such as team or example.com/team, of letters, digits, '-', '_' and '.'",
)
QualifiedName = Annotated[str, Field(max_length=317, pattern=_QUALIFIED_NAME)]
"""The key of a label, a taint or a resource, with or without a prefix."""
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]

ResourceMap = Annotated[
    Mapping[Annotated[str, Field(max_length=317)], Quantity],
    Field(max_length=16, description="Resource name to quantity.", json_schema_extra=rules(_QUALIFIED_KEYS)),
]


class Resources(ApiModel):
    """CPU, memory and accelerators of each pod."""

    limits: ResourceMap | None = Field(
        default=None, description="At most; accelerators such as nvidia.com/gpu stand here."
    )
    requests: ResourceMap | None = Field(default=None, description="At least; by default equal to the limits.")
    shared_memory: Quantity | None = Field(default=None, description="Size of /dev/shm, taken from the memory limit.")


class EnvVar(ApiModel):
    """An environment variable of the stage's container."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            (
                " && ".join(f"!self.name.startsWith('{prefix}')" for prefix in RESERVED_VARIABLES),
                f"this variable is reserved; choose a name that starts with none of: {', '.join(RESERVED_VARIABLES)}",
            )
        )
    }

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Name.")]
    value: Annotated[str, Field(max_length=4096)] = Field(default="", description="Value, taken literally.")


class Toleration(ApiModel):
    """A toleration, as in a pod's spec."""

    key: QualifiedName | None = Field(default=None, description="Taint key; absent: all.")
    operator: Annotated[str, Field(max_length=6, json_schema_extra={"enum": ["Exists", "Equal"]})] | None = Field(
        default=None, description="Exists or Equal."
    )
    value: LabelValue | None = Field(default=None, description="Taint value for Equal.")
    effect: (
        Annotated[
            str, Field(max_length=16, json_schema_extra={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]})
        ]
        | None
    ) = Field(default=None, description="Taint effect; absent: all.")
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        default=None, description="How long a NoExecute taint is tolerated."
    )


_OUTSIDE_RESERVED = (
    "!self.exists(k, k.startsWith('trimtab.dev/') || k.contains('kubernetes.io/') || k.contains('k8s.io/'))",
    "keys below trimtab.dev/, kubernetes.io/ and k8s.io/ are reserved; use a prefix of your own",
)

ExtraLabels = Annotated[
    Mapping[Annotated[str, Field(max_length=317)], LabelValue],
    Field(max_length=16, json_schema_extra=rules(_OUTSIDE_RESERVED, _QUALIFIED_KEYS)),
]
ExtraAnnotations = Annotated[
    Mapping[Annotated[str, Field(max_length=317)], Annotated[str, Field(max_length=1024)]],
    Field(max_length=16, json_schema_extra=rules(_OUTSIDE_RESERVED, _QUALIFIED_KEYS)),
]


class PodShape(ApiModel):
    """Where and with what a pod runs."""

    resources: Resources | None = Field(default=None, description="CPU, memory and accelerators of each pod.")
    node_selector: (
        Annotated[
            Mapping[Annotated[str, Field(max_length=317)], LabelValue],
            Field(max_length=16, json_schema_extra=rules(_QUALIFIED_KEYS)),
        ]
        | None
    ) = Field(default=None, description="Labels that a node must have.")
    tolerations: Annotated[list[Toleration], Field(max_length=16)] | None = Field(
        default=None, description="Taints that the pods tolerate."
    )
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pods.")
    runtime_class_name: ObjectName | None = Field(default=None, description="RuntimeClass of the pods, e.g. nvidia.")
    service_account_name: ObjectName | None = Field(
        default=None,
        description="ServiceAccount of the pods; they get no token of it, but its pull secrets and cloud identity.",
    )
    env: Annotated[list[EnvVar], Field(max_length=32, json_schema_extra=list_map("name"))] | None = Field(
        default=None, description="Environment variables of the container."
    )
    labels: ExtraLabels | None = Field(default=None, description="More labels for the pods.")
    annotations: ExtraAnnotations | None = Field(default=None, description="More annotations for the pods.")
    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^\S+$")] | None = Field(
        default=None, description="Image in place of the operator's default."
    )
    image_pull_secrets: (
        Annotated[list[SecretReference], Field(max_length=8, json_schema_extra=list_map("name"))] | None
    ) = Field(default=None, description="Secrets for pulling the image.")
